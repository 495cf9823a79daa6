#include "core/process.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "tidal/error.h"

namespace tidal {
namespace {

std::atomic<uint64_t>& Depth() {
  static std::atomic<uint64_t> depth{0};
  return depth;
}

std::atomic<bool>& IsEnding() {
  static std::atomic<bool> is_ending{false};
  return is_ending;
}

// Threads in a ProcessWork.
std::atomic<int>& NumWorking() {
  static std::atomic<int> num_working{0};
  return num_working;
}

}  // namespace

uint64_t ForkDepth() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    ++Depth();
    NumWorking() = 0;  // a child has none of its parent's threads
  });
  static_cast<void>(registered);
  return Depth();
}

void EndProcess() {
  IsEnding() = true;
  while (NumWorking() > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

ProcessWork::ProcessWork() {
  ++NumWorking();
  may_run_ = !IsEnding();
}

ProcessWork::~ProcessWork() {
  --NumWorking();
}

void CheckProcessRuns() {
  TIDAL_CHECK(!IsEnding(), BackendError, "decoder: the process is about to exit");
}

void ProcessMark::Check(const std::string& what) const {
  TIDAL_CHECK(!IsForeign(), UnsupportedError, what,
              ": it belongs to the process that this one was forked from; create a new Decoder "
              "here, or start processes with the method \"spawn\"");
}

}  // namespace tidal
