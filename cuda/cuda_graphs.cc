// Recording and replay of decode steps: CUDA programming guide, stream capture.
#include "cuda_graphs.h"

#include <algorithm>

#include "common/check.h"

namespace tidal {

void GraphCache::Run(const StepKey& key, const std::function<void()>& step) {
  Entry* entry = Find(key);
  if (entry == nullptr) {
    step();
    Add(key);
    return;
  }
  if (entry->graph == nullptr) entry->graph = Record(step);
  entry->last_use = ++uses_;
  TIDAL_CUDA_CHECK(cudaGraphLaunch(entry->graph, stream_));
}

GraphCache::Entry* GraphCache::Find(const StepKey& key) {
  auto found = std::find_if(entries_.begin(), entries_.end(),
                            [&](const Entry& entry) { return entry.key == key; });
  return found == entries_.end() ? nullptr : &*found;
}

void GraphCache::Add(const StepKey& key) {
  if (entries_.size() == static_cast<size_t>(kMaxGraphs)) {
    auto oldest = std::min_element(
        entries_.begin(), entries_.end(),
        [](const Entry& left, const Entry& right) { return left.last_use < right.last_use; });
    // A graph that is still running is freed when it has ended.
    if (oldest->graph != nullptr) TIDAL_CUDA_CHECK(cudaGraphExecDestroy(oldest->graph));
    entries_.erase(oldest);
  }
  entries_.push_back({key, nullptr, ++uses_});
}

cudaGraphExec_t GraphCache::Record(const std::function<void()>& step) {
  // Thread-local: other threads of the process may allocate meanwhile, this one may not.
  TIDAL_CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  recording_ = true;
  cudaGraph_t graph = nullptr;
  try {
    step();
  } catch (...) {
    recording_ = false;
    cudaStreamEndCapture(stream_, &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();  // of the abandoned recording; the exception tells what happened
    throw;
  }
  recording_ = false;
  TIDAL_CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t executable = nullptr;
  cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  TIDAL_CUDA_CHECK(status);
  return executable;
}

void GraphCache::Forget(PlanId plan) {
  std::erase_if(entries_, [&](const Entry& entry) {
    if (entry.key.plan != plan) return false;
    if (entry.graph != nullptr) cudaGraphExecDestroy(entry.graph);
    return true;
  });
}

void GraphCache::Clear() {
  for (Entry& entry : entries_) {
    if (entry.graph != nullptr) cudaGraphExecDestroy(entry.graph);
  }
  entries_.clear();
}

}  // namespace tidal
