// Allocation with errors that say what was wanted and what there is; staging for copies.
#include "cuda_memory.h"

#include <algorithm>
#include <iomanip>
#include <sstream>

#include "common/check.h"

namespace tidal {
namespace {

constexpr int64_t kAlignment = 256;  // of what Take hands out

std::string Mebibytes(int64_t bytes) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(1) << static_cast<double>(bytes) / (1 << 20) << " MiB";
  return out.str();
}

}  // namespace

Buffer AllocateDevice(int device, int64_t bytes, const std::string& what) {
  TIDAL_CHECK(bytes >= 0, InvalidArgument, what, ": ", bytes, " bytes of memory; expected >= 0");
  void* data = nullptr;
  // An empty tensor still needs an address: a null one means "absent".
  cudaError_t status = cudaMalloc(&data, static_cast<size_t>(std::max(bytes, kAlignment)));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free_bytes = 0, total_bytes = 0;
    TIDAL_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    throw OutOfMemoryError(Concat(
        what, ": needs ", Mebibytes(bytes), " on cuda:", device, ", which has ",
        Mebibytes(static_cast<int64_t>(free_bytes)), " free of ",
        Mebibytes(static_cast<int64_t>(total_bytes)),
        "; lower max_seq_len, max_batch_size or num_pages, or end other programs on the GPU"));
  }
  TIDAL_CUDA_CHECK(status);
  return Buffer(data, bytes, [device](void* memory) {
    // A failure here has been or will be reported by a checked call; a destructor must not throw.
    if (cudaSetDevice(device) == cudaSuccess) cudaFree(memory);
  });
}

Buffer AllocatePinned(int64_t bytes, const std::string& what) {
  void* data = nullptr;
  cudaError_t status = cudaMallocHost(&data, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw OutOfMemoryError(Concat(what, ": needs ", Mebibytes(bytes),
                                  " of pinned host memory; free some, or raise the memory limit"));
  }
  TIDAL_CUDA_CHECK(status);
  return Buffer(data, bytes, [](void* memory) { cudaFreeHost(memory); });
}

PinnedStaging::PinnedStaging(int64_t half_bytes, cudaStream_t stream, const std::string& what)
    : half_bytes_(half_bytes), stream_(stream), memory_(AllocatePinned(2 * half_bytes, what)) {
  try {
    for (cudaEvent_t& event : copied_) {
      TIDAL_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    }
  } catch (...) {
    for (cudaEvent_t event : copied_) {
      if (event != nullptr) cudaEventDestroy(event);
    }
    throw;
  }
}

PinnedStaging::~PinnedStaging() {
  cudaStreamSynchronize(stream_);  // copies out of this memory may be under way
  for (cudaEvent_t event : copied_) cudaEventDestroy(event);
}

void* PinnedStaging::Take(int64_t bytes) {
  TIDAL_CHECK(bytes >= 0 && bytes <= half_bytes_, InvalidArgument, "pinned staging: ", bytes,
              " bytes at once; expected at most ", half_bytes_);
  if (used_ + bytes > half_bytes_) {
    auto index = [this] { return static_cast<size_t>(half_); };
    TIDAL_CUDA_CHECK(cudaEventRecord(copied_[index()], stream_));
    half_ = 1 - half_;
    TIDAL_CUDA_CHECK(cudaEventSynchronize(copied_[index()]));
    used_ = 0;
  }
  last_ = static_cast<char*>(memory_.data()) + half_ * half_bytes_ + used_;
  last_bytes_ = bytes;
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return last_;
}

}  // namespace tidal
