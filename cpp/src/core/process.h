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

// Tells every thread that the process is about to exit.
void EndProcess();

// Throws BackendError after EndProcess().
void CheckProcessRuns();

// Lets go of a pointer without destroying what it owns: for a child that may not touch it.
template <typename Pointer>
void Leak(Pointer& pointer) {
  new Pointer(std::move(pointer));
}

}  // namespace tidal
