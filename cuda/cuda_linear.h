// Linear on the GPU: cuBLASLt matrix products, 16-bit in, float32 sums, 16-bit or float32 out.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <type_traits>

#include "backend/op_args.h"

namespace tidal {

// NVIDIA's recommendation for Hopper (cuBLAS guide, 2.1.8).
inline constexpr int64_t kLinearWorkspaceBytes = 32 << 20;

class CudaLinear {
 public:
  // batch_invariant: a row's results do not depend on the number of rows.
  CudaLinear(cudaStream_t stream, bool batch_invariant);

  // Queues the product. Deterministic: the same shapes, alignments and contents give the same bits.
  // `workspace`: device memory of kLinearWorkspaceBytes.
  void Run(const LinearArgs& args, void* workspace);

  static std::string LibraryVersion();  // "13.1.0"

 private:
  template <auto kDestroy>
  struct Deleter {
    template <typename T>
    void operator()(T* object) const {
      kDestroy(object);
    }
  };
  template <typename T, auto kDestroy>
  using Owned = std::unique_ptr<std::remove_pointer_t<T>, Deleter<kDestroy>>;
  using Handle = Owned<cublasLtHandle_t, cublasLtDestroy>;
  using Product = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
  using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
  using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

  // All that the choice of an algorithm may depend on.
  struct Shape {
    int64_t num_tokens, num_outputs, num_inputs;
    DType in, out;
    LinearOutput output;
    bool bias_epilogue;
    // What the addresses are multiples of, in bytes, at most 256.
    uint32_t weight_alignment, x_alignment, out_alignment, bias_alignment;
    auto operator<=>(const Shape&) const = default;
  };
  struct Plan {
    Product product;
    Layout weight, x, out;
    cublasLtMatmulAlgo_t algorithm;
  };

  static Shape ShapeOf(const LinearArgs& args);
  Plan& PlanFor(const Shape& shape, const void* bias);
  Plan MakePlan(const Shape& shape, const void* bias) const;
  void ChooseAlgorithm(const Shape& shape, Plan& plan) const;

  cudaStream_t stream_;
  bool batch_invariant_;
  Handle handle_;
  std::map<Shape, Plan> plans_;
};

}  // namespace tidal
