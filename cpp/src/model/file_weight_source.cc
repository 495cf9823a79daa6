// FileWeightSource: tensors inside safetensors files, read with pread, a piece on several threads.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "core/parallel.h"
#include "core/shape.h"
#include "tidal/error.h"
#include "tidal/weights.h"

namespace tidal {
namespace {

// What one thread reads at a time: from the page cache a read is a copy, and takes far longer than
// its call.
constexpr int64_t kReadBytes = 1 << 20;

// Bytes from the first element of an entry with strides to behind its last.
int64_t SpanBytes(const WeightFileEntry& entry) {
  int64_t elements = 1;
  for (size_t i = 0; i < entry.strides.size(); ++i) {
    elements += (entry.info.shape[i] - 1) * entry.strides[i];
  }
  return elements * DTypeBytes(entry.info.dtype);
}

void CheckStrides(const WeightFileEntry& entry) {
  const size_t rank = entry.info.shape.size();
  bool fits = entry.strides.size() == rank && (rank == 1 || rank == 2);
  // No dimension alone reaches past the file, so that the sum of two does not overflow.
  for (size_t i = 0; fits && i < rank; ++i) {
    fits = entry.info.shape[i] > 0 && entry.strides[i] > 0 &&
           entry.info.shape[i] <= entry.identity.size / entry.strides[i];
  }
  TIDAL_CHECK(
      fits && entry.file_offset >= 0 && SpanBytes(entry) <= entry.identity.size - entry.file_offset,
      WeightsError, entry.name, ": strides ", ShapeString(entry.strides), " of shape ",
      ShapeString(entry.info.shape), " do not fit into ", entry.path);
}

// A matrix whose elements do not lie one behind the other; of one column if it is a vector.
struct Strided {
  int64_t columns, row_stride, column_stride;
};

// Copies the elements [begin, end), counted along rows. Tile by tile, as both neighbours of an
// element may be on its cache line.
template <typename T>
void Gather(const T* from, const Strided& matrix, int64_t begin, int64_t end, T* out) {
  constexpr int64_t kTile = 32;
  const int64_t columns = matrix.columns, last_row = (end + columns - 1) / columns;
  for (int64_t top = begin / columns; top < last_row; top += kTile) {
    for (int64_t left = 0; left < columns; left += kTile) {
      for (int64_t row = top; row < std::min(top + kTile, last_row); ++row) {
        const int64_t start = row * columns;
        const int64_t first = std::max(begin, start + left);
        const int64_t last = std::min(end, start + std::min(left + kTile, columns));
        const T* own = from + row * matrix.row_stride;
        for (int64_t i = first; i < last; ++i) {
          out[i - begin] = own[(i - start) * matrix.column_stride];
        }
      }
    }
  }
}

// Throws WeightsError if the open file is not a regular one in the state of `expected`.
void CheckFile(int descriptor, const std::string& path, const FileIdentity& expected) {
  struct stat status;
  TIDAL_CHECK(fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode), WeightsError, path,
              ": not a regular file");
  constexpr int64_t kNsPerSecond = 1'000'000'000;
  FileIdentity found = {
      .device = status.st_dev,
      .inode = status.st_ino,
      .size = status.st_size,
      .mtime_ns = status.st_mtim.tv_sec * kNsPerSecond + status.st_mtim.tv_nsec,
  };
  TIDAL_CHECK(found == expected, WeightsError, path,
              ": was replaced or changed while it was being loaded; load it again once nothing "
              "writes to the folder");
}

}  // namespace

FileWeightSource::FileWeightSource(std::vector<WeightFileEntry> entries)
    : threads_(std::make_unique<CopyThreads>()) {
  for (WeightFileEntry& entry : entries) {
    if (!entry.strides.empty()) CheckStrides(entry);
    std::string name = entry.name;
    bool added = entries_.emplace(name, std::move(entry)).second;
    TIDAL_CHECK(added, WeightsError, name, ": listed twice");
  }
}

FileWeightSource::~FileWeightSource() {
  for (const auto& [path, file] : open_files_) close(file.descriptor);
}

const WeightInfo* FileWeightSource::Find(const std::string& name) const {
  auto found = entries_.find(name);
  return found == entries_.end() ? nullptr : &found->second.info;
}

void FileWeightSource::Read(const std::string& name, int64_t offset, int64_t bytes,
                            void* dst) const {
  auto found = entries_.find(name);
  TIDAL_CHECK(found != entries_.end(), WeightsError, name, ": no such tensor");
  if (found->second.strides.empty()) return ReadBytes(found->second, offset, bytes, dst);
  ReadStrided(found->second, offset, bytes, dst);
}

void FileWeightSource::ReadStrided(const WeightFileEntry& entry, int64_t offset, int64_t bytes,
                                   void* dst) const {
  const int64_t size = DTypeBytes(entry.info.dtype);
  const std::vector<int64_t>& shape = entry.info.shape;
  const std::vector<int64_t>& strides = entry.strides;
  TIDAL_CHECK(offset >= 0 && bytes >= 0 && offset % size == 0 && bytes % size == 0 &&
                  (offset + bytes) / size <= NumElements(shape),
              InvalidArgument, entry.name, ": bytes ", offset, " to ", offset + bytes,
              ", expected whole elements of ", ShapeString(shape), " in ",
              DTypeName(entry.info.dtype));
  if (span_of_ != &entry) {
    span_of_ = nullptr;
    span_.resize(static_cast<size_t>(SpanBytes(entry)));
    ReadBytes(entry, 0, SpanBytes(entry), span_.data());
    span_of_ = &entry;
  }
  const bool is_vector = shape.size() == 1;
  const Strided matrix = {is_vector ? 1 : shape[1], strides[0], is_vector ? 1 : strides[1]};
  threads_->ForPieces(bytes / size, kReadBytes / size, [&](int64_t begin, int64_t end) {
    auto gather = [&](auto number) {
      using T = decltype(number);
      Gather(reinterpret_cast<const T*>(span_.data()), matrix, offset / size + begin,
             offset / size + end, static_cast<T*>(dst) + begin);
    };
    if (size == 1) {
      gather(uint8_t{});
    } else if (size == 2) {
      gather(uint16_t{});
    } else {
      gather(uint32_t{});
    }
  });
}

void FileWeightSource::ReadBytes(const WeightFileEntry& entry, int64_t offset, int64_t bytes,
                                 void* dst) const {
  int descriptor = FileDescriptor(entry);
  threads_->ForPieces(bytes, kReadBytes, [&](int64_t begin, int64_t end) {
    for (int64_t done = begin; done < end;) {
      ssize_t got = pread(descriptor, static_cast<char*>(dst) + done,
                          static_cast<size_t>(end - done), entry.file_offset + offset + done);
      if (got < 0 && errno == EINTR) continue;
      TIDAL_CHECK(got >= 0, WeightsError, entry.info.NameToShow(entry.name), ": cannot read ",
                  entry.path, ": ", std::strerror(errno));
      TIDAL_CHECK(got > 0, WeightsError, entry.info.NameToShow(entry.name), ": ", entry.path,
                  " ends ", bytes - done,
                  " bytes early; was the file cut short or replaced while loading?");
      done += got;
    }
  });
}

void FileWeightSource::CheckUnchanged() const {
  for (const auto& [path, file] : open_files_) CheckFile(file.descriptor, path, file.identity);
}

int FileWeightSource::FileDescriptor(const WeightFileEntry& entry) const {
  auto found = open_files_.find(entry.path);
  if (found == open_files_.end()) {
    // O_NONBLOCK: a FIFO put in the file's place must not hang the load.
    int descriptor = open(entry.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    TIDAL_CHECK(descriptor >= 0, WeightsError, entry.path, ": cannot open: ", std::strerror(errno));
    found = open_files_.emplace(entry.path, OpenFile{descriptor, entry.identity}).first;
  }
  CheckFile(found->second.descriptor, entry.path, entry.identity);
  return found->second.descriptor;
}

}  // namespace tidal
