// FairMutex: a mutex that threads get in the order in which they asked for it. With std::mutex a
// thread that decodes step after step may keep the engine from one that wants to stop it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace tidal {

class FairMutex {
 public:
  void lock() {
    std::unique_lock guard(mutex_);
    const uint64_t ticket = next_++;
    changed_.wait(guard, [&] { return serving_ == ticket; });
  }

  // Fails if another thread has it or asked for it before.
  bool try_lock() {
    std::lock_guard guard(mutex_);
    if (serving_ != next_) return false;
    ++next_;
    return true;
  }

  void unlock() {
    std::lock_guard guard(mutex_);
    ++serving_;
    if (serving_ != next_) changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t next_ = 0;
  uint64_t serving_ = 0;
};

}  // namespace tidal
