// The matrix products of a layer, with what stands before and behind them: few tokens by kernels
// that stream the weight (kernels/skinny_linear.h), many by cuBLASLt (cuda_linear.h).
#include <algorithm>

#include "backend/check_args.h"
#include "common/dispatch.h"
#include "cuda_backend.h"
#include "cuda_dtypes.h"
#include "kernels/decode_weight.h"
#include "kernels/folded_norm.h"
#include "kernels/gate_mul.h"
#include "kernels/rms_norm.h"
#include "kernels/round_inputs.h"

namespace tidal {
namespace {

// Up to so many tokens streaming is the faster way (H200, docs/performance.md).
constexpr int64_t kMaxStreamedTokens = 16;
// Up to so many a weight in codes is streamed once for every 16 of them; more are worth decoding it
// first (H200, docs/performance.md).
constexpr int64_t kMaxTokensInParts = 32;

void CheckLinearDTypes(const LinearArgs& linear) {
  if (linear.weight.is_coded()) {
    TIDAL_CHECK(linear.weight.codes != WeightCodes::kMxfp4, UnsupportedError,
                "linear: a weight in MXFP4 on CUDA; expected other codes, numbers or a product "
                "with experts (or use device=\"cpu\")");
    CheckSameDType("linear", {&linear.x, &linear.bias});
  } else {
    CheckSameDType("linear", {&linear.x, &linear.weight.data, &linear.bias});
  }
}

LinearArgs TokensOf(const LinearArgs& linear, int64_t first, int64_t count) {
  LinearArgs part = linear;
  part.x = linear.x.Rows(first, count);
  part.out = linear.out.Rows(first, count);
  return part;
}

}  // namespace

// In batch-invariant steps all products are streamed that can be, since those of cuBLASLt add up in
// another order.
bool CudaBackend::Streams(const LinearArgs& linear) const {
  if (linear.quantizes_inputs) return false;
  if (!StreamsLinear(linear) || linear.x.dim(0) > MaxStreamedTokens(linear.weight)) return false;
  if (batch_invariant_) return in_step_;
  return linear.x.dim(0) <= kMaxStreamedTokens;
}

bool CudaBackend::ReadsCodes(const Weight& weight) const {
  UseDevice();
  return StreamsWeight(weight);
}

void* CudaBackend::LinearWorkspace() {
  return Grow(linear_workspace_, kLinearWorkspaceBytes, kProductsPurpose);
}

SkinnyRun CudaBackend::NewRun() const {
  return {.in_one_order = batch_invariant_, .num_sms = num_sms_, .stream = stream()};
}

// The norm that a kernel makes for a weight in codes adds squares in another order than the one in
// front of it.
SkinnyRun CudaBackend::NormBefore(const LinearArgs& linear, const RmsNormArgs& norm) {
  CheckNormDType("rms_norm", norm.out, norm.weight);
  CheckLinearDTypes(linear);
  SkinnyRun run = NewRun();
  if (!Streams(linear)) {
    LaunchRmsNorm(norm, LaunchNext::kAfterWait, stream());
  } else if (linear.output != LinearOutput::kStore || !FoldsNorm(norm)) {
    LaunchRmsNorm(norm, LaunchNext::kAtOnce, stream());
  } else if (FitsNorm(norm, linear.weight) && !(batch_invariant_ && linear.weight.is_coded())) {
    run.norm = &norm;
  } else {
    auto* scales = static_cast<float*>(LinearWorkspace());
    LaunchFoldedNorm(norm, scales, stream());
    run.scales = scales;
  }
  return run;
}

void CudaBackend::LinearAfter(const SkinnyRun& run, const LinearArgs& linear) {
  if (linear.quantizes_inputs) {
    QuantizedLinear(run, linear);
  } else if (Streams(linear)) {
    LaunchSkinnyLinear(linear, run);
  } else if (linear.weight.is_coded()) {
    CodedLinear(run, linear);
  } else {
    linear_.Run(linear, LinearWorkspace());
  }
}

// Multiplies more tokens than the kernels take at once: in parts, or by the decoded weight. One
// larger than those of the layers (lm_head) is not decoded: few tokens of a prompt ask for logits.
void CudaBackend::CodedLinear(const SkinnyRun& run, const LinearArgs& linear) {
  const Weight& weight = linear.weight;
  const int64_t num_tokens = linear.x.dim(0);
  const int64_t bytes = weight.num_outputs() * weight.num_inputs() * DTypeBytes(linear.x.dtype);
  // Batch-invariant steps stream whatever comes, and prompts are decoded for, however short.
  const bool is_much = batch_invariant_ ? !in_step_ : num_tokens > kMaxTokensInParts;
  const bool decodes = is_much && bytes <= decoded_weight_.bytes();
  if (decodes || !StreamsLinear(linear)) {
    LinearArgs plain = linear;
    plain.weight = TensorView(Grow(decoded_weight_, bytes, kDecodedPurpose), linear.x.dtype,
                              {weight.num_outputs(), weight.num_inputs()});
    LaunchDecodeWeight(weight, plain.weight.data, stream());
    linear_.Run(plain, LinearWorkspace());
    return;
  }
  const int64_t most = MaxStreamedTokens(weight);
  for (int64_t first = 0; first < num_tokens; first += most) {
    LaunchSkinnyLinear(TokensOf(linear, first, std::min(most, num_tokens - first)), run);
  }
}

// Codes times codes, where cuBLASLt takes them, and as far; the product of what the codes stand for
// for the rest. Few tokens are the rest: streaming is faster.
void CudaBackend::QuantizedLinear(const SkinnyRun& run, const LinearArgs& linear) {
  const int64_t num_tokens = linear.x.dim(0);
  const bool is_grouped = linear.weight.group_size < linear.weight.num_inputs();
  const bool is_much = batch_invariant_ || num_tokens > kMaxTokensInParts;
  int64_t coded = is_much ? num_tokens : 0;
  if (is_grouped) coded -= coded % kScaledTokens;
  if (coded > 0 && !MultipliedCodes(TokensOf(linear, 0, coded))) coded = 0;
  if (coded == num_tokens) return;
  LinearArgs rest = TokensOf(linear, coded, num_tokens - coded);
  const int64_t bytes = QuantizedInputsBytes(rest.x.dim(0), rest.x.dim(1));
  const TensorView numbers(Grow(quantized_inputs_, bytes, kQuantizedPurpose), rest.x.dtype,
                           {rest.x.dim(0), rest.x.dim(1)});
  LaunchRoundInputs(rest, numbers, stream());
  rest.x = numbers;
  rest.quantizes_inputs = false;
  LinearAfter(run, rest);
}

// Returns whether it could.
bool CudaBackend::MultipliedCodes(const LinearArgs& linear) {
  const int64_t num_tokens = linear.x.dim(0), num_inputs = linear.x.dim(1);
  auto* memory = static_cast<char*>(
      Grow(quantized_inputs_, QuantizedInputsBytes(num_tokens, num_inputs), kQuantizedPurpose));
  const int64_t codes_bytes = CeilDiv(num_tokens * num_inputs, kScalesAlignment) * kScalesAlignment;
  const CodedInputs x = {memory, reinterpret_cast<float*>(memory + codes_bytes)};
  if (!linear_.TakesCodes(linear, x)) return false;
  LaunchEncodeInputs(linear, x, stream());
  linear_.RunCodes(linear, x, LinearWorkspace());
  return true;
}

void CudaBackend::Linear(const LinearArgs& args) {
  Enter();
  Check(args);
  CheckLinearDTypes(args);
  LinearAfter(NewRun(), args);
}

void CudaBackend::NormLinear(const NormLinearArgs& args) {
  Enter();
  Check(args);
  LinearAfter(NormBefore(args.linear, args.norm), args.linear);
}

void CudaBackend::QkvRopeAppend(const QkvRopeAppendArgs& args) {
  Enter();
  Check(args);
  CheckSameDType("qkv_rope_append", {&args.linear.x, &args.append.q});
  CheckCacheDType("qkv_rope_append", args.append.q, args.append.kv);
  SkinnyRun run = NormBefore(args.linear, args.norm);
  if (!Streams(args.linear) || !StreamsLinearRopeAppend(args.linear, args.append)) {
    LinearAfter(run, args.linear);
    RopeAppendKv(args.append);
    return;
  }
  LaunchLinearRopeAppend(args.linear, args.append, run);
  AllowEarlyReads(args.append.appended == Appended::kNewestOfEachRow);
}

void CudaBackend::GateUpMul(const GateUpMulArgs& args) {
  Enter();
  Check(args);
  CheckSameDType("gate_up_mul", {&args.linear.x, &args.gate_mul.out});
  CheckLinearDTypes(args.linear);
  SkinnyRun run = args.norm.x ? NormBefore(args.linear, args.norm) : NewRun();
  if (!Streams(args.linear) || !StreamsLinearGateMul(args.linear, args.gate_mul)) {
    LinearAfter(run, args.linear);
    GateMul(args.gate_mul);
    return;
  }
  LaunchLinearGateMul(args.linear, args.gate_mul, run);
}

}  // namespace tidal
