// The matrix products of a layer, with what stands before and behind them: few tokens by kernels
// that stream the weight (kernels/skinny_linear.h), many by cuBLASLt (cuda_linear.h).
#include "backend/check_args.h"
#include "cuda_backend.h"
#include "cuda_dtypes.h"
#include "kernels/folded_norm.h"
#include "kernels/rms_norm.h"
#include "kernels/silu_mul.h"

namespace tidal {
namespace {

// Up to so many tokens streaming is the faster way (H200, docs/performance.md).
constexpr int64_t kMaxStreamedTokens = 16;

}  // namespace

// In batch-invariant steps all products are streamed that can be, since those of cuBLASLt add up in
// another order.
bool CudaBackend::Streams(const LinearArgs& linear) const {
  if (!StreamsLinear(linear)) return false;
  if (batch_invariant_) return in_step_;
  return linear.x.dim(0) <= kMaxStreamedTokens;
}

void* CudaBackend::LinearWorkspace() {
  return Grow(linear_workspace_, kLinearWorkspaceBytes, kProductsPurpose);
}

SkinnyRun CudaBackend::NormBefore(const LinearArgs& linear, const RmsNormArgs& norm) {
  CheckSameDType("rms_norm", {&norm.out, &norm.weight});
  CheckSameDType("linear", {&linear.x, &linear.weight, &linear.bias});
  SkinnyRun run = {.num_sms = num_sms_, .stream = stream()};
  if (!Streams(linear)) {
    LaunchRmsNorm(norm, LaunchNext::kAfterWait, stream());
  } else if (linear.output != LinearOutput::kStore || !FoldsNorm(norm)) {
    LaunchRmsNorm(norm, LaunchNext::kAtOnce, stream());
  } else if (FitsNorm(norm)) {
    run.norm = &norm;
  } else {
    auto* scales = static_cast<float*>(LinearWorkspace());
    LaunchFoldedNorm(norm, scales, stream());
    run.scales = scales;
  }
  return run;
}

void CudaBackend::LinearAfter(const SkinnyRun& run, const LinearArgs& linear) {
  if (Streams(linear)) {
    LaunchSkinnyLinear(linear, run);
  } else {
    linear_.Run(linear, LinearWorkspace());
  }
}

void CudaBackend::Linear(const LinearArgs& args) {
  Enter();
  Check(args);
  CheckSameDType("linear", {&args.x, &args.weight, &args.bias});
  LinearAfter({.num_sms = num_sms_, .stream = stream()}, args);
}

void CudaBackend::NormLinear(const NormLinearArgs& args) {
  Enter();
  Check(args);
  LinearAfter(NormBefore(args.linear, args.norm), args.linear);
}

void CudaBackend::QkvRopeAppend(const QkvRopeAppendArgs& args) {
  Enter();
  Check(args);
  CheckSameDType("qkv_rope_append", {&args.linear.weight, &args.append.q, &args.append.kv.k_pages,
                                     &args.append.kv.v_pages});
  SkinnyRun run = NormBefore(args.linear, args.norm);
  if (!Streams(args.linear) || !StreamsLinearRopeAppend(args.linear, args.append)) {
    LinearAfter(run, args.linear);
    RopeAppendKv(args.append);
    return;
  }
  LaunchLinearRopeAppend(args.linear, args.append, run);
  AllowEarlyReads(args.append.q.dim(0) == args.append.kv.seq_lens.dim(0));
}

void CudaBackend::GateUpSiluMul(const GateUpSiluMulArgs& args) {
  Enter();
  Check(args);
  CheckSameDType("gate_up_silu_mul", {&args.linear.weight, &args.silu_mul.out});
  SkinnyRun run = NormBefore(args.linear, args.norm);
  if (!Streams(args.linear) || !StreamsLinearSiluMul(args.linear, args.silu_mul)) {
    LinearAfter(run, args.linear);
    SiluMul(args.silu_mul);
    return;
  }
  LaunchLinearSiluMul(args.linear, args.silu_mul, run);
}

}  // namespace tidal
