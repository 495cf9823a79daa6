// Decode attention: one query per row over all of its tokens (AttentionFull, AttentionSelect) or
// over the chosen ones (AttentionSparse). All three are AttendRows; they differ in what a row is
// told to attend to and to hand out.
#include <algorithm>

#include "backend/cpu/attend_rows.h"
#include "backend/cpu/ops.h"

namespace tidal {
namespace {

// Dense rows; the callers add to them.
AttendBatch DenseBatch(CpuContext& context, const AttentionArgs& args) {
  const int64_t num_rows = args.q.dim(0);
  const int64_t row_size = args.q.dim(1) * args.q.dim(2);
  AttendBatch batch;
  batch.kv = &args.kv;
  batch.num_q_heads = args.q.dim(1);
  batch.sm_scale = args.sm_scale;
  batch.num_rows = num_rows;
  batch.rows = context.scratch.Take<AttendRow>(Scratch::kPlan, num_rows);
  for (int64_t b = 0; b < num_rows; ++b) {
    AttendRow row;
    row.row = b;
    row.q = args.q.data<float>() + b * row_size;
    row.out = args.out.data<float>() + b * row_size;
    row.num_tokens = 1;
    row.length = args.kv.seq_lens.data<int32_t>()[b];
    batch.rows[b] = row;
  }
  return batch;
}

}  // namespace

void CpuAttentionFull(CpuContext& context, const AttentionArgs& args) {
  AttendRows(context, DenseBatch(context, args));
}

void CpuAttentionSelect(CpuContext& context, const AttentionSelectArgs& args) {
  AttendBatch batch = DenseBatch(context, args.attention);
  const int64_t max_len = args.scores.dim(2);
  for (int64_t b = 0; b < batch.num_rows; ++b) {
    AttendRow& row = batch.rows[b];
    row.scores = args.scores.data<float>() + b * batch.num_q_heads * max_len;
    row.scores_stride = max_len;
    row.lse = args.lse.data<float>() + b * batch.num_q_heads;
  }
  AttendRows(context, batch);
}

void CpuAttentionSparse(CpuContext& context, const AttentionSparseArgs& args) {
  AttendBatch batch = DenseBatch(context, args.attention);
  const int64_t num_sets = args.token_idx.dim(1);
  const int64_t token_budget = args.token_idx.dim(2);
  for (int64_t b = 0; b < batch.num_rows; ++b) {
    AttendRow& row = batch.rows[b];
    if (row.length <= args.dense_len) continue;
    row.set_lengths = args.num_selected.data<int32_t>() + b * num_sets;
    row.length = *std::max_element(row.set_lengths, row.set_lengths + num_sets);
    row.token_idx = args.token_idx.data<int32_t>() + b * num_sets * token_budget;
    row.num_sets = num_sets;
    row.set_stride = token_budget;
  }
  AttendRows(context, batch);
}

}  // namespace tidal
