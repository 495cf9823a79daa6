// The ops that are several in one, part by part.
#include "backend/backend.h"

#include "backend/check_args.h"

namespace tidal {

void Backend::NormLinear(const NormLinearArgs& args) {
  Check(args);
  RmsNorm(args.norm);
  Linear(args.linear);
}

void Backend::QkvRopeAppend(const QkvRopeAppendArgs& args) {
  Check(args);
  RmsNorm(args.norm);
  Linear(args.linear);
  RopeAppendKv(args.append);
}

void Backend::GateUpMul(const GateUpMulArgs& args) {
  Check(args);
  if (args.norm.x) RmsNorm(args.norm);
  Linear(args.linear);
  GateMul(args.gate_mul);
}

void Backend::ExpertMlp(const ExpertMlpArgs& args) {
  Check(args);
  SelectExperts(args.select);
  ExpertLinear(args.gate_up);
  GateMul(args.gate_mul);
  ExpertLinear(args.down);
  AddExperts(args.add);
}

void Backend::AppendShadowScoreKeys(const AppendShadowScoreKeysArgs& args) {
  Check(args);
  AppendShadow(args.append);
  ScoreKeys(args.score);
}

}  // namespace tidal
