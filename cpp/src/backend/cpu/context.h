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
  // The tasks of a thread, of which others take some once they have none.
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  const CpuKernels* kernels = nullptr;
  int num_threads = 1;
  std::unique_ptr<ThreadPool> pool;  // of num_threads; null until something runs on several
  std::unique_ptr<Share[]> shares;   // likewise
  Scratch scratch;

  // Threads for an op that touches `elements` floats: waking the others costs some microseconds, in
  // which one thread alone touches about this many.
  int ThreadsFor(int64_t elements) const { return elements < 32 * 1024 ? 1 : num_threads; }

  // The same for a matrix product of so many multiply-adds: a core does some 32 of them in the time
  // it streams one float.
  int ThreadsForProduct(int64_t multiply_adds) const { return ThreadsFor(multiply_adds / 32); }

  // Starts the threads, where they are not yet there. Throws OutOfMemoryError.
  ThreadPool& Pool() {
    if (!pool) {
      shares = std::make_unique<Share[]>(static_cast<size_t>(num_threads));
      pool = std::make_unique<ThreadPool>(num_threads);
    }
    return *pool;
  }

  // Calls body(task) for tasks [0, num_tasks), each on some thread. A thread goes through tasks
  // that follow each other: what two threads read by turns comes at half the memory's speed.
  template <typename Body>
  void ParallelFor(int threads, int64_t num_tasks, const Body& body) {
    if (threads > num_tasks) threads = static_cast<int>(num_tasks);
    if (threads <= 1) {
      for (int64_t task = 0; task < num_tasks; ++task) body(task);
      return;
    }
    ThreadPool& used = Pool();
    for (int thread = 0; thread < threads; ++thread) {
      shares[thread].next = num_tasks * thread / threads;
      shares[thread].end = num_tasks * (thread + 1) / threads;
    }
    used.Run(threads, [&](int thread) {
      for (int i = 0; i < threads; ++i) {  // its own share, then what is left of the others'
        Share& share = shares[(thread + i) % threads];
        for (int64_t task;
             (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
          body(task);
        }
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
