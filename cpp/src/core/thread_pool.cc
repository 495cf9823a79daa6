#include "core/thread_pool.h"

#include <chrono>
#include <system_error>
#include <utility>

#include "tidal/error.h"

namespace tidal {
namespace {

thread_local int this_thread_index = 0;

}  // namespace

int64_t WaitingPlace::NowNs() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

void WaitingPlace::Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

ThreadPool::ThreadPool(int num_threads) {
  try {
    for (int thread = 1; thread < num_threads; ++thread) {
      Worker& worker = *workers_.emplace_back(std::make_unique<Worker>());
      worker.thread = std::thread([this, &worker, thread] { Work(worker, thread); });
    }
  } catch (const std::system_error& error) {
    End();
    throw OutOfMemoryError(Concat("num_threads: got ", num_threads, ", but the system gives only ",
                                  workers_.size(), " (", error.code().message(),
                                  "); lower num_threads, or raise the limit of processes"));
  } catch (...) {
    End();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (process_.IsForeign()) {
    Leak(workers_);  // their threads are not here
  } else {
    End();
  }
}

void ThreadPool::End() {
  is_ending_ = true;
  for (const std::unique_ptr<Worker>& worker : workers_) {
    worker->place.Wake();
    if (worker->thread.joinable()) worker->thread.join();
  }
}

int ThreadPool::ThreadIndex() {
  return this_thread_index;
}

void ThreadPool::RunJob(int threads, Job job) {
  process_.Check("decoder");
  job_ = job;
  num_busy_ = threads - 1;
  for (int thread = 1; thread < threads; ++thread) {
    Worker& worker = *workers_[static_cast<size_t>(thread - 1)];
    ++worker.job;
    worker.place.Wake();
  }
  Call(0);
  all_done_.Wait([&] { return num_busy_ == 0; });
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::Call(int thread) {
  try {
    job_.call(job_.function, thread);
  } catch (...) {
    std::lock_guard lock(error_mutex_);
    error_ = std::current_exception();
  }
}

void ThreadPool::Work(Worker& worker, int thread) {
  this_thread_index = thread;
  for (uint64_t done = 0;; ++done) {
    worker.place.Wait([&] { return worker.job != done || is_ending_; });
    if (worker.job == done) return;
    Call(thread);
    if (--num_busy_ == 0) all_done_.Wake();
  }
}

}  // namespace tidal
