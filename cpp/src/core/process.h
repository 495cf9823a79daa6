// Which process an object belongs to. A child made by fork() has the memory of its parent but none
// of its threads: what they held is held for ever.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace tidal {

// Forks between the first use of this function and the calling process.
uint64_t ForkDepth();

// The process that an object was made in.
class ProcessMark {
 public:
  // True in a child forked since.
  bool IsForeign() const { return depth_ != ForkDepth(); }

  // Throws UnsupportedError in a child forked since; `what` names the object.
  void Check(const std::string& what) const;

 private:
  uint64_t depth_ = ForkDepth();
};

// Tells every thread that the process is about to exit, and waits for those that are at work.
void EndProcess();

// A stretch of work of a thread that serves no call. Whether it may begin, ask may_run().
class ProcessWork {
 public:
  ProcessWork();
  ~ProcessWork();
  ProcessWork(const ProcessWork&) = delete;
  ProcessWork& operator=(const ProcessWork&) = delete;

  // False once the process ends.
  bool may_run() const { return may_run_; }

 private:
  bool may_run_;
};

// Throws BackendError after EndProcess().
void CheckProcessRuns();

// Lets go of a pointer without destroying what it owns: for a child that may not touch it.
template <typename Pointer>
void Leak(Pointer& pointer) {
  new Pointer(std::move(pointer));
}

}  // namespace tidal
