// Spans in parallel, each with its own softmax record; then the records of each query, merged in
// order.
#include "backend/cpu/attend_rows.h"
#include "core/checked.h"

#include <algorithm>

namespace tidal {
namespace {

// Spans end at multiples of kSpanTokens: the first that there is, and how many up to `length`.
int64_t FirstSpan(const AttendRow& row) {
  return row.begin / kSpanTokens;
}

int64_t NumSpans(int64_t length) {
  return (length + kSpanTokens - 1) / kSpanTokens;
}

int64_t NumSpans(const AttendRow& row, int64_t length) {
  return NumSpans(length) - FirstSpan(row);
}

// Where the row's first query begins to see, rounded down to a whole block.
int64_t BeginOf(const AttendRow& row, int64_t window) {
  if (window == 0 || row.token_idx != nullptr) return 0;
  const int64_t first_length = row.length - row.num_tokens + 1;
  return std::max<int64_t>(first_length - window, 0) / kTokenBlock * kTokenBlock;
}

// The row that owns task or query `value`: the last one whose own begin at or before it.
template <int64_t AttendRow::*kFirst>
const AttendRow& FindRow(const AttendBatch& batch, int64_t value) {
  const AttendRow* begin = batch.rows;
  const AttendRow* after =
      std::upper_bound(begin, begin + batch.num_rows, value,
                       [](int64_t v, const AttendRow& row) { return v < row.*kFirst; });
  return *(after - 1);
}

struct Totals {
  int64_t tasks = 0;
  int64_t records = 0;
  int64_t queries = 0;
  int64_t elements = 0;  // of K and V read
};

// One task is one span of one unit: the queries that share K, V and a list of positions.
struct Units {
  int64_t count;  // units of the row
  int64_t heads;  // query heads of a unit
};

Units UnitsOf(const AttendRow& row, int64_t num_q_heads, int64_t num_kv_heads) {
  bool list_per_head = row.token_idx != nullptr && row.num_sets == num_q_heads;
  int64_t count = list_per_head ? num_q_heads : num_kv_heads;
  return {count, num_q_heads / count};
}

int64_t SetOf(const AttendRow& row, int64_t unit) {
  return row.num_sets == 1 ? 0 : unit;
}

// Tokens that a unit of the row attends to.
int64_t LengthOf(const AttendRow& row, int64_t unit) {
  return row.token_idx == nullptr ? row.length : row.set_lengths[SetOf(row, unit)];
}

Totals PlanAttendRows(const AttendBatch& batch) {
  const int64_t num_kv_heads = batch.kv->k_pages.dim(1);
  const int64_t head_dim = batch.kv->k_pages.dim(3);
  Totals totals;
  for (int64_t r = 0; r < batch.num_rows; ++r) {
    AttendRow& row = batch.rows[r];
    row.first_task = totals.tasks;
    row.first_record = totals.records;
    row.first_query = totals.queries;
    const int64_t queries = row.num_tokens * batch.num_q_heads;
    if (queries == 0) continue;
    row.begin = BeginOf(row, batch.rule.window);
    const int64_t units = UnitsOf(row, batch.num_q_heads, num_kv_heads).count;
    const int64_t spans = NumSpans(row, row.length), tokens = row.length - row.begin;
    totals.tasks += spans * units;
    totals.records += spans * queries;
    totals.queries += queries;
    totals.elements += (batch.reads_values ? 2 : 1) * tokens * units * head_dim;
  }
  return totals;
}

void RunSpan(const CpuContext& context, const AttendBatch& batch, float* records, int64_t task) {
  const PagedKv& kv = *batch.kv;
  const int64_t num_kv_heads = kv.k_pages.dim(1);
  const int64_t page_size = kv.k_pages.dim(2);
  const int64_t head_dim = kv.k_pages.dim(3);
  const AttendRow& row = FindRow<&AttendRow::first_task>(batch, task);
  const Units units = UnitsOf(row, batch.num_q_heads, num_kv_heads);
  const int64_t spans = NumSpans(row, row.length);
  const int64_t unit = (task - row.first_task) / spans;
  const int64_t span = (task - row.first_task) % spans;
  const int64_t length = LengthOf(row, unit);
  const int64_t span_begin = (FirstSpan(row) + span) * kSpanTokens;
  if (span_begin >= length) return;  // only longer lists have one
  const int64_t head = unit * units.heads;
  const int64_t kv_head = head / (batch.num_q_heads / num_kv_heads);
  const int64_t first_row = kv_head * page_size;
  const int64_t head_bytes = first_row * head_dim * DTypeBytes(kv.k_pages.dtype);
  const int64_t record = row.first_record + span * row.num_tokens * batch.num_q_heads +
                         unit * row.num_tokens * units.heads;
  AttendSpan args;
  args.q = row.q + head * head_dim;
  args.q_stride = batch.num_q_heads * head_dim;
  args.group_size = units.heads;
  args.num_queries = row.num_tokens * units.heads;
  args.head_dim = head_dim;
  args.sm_scale = batch.rule.sm_scale * kv.k_scale;
  args.softcap = batch.rule.softcap;
  args.k_pages = static_cast<const char*>(kv.k_pages.ptr) + head_bytes;
  if (batch.reads_values) args.v_pages = static_cast<const char*>(kv.v_pages.ptr) + head_bytes;
  if (kv.k_scales) {
    args.k_scales = kv.k_scales.data<float>() + first_row;
    args.v_scales = kv.v_scales.data<float>() + first_row;
  }
  args.page_rows = num_kv_heads * page_size;
  args.page_size = page_size;
  args.page_table = kv.page_table.data<int32_t>() + row.row * kv.page_table.dim(1);
  if (row.token_idx != nullptr) args.token_idx = row.token_idx + SetOf(row, unit) * row.set_stride;
  args.begin = std::max(row.begin, span_begin);
  args.end = std::min(length, span_begin + kSpanTokens);
  args.causal_len = length - row.num_tokens + 1;
  args.window = batch.rule.window;
  if (row.scores != nullptr) {
    args.scores = row.scores + head * row.scores_stride;
    args.scores_stride = row.scores_stride;
  }
  args.partial = records + record * PartialStride(head_dim);
  context.kernels->attend_span[StorageIndex(kv.k_pages.dtype)](args);
}

void MergeQuery(const CpuContext& context, const AttendBatch& batch, const float* records,
                int64_t query) {
  const int64_t num_kv_heads = batch.kv->k_pages.dim(1);
  const int64_t head_dim = batch.kv->k_pages.dim(3);
  const AttendRow& row = FindRow<&AttendRow::first_query>(batch, query);
  const int64_t local = query - row.first_query;
  const int64_t token = local / batch.num_q_heads;
  const int64_t head = local % batch.num_q_heads;
  const Units units = UnitsOf(row, batch.num_q_heads, num_kv_heads);
  const int64_t unit = head / units.heads;
  const int64_t record = row.first_record + unit * row.num_tokens * units.heads +
                         token * units.heads + head % units.heads;
  MergeSpans args;
  args.partial = records + record * PartialStride(head_dim);
  args.stride = row.num_tokens * batch.num_q_heads * PartialStride(head_dim);
  args.num_spans = NumSpans(row, LengthOf(row, unit));
  args.head_dim = head_dim;
  if (batch.rule.sinks) args.sink = batch.rule.sinks.data<float>() + head;
  args.out = batch.reads_values ? row.out + local * head_dim : nullptr;
  args.lse = row.lse == nullptr ? nullptr : row.lse + head;
  context.kernels->merge_spans(args);
  const float v_scale = batch.kv->v_scale;
  if (args.out != nullptr && v_scale != 1.0f) {
    context.kernels->scale(args.out, v_scale, head_dim, args.out);
  }
}

}  // namespace

void AttendRows(CpuContext& context, const AttendBatch& batch) {
  const Totals totals = PlanAttendRows(batch);
  float* records = context.scratch.Take<float>(
      Scratch::kRecords, totals.records * PartialStride(batch.kv->k_pages.dim(3)));
  const int threads = context.ThreadsFor(totals.elements);
  context.ParallelFor(threads, totals.tasks,
                      [&](int64_t task) { RunSpan(context, batch, records, task); });
  const int merge_threads = context.ThreadsFor(totals.records * batch.kv->k_pages.dim(3));
  context.ParallelRange(merge_threads, totals.queries, 1, [&](int64_t begin, int64_t end) {
    for (int64_t query = begin; query < end; ++query) MergeQuery(context, batch, records, query);
  });
}

int64_t AttendRecordFloats(int64_t num_rows, int64_t num_tokens, int64_t num_q_heads,
                           int64_t head_dim, int64_t length) {
  return Product({num_rows, num_tokens, num_q_heads, NumSpans(length), PartialStride(head_dim)});
}

}  // namespace tidal
