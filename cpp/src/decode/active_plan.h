// ActivePlan: a plan that steps can run, with what is the plan's own: its sets, the shadow of its
// scored layers, and whose sets they are.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "decode/decode_step.h"
#include "decode/selection.h"
#include "kv/sequence.h"
#include "kv/shadow_cache.h"
#include "tidal/plan.h"

namespace tidal {

struct ActivePlan {
  // A sequence of the last sparse step, in the order of its batch rows.
  struct Row {
    uint64_t sequence_id;
    int64_t seq_len;
  };

  PlanId id;
  PlanConfig config;  // with automatic values filled in
  DecodePlan plan;
  Selection selection;
  std::unique_ptr<ShadowCache> shadow;  // null: the plan has none
  std::vector<Row> last_rows;
  int64_t num_users = 1;  // who added the plan and has not dropped it

  StepAttention attention() const { return {plan, selection, shadow.get()}; }

  // Whether a step in which a sequence becomes seq_len tokens long reads chosen positions only. In
  // a batch with longer rows a short one is decoded densely all the same.
  bool IsSparse(int64_t seq_len) const {
    return !plan.is_dense() && seq_len > selection.dense_len();
  }
};

}  // namespace tidal
