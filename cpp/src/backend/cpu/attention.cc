// Decode attention: one query per row over all of its tokens (AttentionFull, AttentionSelect), over
// the chosen ones (AttentionSparse), or over the keys alone (ScoreKeys). All are AttendRows; they
// differ in what a row is told to attend to and to hand out.
#include <algorithm>

#include "backend/cpu/attend_rows.h"
#include "backend/cpu/ops.h"
#include "backend/cpu/shadow.h"

namespace tidal {
namespace {

// Rows that read all tokens; the callers add to them. `out` may be absent.
AttendBatch DenseBatch(CpuContext& context, const TensorView& q, const PagedKv& kv,
                       const AttentionRule& rule, float* out) {
  const int64_t num_rows = q.dim(0);
  const int64_t row_size = q.dim(1) * q.dim(2);
  AttendBatch batch;
  batch.kv = &kv;
  batch.num_q_heads = q.dim(1);
  batch.rule = rule;
  batch.reads_values = out != nullptr;
  batch.num_rows = num_rows;
  batch.rows = context.scratch.Take<AttendRow>(Scratch::kPlan, num_rows);
  for (int64_t b = 0; b < num_rows; ++b) {
    AttendRow row;
    row.row = b;
    row.q = q.data<float>() + b * row_size;
    if (out != nullptr) row.out = out + b * row_size;
    row.num_tokens = 1;
    row.length = kv.seq_lens.data<int32_t>()[b];
    batch.rows[b] = row;
  }
  return batch;
}

AttendBatch DenseBatch(CpuContext& context, const AttentionArgs& args) {
  return DenseBatch(context, args.q, args.kv, args.rule, args.out.data<float>());
}

// Makes a row read the positions of its sets only.
void HandInSets(AttendRow& row, const TensorView& token_idx, const TensorView& num_selected,
                int64_t b) {
  const int64_t num_sets = token_idx.dim(1), token_budget = token_idx.dim(2);
  row.set_lengths = num_selected.data<int32_t>() + b * num_sets;
  row.length = *std::max_element(row.set_lengths, row.set_lengths + num_sets);
  row.token_idx = token_idx.data<int32_t>() + b * num_sets * token_budget;
  row.num_sets = num_sets;
  row.set_stride = token_budget;
}

void HandOutScores(AttendBatch& batch, const TensorView& scores, const TensorView& lse) {
  const int64_t max_len = scores.dim(2);
  for (int64_t b = 0; b < batch.num_rows; ++b) {
    AttendRow& row = batch.rows[b];
    row.scores = scores.data<float>() + b * batch.num_q_heads * max_len;
    row.scores_stride = max_len;
    row.lse = lse.data<float>() + b * batch.num_q_heads;
  }
}

}  // namespace

void CpuAttentionFull(CpuContext& context, const AttentionArgs& args) {
  AttendRows(context, DenseBatch(context, args));
}

void CpuAttentionSelect(CpuContext& context, const AttentionSelectArgs& args) {
  AttendBatch batch = DenseBatch(context, args.attention);
  HandOutScores(batch, args.scores, args.lse);
  AttendRows(context, batch);
}

void CpuScoreKeys(CpuContext& context, const ScoreKeysArgs& args) {
  if (args.shadow.codes) {
    CpuScoreShadow(context, args);
    return;
  }
  AttendBatch batch = DenseBatch(context, args.q, args.kv, args.rule, nullptr);
  HandOutScores(batch, args.scores, args.lse);
  AttendRows(context, batch);
}

void CpuAttentionSparse(CpuContext& context, const AttentionSparseArgs& args) {
  AttendBatch batch = DenseBatch(context, args.attention);
  for (int64_t b = 0; b < batch.num_rows; ++b) {
    if (batch.rows[b].length <= args.dense_len) continue;
    HandInSets(batch.rows[b], args.token_idx, args.num_selected, b);
  }
  AttendRows(context, batch);
}

}  // namespace tidal
