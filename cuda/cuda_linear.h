// Linear on the GPU: cuBLASLt matrix products, 16-bit or float8 in, float32 sums, 16-bit or float32
// out.
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
#include "kernels/round_inputs.h"

namespace tidal {

// NVIDIA's recommendation for Hopper (cuBLAS guide, 2.1.8).
inline constexpr int64_t kLinearWorkspaceBytes = 32 << 20;

inline constexpr int64_t kScaledTokens = 4;

class CudaLinear {
 public:
  // batch_invariant: a row's results do not depend on the number of rows.
  CudaLinear(cudaStream_t stream, bool batch_invariant);

  // Queues the product. Deterministic: the same shapes, alignments and contents give the same bits.
  // `workspace`: device memory of kLinearWorkspaceBytes.
  void Run(const LinearArgs& args, void* workspace);

  // Whether RunCodes does a product of float8 codes, those of the weight and `x` in place of
  // args.x. With scales of groups that asks for a multiple of kScaledTokens tokens.
  bool TakesCodes(const LinearArgs& args, const CodedInputs& x);
  void RunCodes(const LinearArgs& args, const CodedInputs& x, void* workspace);

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
    int64_t group_size;  // of codes, that have a scale; 0: of numbers
    bool bias_epilogue;
    // What the addresses are multiples of, in bytes, at most 256.
    uint32_t weight_alignment, x_alignment, out_alignment, bias_alignment;
    auto operator<=>(const Shape&) const = default;
  };
  struct Plan {
    Product product;
    Layout weight, x, out;
    cublasLtMatmulAlgo_t algorithm;
    cublasStatus_t status;  // of the choice; anything but success: there is none
  };
  // Addresses that differ from one product of a shape to the next.
  struct Operands {
    const void* weight;
    const void* x;
    const void* bias;  // null: none, or not in the epilogue
    // For codes, float32; else null.
    const void* weight_scales;
    const void* x_scales;
  };

  static Operands OperandsOf(const LinearArgs& args);
  static Operands OperandsOf(const LinearArgs& args, const CodedInputs& x);
  static Shape ShapeOf(const LinearArgs& args, const Operands& operands);
  Plan& PlanFor(const Shape& shape, const Operands& operands);
  Plan MakePlan(const Shape& shape, const Operands& operands) const;
  static void SetOperands(const Operands& operands, const Plan& plan);
  void ChooseAlgorithm(const Shape& shape, Plan& plan) const;
  void Multiply(const LinearArgs& args, const Operands& operands, const Plan& plan,
                void* workspace);

  cudaStream_t stream_;
  bool batch_invariant_;
  Handle handle_;
  std::map<Shape, Plan> plans_;
};

}  // namespace tidal
