// Memory of the CUDA backend: device buffers, and pinned host memory that copies pass through.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <string>

#include "core/buffer.h"

namespace tidal {

// Uninitialised device memory on the current device. Throws OutOfMemoryError; `what` names the
// purpose.
Buffer AllocateDevice(int device, int64_t bytes, const std::string& what);

// Pinned host memory, so that copies really run beside the host. Throws OutOfMemoryError.
Buffer AllocatePinned(int64_t bytes, const std::string& what);

// Two pinned halves used in turn: while copies out of one half are under way, the other is filled.
class PinnedStaging {
 public:
  PinnedStaging(int64_t half_bytes, cudaStream_t stream, const std::string& what);
  ~PinnedStaging();
  PinnedStaging(const PinnedStaging&) = delete;
  PinnedStaging& operator=(const PinnedStaging&) = delete;

  int64_t half_bytes() const { return half_bytes_; }

  // Room for `bytes` <= half_bytes(), to be filled and copied from on the stream before the next
  // Take. Waits if the copies queued out of that half long ago are still running.
  void* Take(int64_t bytes);

  // What the last Take handed out.
  void* last() const { return last_; }
  int64_t last_bytes() const { return last_bytes_; }

 private:
  int64_t half_bytes_;
  cudaStream_t stream_;
  Buffer memory_;
  std::array<cudaEvent_t, 2> copied_{};  // of each half: all its copies are done
  int half_ = 0;
  int64_t used_ = 0;  // bytes taken of the current half
  void* last_ = nullptr;
  int64_t last_bytes_ = 0;
};

}  // namespace tidal
