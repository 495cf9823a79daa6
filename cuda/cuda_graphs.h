// Decode steps as CUDA graphs: run, then recorded, then replayed with one launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "backend/backend.h"

namespace tidal {

// The first run of a key is eager, so that everything lazy (kernel loading, the choice of matrix
// algorithms, growing scratch) is done; the second records a graph; later ones replay it.
class GraphCache {
 public:
  // More than the batch sizes times plans of most decoders; those of others push each other out,
  // the one that has waited longest first.
  static constexpr int64_t kMaxGraphs = 128;

  explicit GraphCache(cudaStream_t stream) : stream_(stream) {}
  ~GraphCache() { Clear(); }
  GraphCache(const GraphCache&) = delete;
  GraphCache& operator=(const GraphCache&) = delete;

  void Run(const StepKey& key, const std::function<void()>& step);

  // Whether ops are being recorded: nothing may be allocated, copied from the host or waited for.
  bool recording() const { return recording_; }

  // Forgets the graphs of one plan.
  void Forget(PlanId plan);

  // Forgets all graphs; needed when memory that they point to moves.
  void Clear();

 private:
  struct Entry {
    StepKey key;
    cudaGraphExec_t graph = nullptr;  // null until recorded
    int64_t last_use = 0;
  };

  Entry* Find(const StepKey& key);
  void Add(const StepKey& key);
  cudaGraphExec_t Record(const std::function<void()>& step);

  cudaStream_t stream_;
  bool recording_ = false;
  int64_t uses_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace tidal
