// The checks of ops that are several in one: those of the parts, and that one's output is another's
// input.
#include "backend/check_args.h"
#include "backend/op_check.h"

namespace tidal {
namespace {

void CheckSameTensor(const char* op, const char* output, const TensorView& first, const char* input,
                     const TensorView& second) {
  TIDAL_CHECK(first.ptr == second.ptr && first.dim(0) == second.dim(0) &&
                  first.numel() == second.numel() && first.dtype == second.dtype,
              InvalidArgument, op, ": ", input, ": got ", GotShape(second), " ",
              DTypeName(second.dtype), ", expected the same tensor as ", output, ", ",
              GotShape(first), " ", DTypeName(first.dtype));
}

}  // namespace

void Check(const NormLinearArgs& args, std::optional<DType> act) {
  Check(args.norm, act);
  Check(args.linear, act);
  CheckSameTensor("NormLinear", "norm.out", args.norm.out, "linear.x", args.linear.x);
}

void Check(const QkvRopeAppendArgs& args, std::optional<DType> act) {
  Check(NormLinearArgs{args.norm, args.linear}, act);
  Check(args.append, act);
  CheckSameTensor("QkvRopeAppend", "linear.out", args.linear.out, "append.qkv", args.append.qkv);
}

void Check(const GateUpMulArgs& args, std::optional<DType> act) {
  if (args.norm.x) {
    Check(NormLinearArgs{args.norm, args.linear}, act);
  } else {
    Check(args.linear, act);
  }
  Check(args.gate_mul, act);
  CheckSameTensor("GateUpMul", "linear.out", args.linear.out, "gate_mul.gate_up",
                  args.gate_mul.gate_up);
}

void Check(const ExpertMlpArgs& args, std::optional<DType> act) {
  Check(args.select, act);
  Check(args.gate_up, act);
  Check(args.gate_mul, act);
  Check(args.down, act);
  Check(args.add, act);
  auto same = [](const char* output, const TensorView& first, const char* input,
                 const TensorView& second) {
    CheckSameTensor("ExpertMlp", output, first, input, second);
  };
  const TensorView& ids = args.select.expert_ids;
  same("select.expert_ids", ids, "gate_up.expert_ids", args.gate_up.expert_ids);
  same("gate_up.out", args.gate_up.out, "gate_mul.gate_up", args.gate_mul.gate_up);
  same("gate_mul.out", args.gate_mul.out, "down.x", args.down.x);
  same("select.expert_ids", ids, "down.expert_ids", args.down.expert_ids);
  same("down.out", args.down.out, "add.x", args.add.x);
  same("select.weights", args.select.weights, "add.weights", args.add.weights);
}

void Check(const AppendShadowScoreKeysArgs& args, std::optional<DType> act) {
  Check(args.append, act);
  Check(args.score, act);
  CheckSameTensor("AppendShadowScoreKeys", "append.shadow.codes", args.append.shadow.codes,
                  "score.shadow.codes", args.score.shadow.codes);
  OpCheck op("AppendShadowScoreKeys", act);
  Dim batch{"B", args.score.q.dim(0)};
  op.Tensor("append.positions", args.append.positions, {&batch}, op.int32());
}

}  // namespace tidal
