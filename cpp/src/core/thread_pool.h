// ThreadPool: threads that do the pieces of one caller's work, again and again.
//
// Own threads instead of OpenMP's: a shortage of threads is an error and not the end of the
// process, a forked child can make new ones, and ThreadSanitizer sees how they wait for each other.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/process.h"

namespace tidal {

// Where threads wait for a number to change: they look for a while, then sleep.
class WaitingPlace {
 public:
  // Waits until ready() is true; it reads atomics, by sequential consistency.
  template <typename Ready>
  void Wait(const Ready& ready) {
    if (LooksFor(ready)) return;
    std::unique_lock lock(mutex_);
    ++num_sleepers_;
    changed_.wait(lock, ready);
    --num_sleepers_;
  }

  // Call after every change of what ready() reads.
  void Wake() {
    if (num_sleepers_ == 0) return;
    std::lock_guard lock(mutex_);
    changed_.notify_all();
  }

 private:
  // Longer than the pauses of a decoding loop, and than the system takes a processor away for: on a
  // machine that is busy, a thread that sleeps gets one much later than one that looks.
  static constexpr int64_t kLookNs = 5'000'000;

  static int64_t NowNs();
  static void Pause();

  template <typename Ready>
  static bool LooksFor(const Ready& ready) {
    constexpr int kLooksBetweenTimes = 64;
    for (int64_t end = NowNs() + kLookNs; NowNs() < end;) {
      for (int look = 0; look < kLooksBetweenTimes; ++look) {
        if (ready()) return true;
        Pause();
      }
    }
    return false;
  }

  std::atomic<int> num_sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Used by one thread at a time.
class ThreadPool {
 public:
  // `num_threads` >= 1; the caller of Run is one of them. Throws OutOfMemoryError if the system
  // gives no more threads.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(thread) once for every thread in [0, threads), each on a thread of its own; thread 0
  // is the caller's. threads <= num_threads(). If some throw, one of the exceptions is thrown on
  // when all have ended. Throws UnsupportedError in a forked child.
  template <typename Body>
  void Run(int threads, const Body& body) {
    if (threads <= 1) return body(0);
    RunJob(threads,
           {[](const void* function, int thread) { (*static_cast<const Body*>(function))(thread); },
            &body});
  }

  // The number of the calling thread inside Run; 0 outside.
  static int ThreadIndex();

 private:
  struct Job {
    void (*call)(const void* function, int thread) = nullptr;
    const void* function = nullptr;
  };

  struct alignas(64) Worker {
    std::atomic<uint64_t> job{0};  // number of the newest job it takes part in
    WaitingPlace place;
    std::thread thread;
  };

  void RunJob(int threads, Job job);
  void Work(Worker& worker, int thread);
  void Call(int thread);
  void End();

  ProcessMark process_;
  Job job_;                                       // written while no worker has one
  std::vector<std::unique_ptr<Worker>> workers_;  // threads 1 to num_threads() - 1
  std::atomic<bool> is_ending_{false};
  alignas(64) std::atomic<int> num_busy_{0};  // workers that have not done the job
  WaitingPlace all_done_;
  std::mutex error_mutex_;
  std::exception_ptr error_;  // of the job
};

}  // namespace tidal
