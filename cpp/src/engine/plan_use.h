// PlanUse: a plan beside the decoder's, there as long as somebody uses it.
#pragma once

#include "decode/model_runner.h"
#include "tidal/plan.h"

namespace tidal {

// Made and destroyed between passes; the runner must outlive it.
class PlanUse {
 public:
  // Throws as ModelRunner::AddPlan.
  PlanUse(ModelRunner& runner, const PlanConfig& plan)
      : runner_(runner), id_(runner.AddPlan(plan)) {}
  ~PlanUse() { runner_.DropPlan(id_); }
  PlanUse(const PlanUse&) = delete;
  PlanUse& operator=(const PlanUse&) = delete;

  PlanId id() const { return id_; }

 private:
  ModelRunner& runner_;
  PlanId id_;
};

}  // namespace tidal
