// Linear through cuBLASLt, which is column-major: row-major out [T, N] = x [T, K] . weight [N, K]^T
// is column-major out [N, T] = weight [K, N]^T . x [K, T], so the weight is cuBLASLt's transposed
// A.
#include "cuda_linear.h"

#include <algorithm>

#include "common/check.h"
#include "kernels/add_bias.h"

namespace tidal {
namespace {

// Prompt chunks come in any length, each with plans of its own; beyond this many start afresh. The
// choice is a function of the shape, so a plan made again is the same plan.
constexpr size_t kMaxPlans = 8192;

// Split-K may only sum in a fixed order and in float32: no rounding of partial sums to 16 bits.
constexpr uint32_t kReductionSchemes =
    CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;

void CheckCublas(cublasStatus_t status, const char* what, const char* file, int line) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw BackendError(Concat("cuBLASLt: ", what, " (", file, ":", line, "): ",
                            cublasLtGetStatusName(status), ": ", cublasLtGetStatusString(status)));
}

// Batch-invariant products of any number of tokens run as those of so many would: one tile after
// the other along the inputs, by one block, whatever the tile's size; so a row's sum is the same.
constexpr int64_t kInvariantTokens = 1024;
constexpr uint32_t kInvariantAlignment = 16;

#define TIDAL_CUBLAS_CHECK(call) CheckCublas((call), #call, __FILE__, __LINE__)

cudaDataType_t CudaType(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return CUDA_R_32F;
    case DType::kBFloat16:
      return CUDA_R_16BF;
    case DType::kFloat16:
      return CUDA_R_16F;
    default:
      throw UnsupportedError(Concat("linear: dtype ", DTypeName(dtype),
                                    " on CUDA; expected bfloat16, float16 or float32 (out only)"));
  }
}

// The largest power of two that divides the address, at most 256: what cuBLASLt distinguishes.
uint32_t AlignmentOf(const void* pointer) {
  auto address = reinterpret_cast<uintptr_t>(pointer);
  return address == 0 ? 256 : static_cast<uint32_t>(std::min<uintptr_t>(address & -address, 256));
}

template <typename T>
void SetProduct(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t name, const T& value) {
  TIDAL_CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(product, name, &value, sizeof(value)));
}

template <typename T>
void SetPreference(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t name,
                   const T& value) {
  TIDAL_CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, name, &value, sizeof(value)));
}

cublasLtHandle_t CreateHandle() {
  cublasLtHandle_t handle = nullptr;
  TIDAL_CUBLAS_CHECK(cublasLtCreate(&handle));
  return handle;
}

cublasLtMatrixLayout_t CreateLayout(DType dtype, int64_t rows, int64_t columns) {
  cublasLtMatrixLayout_t layout = nullptr;
  TIDAL_CUBLAS_CHECK(cublasLtMatrixLayoutCreate(
      &layout, CudaType(dtype), static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), rows));
  return layout;
}

}  // namespace

CudaLinear::CudaLinear(cudaStream_t stream, bool batch_invariant)
    : stream_(stream), batch_invariant_(batch_invariant), handle_(CreateHandle()) {}

std::string CudaLinear::LibraryVersion() {
  size_t version = cublasLtGetVersion();  // major x 10000 + minor x 100 + patch
  return Concat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

void CudaLinear::Run(const LinearArgs& args, void* workspace) {
  Shape shape = ShapeOf(args);
  if (shape.num_tokens == 0) return;
  Plan& plan = PlanFor(shape, args.bias.ptr);
  if (shape.bias_epilogue) {
    SetProduct(plan.product.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias.ptr);
  }
  const float alpha = 1.0f, beta = args.output == LinearOutput::kAccumulate ? 1.0f : 0.0f;
  TIDAL_CUBLAS_CHECK(cublasLtMatmul(
      handle_.get(), plan.product.get(), &alpha, args.weight.data.ptr, plan.weight.get(),
      args.x.ptr, plan.x.get(), &beta, args.out.ptr, plan.out.get(), args.out.ptr, plan.out.get(),
      &plan.algorithm, workspace, static_cast<size_t>(kLinearWorkspaceBytes), stream_));
  if (args.bias && !shape.bias_epilogue) LaunchAddBias(args.bias, args.out, stream_);
}

CudaLinear::Shape CudaLinear::ShapeOf(const LinearArgs& args) {
  Shape shape = {};
  shape.num_tokens = args.x.dim(0);
  shape.num_outputs = args.weight.num_outputs();
  shape.num_inputs = args.weight.num_inputs();
  shape.in = args.x.dtype;
  shape.out = args.out.dtype;
  shape.output = args.output;
  // The epilogue takes a bias of the output's dtype only (cublasLt.h).
  shape.bias_epilogue = args.bias && args.bias.dtype == args.out.dtype;
  shape.weight_alignment = AlignmentOf(args.weight.data.ptr);
  shape.x_alignment = AlignmentOf(args.x.ptr);
  shape.out_alignment = AlignmentOf(args.out.ptr);
  shape.bias_alignment = shape.bias_epilogue ? AlignmentOf(args.bias.ptr) : 0;
  return shape;
}

CudaLinear::Plan& CudaLinear::PlanFor(const Shape& shape, const void* bias) {
  auto found = plans_.find(shape);
  if (found != plans_.end()) return found->second;
  if (plans_.size() >= kMaxPlans) plans_.clear();
  return plans_.emplace(shape, MakePlan(shape, bias)).first->second;
}

CudaLinear::Plan CudaLinear::MakePlan(const Shape& shape, const void* bias) const {
  Plan plan = {};
  cublasLtMatmulDesc_t product = nullptr;
  TIDAL_CUBLAS_CHECK(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  plan.product.reset(product);
  SetProduct(product, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (shape.bias_epilogue) {
    SetProduct(product, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    SetProduct(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  }
  plan.weight.reset(CreateLayout(shape.in, shape.num_inputs, shape.num_outputs));
  plan.x.reset(CreateLayout(shape.in, shape.num_inputs, shape.num_tokens));
  plan.out.reset(CreateLayout(shape.out, shape.num_outputs, shape.num_tokens));
  ChooseAlgorithm(shape, plan);
  return plan;
}

// The algorithm for the plan's shape; of batch-invariant products the one for kInvariantTokens,
// without partial sums, at addresses that suit every pass.
void CudaLinear::ChooseAlgorithm(const Shape& shape, Plan& plan) const {
  cublasLtMatmulPreference_t created = nullptr;
  TIDAL_CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&created));
  Preference preference(created);
  auto alignment = [this](uint32_t of_tensor) {
    return batch_invariant_ ? std::min(of_tensor, kInvariantAlignment) : of_tensor;
  };
  SetPreference(created, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                static_cast<uint64_t>(kLinearWorkspaceBytes));
  SetPreference(created, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                batch_invariant_ ? uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE} : kReductionSchemes);
  SetPreference(created, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                alignment(shape.weight_alignment));
  SetPreference(created, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(shape.x_alignment));
  SetPreference(created, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                alignment(shape.out_alignment));
  SetPreference(created, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                alignment(shape.out_alignment));

  const int64_t num_tokens = batch_invariant_ ? kInvariantTokens : shape.num_tokens;
  const Layout x(CreateLayout(shape.in, shape.num_inputs, num_tokens));
  const Layout out(CreateLayout(shape.out, shape.num_outputs, num_tokens));
  cublasLtMatmulHeuristicResult_t result = {};
  int num_results = 0;
  cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle_.get(), plan.product.get(), plan.weight.get(), x.get(), out.get(), out.get(),
      preference.get(), 1, &result, &num_results);
  TIDAL_CHECK(
      status != CUBLAS_STATUS_NOT_SUPPORTED && (status != CUBLAS_STATUS_SUCCESS || num_results > 0),
      UnsupportedError, "linear: cuBLASLt has no algorithm for ", DTypeName(shape.in), " [",
      shape.num_tokens, ", ", shape.num_inputs, "] x [", shape.num_outputs, ", ", shape.num_inputs,
      "]^T -> ", DTypeName(shape.out), " at addresses aligned to ", shape.x_alignment, ", ",
      shape.weight_alignment, " and ", shape.out_alignment,
      " bytes; use device=\"cpu\" or other shapes");
  TIDAL_CUBLAS_CHECK(status);
  plan.algorithm = result.algo;
}

}  // namespace tidal
