#include "core/process.h"

#include <pthread.h>

#include <atomic>

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

}  // namespace

uint64_t ForkDepth() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { ++Depth(); });
  static_cast<void>(registered);
  return Depth();
}

void EndProcess() {
  IsEnding() = true;
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
