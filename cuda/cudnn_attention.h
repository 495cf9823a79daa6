// AttentionPrefill by cuDNN, where that is installed: scaled dot product attention of packed
// queries over the paged cache. libcudnn.so.9 is opened at run time and nothing links it; without
// it, or built without its headers (cudnn_attention_off.cc), every call says no and why.
#pragma once

#include <cuda_runtime.h>

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "backend/op_args.h"
#include "core/buffer.h"
#include "kernels/row_extents.h"

namespace tidal {

// All that a plan depends on. cuDNN takes a plan's own time, some 100 ms, to make one.
struct CudnnAttentionShape {
  DType dtype;
  int64_t batch_size;
  int64_t max_q_len;  // on the queries of a row
  int64_t num_q_heads, num_kv_heads, head_dim;
  int64_t num_pages, page_size;
  int64_t max_pages;  // of a row
  auto operator<=>(const CudnnAttentionShape&) const = default;
};

class CudnnAttention {
 public:
  CudnnAttention(int device, cudaStream_t stream);
  ~CudnnAttention();

  static std::string LibraryVersion();  // "9.28.1"; empty if cuDNN cannot be used
  static std::string LibraryProblem();  // why it cannot; else empty

  // Makes the plan for all passes of up to shape.max_q_len queries a row. Outside of a recorded
  // step, as Run may only be called there.
  void Prepare(const CudnnAttentionShape& shape);

  // Queues the op. Returns false with the reason in problem() if cuDNN does not do it.
  bool Run(const AttentionPrefillArgs& args);

  // What kept the last Run or Prepare from working; empty if it did.
  const std::string& problem() const { return problem_; }

 private:
  struct Library;  // cuDNN's handle
  struct Plan;

  CudnnAttentionShape ShapeOf(const AttentionPrefillArgs& args) const;
  Plan& PlanFor(const CudnnAttentionShape& shape);
  std::unique_ptr<Plan> MakePlan(const CudnnAttentionShape& shape);
  RowExtents ExtentsOf(int64_t batch_size) const;
  void Grow(Buffer& buffer, int64_t bytes, const char* what);

  int device_;
  cudaStream_t stream_;
  std::string problem_;
  int64_t prepared_q_len_ = 0;
  std::unique_ptr<Library> library_;  // opened when the first plan is asked for
  std::map<CudnnAttentionShape, std::unique_ptr<Plan>> plans_;
  Buffer workspace_;
  Buffer extents_;  // of RowExtents
};

}  // namespace tidal
