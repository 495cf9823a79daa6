// Linear through cuBLASLt, which is column-major: row-major out [T, N] = x [T, K] . weight [N, K]^T
// is column-major out [N, T] = weight [K, N]^T . x [K, T], so the weight is cuBLASLt's transposed
// A. That is also the one form in which it multiplies float8.
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

// What products of float8 ask of addresses and sizes: bytes, and codes.
constexpr uint32_t kCodesAlignment = 16;
constexpr int64_t kScaledGroup = 128;  // inputs that share a scale, where not all of a token do

#define TIDAL_CUBLAS_CHECK(call) CheckCublas((call), #call, __FILE__, __LINE__)

cudaDataType_t CudaType(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return CUDA_R_32F;
    case DType::kBFloat16:
      return CUDA_R_16BF;
    case DType::kFloat16:
      return CUDA_R_16F;
    case DType::kFloat8:
      return CUDA_R_8F_E4M3;
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

// Scales of rows, or of groups of their codes, came with CUDA 12.9.
#if CUBLAS_VERSION >= 120900
constexpr bool kHasScaleModes = true;

void SetScaleModes(cublasLtMatmulDesc_t product, bool are_of_rows) {
  const int32_t mode = are_of_rows ? CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F
                                   : CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
  SetProduct(product, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode);
  SetProduct(product, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode);
}
#else
constexpr bool kHasScaleModes = false;

void SetScaleModes(cublasLtMatmulDesc_t, bool) {}
#endif

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
  if (args.x.dim(0) == 0) return;
  const Operands operands = OperandsOf(args);
  const Shape shape = ShapeOf(args, operands);
  Plan& plan = PlanFor(shape, operands);
  TIDAL_CHECK(plan.status != CUBLAS_STATUS_NOT_SUPPORTED, UnsupportedError,
              "linear: cuBLASLt has no algorithm for ", DTypeName(shape.in), " [", shape.num_tokens,
              ", ", shape.num_inputs, "] x [", shape.num_outputs, ", ", shape.num_inputs, "]^T -> ",
              DTypeName(shape.out), " at addresses aligned to ", shape.x_alignment, ", ",
              shape.weight_alignment, " and ", shape.out_alignment,
              " bytes; use device=\"cpu\" or other shapes");
  TIDAL_CUBLAS_CHECK(plan.status);
  Multiply(args, operands, plan, workspace);
}

bool CudaLinear::TakesCodes(const LinearArgs& args, const CodedInputs& x) {
  const Weight& weight = args.weight;
  const int64_t inputs = weight.num_inputs(), group = weight.group_size;
  const bool is_grouped = group != inputs;
  if (!kHasScaleModes || weight.codes != WeightCodes::kFloat8) return false;
  if (weight.scales.dtype != DType::kFloat32 || weight.group_stride > 0) return false;
  if (inputs % kCodesAlignment != 0 || weight.num_outputs() % kCodesAlignment != 0) return false;
  if (is_grouped && (group != kScaledGroup || inputs % kScaledGroup != 0)) return false;
  // The scales of groups ask for whole fours of tokens, whichever they are.
  if (is_grouped && (batch_invariant_ || args.x.dim(0) % kScaledTokens != 0)) return false;
  const Operands operands = OperandsOf(args, x);
  for (const void* address : {operands.weight, operands.x, operands.weight_scales,
                              operands.x_scales, static_cast<const void*>(args.out.ptr)}) {
    if (AlignmentOf(address) < kCodesAlignment) return false;
  }
  return PlanFor(ShapeOf(args, operands), operands).status == CUBLAS_STATUS_SUCCESS;
}

void CudaLinear::RunCodes(const LinearArgs& args, const CodedInputs& x, void* workspace) {
  const Operands operands = OperandsOf(args, x);
  Multiply(args, operands, PlanFor(ShapeOf(args, operands), operands), workspace);
}

void CudaLinear::Multiply(const LinearArgs& args, const Operands& operands, const Plan& plan,
                          void* workspace) {
  SetOperands(operands, plan);
  const float alpha = 1.0f, beta = args.output == LinearOutput::kAccumulate ? 1.0f : 0.0f;
  TIDAL_CUBLAS_CHECK(cublasLtMatmul(
      handle_.get(), plan.product.get(), &alpha, operands.weight, plan.weight.get(), operands.x,
      plan.x.get(), &beta, args.out.ptr, plan.out.get(), args.out.ptr, plan.out.get(),
      &plan.algorithm, workspace, static_cast<size_t>(kLinearWorkspaceBytes), stream_));
  if (args.bias && operands.bias == nullptr) LaunchAddBias(args.bias, args.out, stream_);
}

CudaLinear::Operands CudaLinear::OperandsOf(const LinearArgs& args) {
  Operands operands = {};
  operands.weight = args.weight.data.ptr;
  operands.x = args.x.ptr;
  // The epilogue takes a bias of the output's dtype only (cublasLt.h).
  if (args.bias && args.bias.dtype == args.out.dtype) operands.bias = args.bias.ptr;
  return operands;
}

CudaLinear::Operands CudaLinear::OperandsOf(const LinearArgs& args, const CodedInputs& x) {
  Operands operands = OperandsOf(args);
  operands.x = x.codes;
  operands.weight_scales = args.weight.scales.ptr;
  operands.x_scales = x.scales;
  return operands;
}

CudaLinear::Shape CudaLinear::ShapeOf(const LinearArgs& args, const Operands& operands) {
  const bool is_coded = operands.x_scales != nullptr;
  Shape shape = {};
  shape.num_tokens = args.x.dim(0);
  shape.num_outputs = args.weight.num_outputs();
  shape.num_inputs = args.weight.num_inputs();
  shape.in = is_coded ? DType::kFloat8 : args.x.dtype;
  shape.out = args.out.dtype;
  shape.output = args.output;
  shape.group_size = is_coded ? args.weight.group_size : 0;
  shape.bias_epilogue = operands.bias != nullptr;
  shape.weight_alignment = AlignmentOf(operands.weight);
  shape.x_alignment = AlignmentOf(operands.x);
  shape.out_alignment = AlignmentOf(args.out.ptr);
  shape.bias_alignment = shape.bias_epilogue ? AlignmentOf(operands.bias) : 0;
  return shape;
}

CudaLinear::Plan& CudaLinear::PlanFor(const Shape& shape, const Operands& operands) {
  auto found = plans_.find(shape);
  if (found != plans_.end()) return found->second;
  if (plans_.size() >= kMaxPlans) plans_.clear();
  return plans_.emplace(shape, MakePlan(shape, operands)).first->second;
}

void CudaLinear::SetOperands(const Operands& operands, const Plan& plan) {
  cublasLtMatmulDesc_t product = plan.product.get();
  if (operands.bias != nullptr) {
    SetProduct(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, operands.bias);
  }
  if (operands.x_scales != nullptr) {
    SetProduct(product, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, operands.weight_scales);
    SetProduct(product, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, operands.x_scales);
  }
}

CudaLinear::Plan CudaLinear::MakePlan(const Shape& shape, const Operands& operands) const {
  Plan plan = {};
  cublasLtMatmulDesc_t product = nullptr;
  TIDAL_CUBLAS_CHECK(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  plan.product.reset(product);
  SetProduct(product, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (shape.bias_epilogue) {
    SetProduct(product, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
  }
  if (shape.group_size > 0) SetScaleModes(product, shape.group_size == shape.num_inputs);
  SetOperands(operands, plan);
  plan.weight.reset(CreateLayout(shape.in, shape.num_inputs, shape.num_outputs));
  plan.x.reset(CreateLayout(shape.in, shape.num_inputs, shape.num_tokens));
  plan.out.reset(CreateLayout(shape.out, shape.num_outputs, shape.num_tokens));
  ChooseAlgorithm(shape, plan);
  return plan;
}

// Looks for the algorithm for the plan's shape; of batch-invariant products the one for
// kInvariantTokens, without partial sums, at addresses that suit every pass.
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
  plan.status = cublasLtMatmulAlgoGetHeuristic(handle_.get(), plan.product.get(), plan.weight.get(),
                                               x.get(), out.get(), out.get(), preference.get(), 1,
                                               &result, &num_results);
  if (plan.status == CUBLAS_STATUS_SUCCESS && num_results == 0) {
    plan.status = CUBLAS_STATUS_NOT_SUPPORTED;
  }
  plan.algorithm = result.algo;
}

}  // namespace tidal
