// What a decoder takes of its device's memory, by purpose: planned before anything is allocated,
// and then held.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tidal/config.h"
#include "tidal/weights.h"

namespace tidal {

struct MemoryItem {
  std::string purpose;
  int64_t bytes = 0;
};

struct MemoryPlan {
  std::string device;  // "cpu", "cuda:0"
  int64_t max_seq_len = 0;
  int64_t max_batch_size = 0;

  int64_t weight_bytes = 0;
  int64_t kv_bytes = 0;  // of num_pages pages of page_size tokens
  int64_t num_pages = 0;
  int64_t page_size = 0;
  std::vector<MemoryItem> scratch;  // activations, selection, sampling, ...: each purpose once
  int64_t reserve_bytes = 0;        // left to the device: recorded steps and the code of kernels
  int64_t host_bytes = 0;           // beside the device's: staging of copies, pinned

  // Memory of the device before this decoder took any.
  int64_t device_bytes = 0;
  int64_t free_bytes = 0;
  int64_t usable_bytes = 0;  // what the decoder may take, by DecodeConfig::gpu_memory_utilization

  // Why the plan does not fit: what it needs, what there is and which setting changes it. Empty: it
  // fits.
  std::string problem;

  // On the device. Here as in every field the largest int64 stands for all that is beyond it.
  int64_t scratch_bytes() const;
  int64_t total_bytes() const;
};

// The plan that a Decoder with these arguments would hold. Nothing is loaded or allocated, but a
// GPU is opened; no file of the weights is. Whether it fits is in MemoryPlan::problem. Throws
// ConfigError, InvalidArgument, UnsupportedError, BackendError.
MemoryPlan PlanMemory(const ModelConfig& model, const DecodeConfig& config,
                      const WeightSource& weights);

}  // namespace tidal
