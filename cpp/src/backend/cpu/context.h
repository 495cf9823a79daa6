// What every op of the CPU backend is given: kernels, threads and scratch.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "backend/cpu/kernels/kernels.h"
#include "core/buffer.h"
#include "core/thread_pool.h"

namespace tidal {

// Zero-filled, 64-byte aligned, committed page by page as it is touched. Throws OutOfMemoryError.
Buffer AllocateHostMemory(int64_t bytes, const std::string& what);

inline constexpr const char* kScratchPurpose = "scratch of the ops";

// Memory an op uses while it runs; pieces grow to the largest size ever asked for and keep their
// address until then. An op takes each slot at most once.
class Scratch {
 public:
  enum Slot { kPlan, kRecords, kThreads, kKeys, kExperts, kInputs, kNumSlots };

  // Called with the bytes of every piece that is allocated.
  std::function<void(int64_t)> on_growth;

  // Uninitialised.
  template <typename T>
  T* Take(Slot slot, int64_t count) {
    Buffer& buffer = buffers_[slot];
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (buffer.bytes() < bytes) {
      buffer = Buffer();
      buffer = AllocateHostMemory(bytes, kScratchPurpose);
      if (on_growth) on_growth(bytes);
    }
    return static_cast<T*>(buffer.data());
  }

 private:
  Buffer buffers_[kNumSlots];
};

struct CpuContext {
  const CpuKernels* kernels = nullptr;
  int num_threads = 1;
  std::unique_ptr<ThreadPool> pool;  // of num_threads; null until something runs on several
  Scratch scratch;

  // Threads for an op that touches `elements` floats: waking the others costs some microseconds, in
  // which one thread alone touches about this many.
  int ThreadsFor(int64_t elements) const { return elements < 32 * 1024 ? 1 : num_threads; }

  // The same for a matrix product of so many multiply-adds: a core does some 32 of them in the time
  // it streams one float.
  int ThreadsForProduct(int64_t multiply_adds) const { return ThreadsFor(multiply_adds / 32); }

  // Starts the threads, where they are not yet there. Throws OutOfMemoryError.
  ThreadPool& Pool() {
    if (!pool) pool = std::make_unique<ThreadPool>(num_threads);
    return *pool;
  }

  // Calls body(task) for tasks [0, num_tasks), each on some thread.
  template <typename Body>
  void ParallelFor(int threads, int64_t num_tasks, const Body& body) {
    if (threads > num_tasks) threads = static_cast<int>(num_tasks);
    if (threads <= 1) {
      for (int64_t task = 0; task < num_tasks; ++task) body(task);
      return;
    }
    std::atomic<int64_t> next{0};
    Pool().Run(threads, [&](int) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
        body(task);
      }
    });
  }

  // Calls body(begin, end) for pieces of [0, count), at most `threads` of equal size (to a multiple
  // of `grain`).
  template <typename Body>
  void ParallelRange(int threads, int64_t count, int64_t grain, const Body& body) {
    const int64_t pieces = (count + grain - 1) / grain;
    if (threads > pieces) threads = static_cast<int>(pieces);
    if (threads <= 1) {
      if (count > 0) body(int64_t{0}, count);
      return;
    }
    Pool().Run(threads, [&](int thread) {
      const int64_t begin = pieces * thread / threads * grain;
      const int64_t end = pieces * (thread + 1) / threads * grain;
      if (begin < end) body(begin, end < count ? end : count);
    });
  }
};

// The number of the calling thread inside ParallelFor.
inline int ThreadIndex() {
  return ThreadPool::ThreadIndex();
}

}  // namespace tidal
