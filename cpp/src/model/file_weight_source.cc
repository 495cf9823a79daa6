// FileWeightSource: tensors inside safetensors files, read with pread, a piece on several threads.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/parallel.h"
#include "tidal/error.h"
#include "tidal/weights.h"

namespace tidal {
namespace {

// Of one thread at a time: from the page cache a read is a copy, and takes far longer than its
// call.
constexpr int64_t kReadBytes = 1 << 20;

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
  const WeightFileEntry& entry = found->second;
  int descriptor = FileDescriptor(entry);
  threads_->ForPieces(bytes, kReadBytes, [&](int64_t begin, int64_t end) {
    for (int64_t done = begin; done < end;) {
      ssize_t got = pread(descriptor, static_cast<char*>(dst) + done,
                          static_cast<size_t>(end - done), entry.file_offset + offset + done);
      if (got < 0 && errno == EINTR) continue;
      TIDAL_CHECK(got >= 0, WeightsError, name, ": cannot read ", entry.path, ": ",
                  std::strerror(errno));
      TIDAL_CHECK(got > 0, WeightsError, name, ": ", entry.path, " ends ", bytes - done,
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
