// Causal attention of prompt chunks: blocks of queries against blocks of K and V with a running
// softmax (FlashAttention, arXiv 2307.08691), the two products by OpenBLAS.
//
// A task is one block of queries of one row, for all query heads of one KV head: scores and weights
// of the group are one matrix. Nothing of a task depends on other rows.
#include "backend/cpu/attention_prefill.h"

#include <algorithm>
#include <cmath>

#include "backend/cpu/attend_rows.h"
#include "backend/cpu/blas.h"
#include "backend/cpu/kv_rows.h"
#include "backend/cpu/ops.h"

namespace tidal {
namespace {

// Rows of the score matrix (queries x group) and its columns: with K and V blocks and the output
// they take 0.5 MiB at head_dim 64, within the L2 of one core.
constexpr int64_t kScoreRows = 256;
constexpr int64_t kScoreColumns = 256;

int64_t BlockTokens(int64_t group_size) {
  return std::max<int64_t>(1, kScoreRows / group_size);
}

struct Shape {
  int64_t num_q_heads, num_kv_heads, group_size, head_dim;
};

Shape ShapeOf(const AttentionPrefillArgs& args) {
  const TensorView& pages = args.kv.k_pages;
  return {args.q.dim(1), pages.dim(1), args.q.dim(1) / pages.dim(1), pages.dim(3)};
}

// A block of queries of one row and KV head.
struct Task {
  int64_t row;
  int64_t kv_head;
  int64_t first_token;  // of q and out
  int64_t num_tokens;
  int64_t first_position;  // of first_token in the sequence
};

// A thread's scratch.
struct Work {
  float* q;        // [rows, head_dim], scaled by sm_scale
  float* acc;      // [rows, head_dim]
  float* k;        // [kScoreColumns, head_dim]
  float* v;        // [kScoreColumns, head_dim]
  float* scores;   // [rows, kScoreColumns]
  float* maximum;  // [rows]
  float* sum;      // [rows]
};

Work Carve(float* memory, int64_t rows, int64_t head_dim) {
  Work work;
  work.q = memory;
  work.acc = work.q + rows * head_dim;
  work.k = work.acc + rows * head_dim;
  work.v = work.k + kScoreColumns * head_dim;
  work.scores = work.v + kScoreColumns * head_dim;
  work.maximum = work.scores + rows * kScoreColumns;
  work.sum = work.maximum + rows;
  return work;
}

// K and V of the task's tokens [begin, begin + count), widened and contiguous.
void GatherTokens(const CpuContext& context, const PagedKv& kv, const Task& task, int64_t begin,
                  int64_t count, const Work& work) {
  const int64_t page_size = kv.k_pages.dim(2), head_dim = kv.k_pages.dim(3);
  for (int64_t done = 0; done < count;) {
    const int64_t run = std::min(count - done, page_size - (begin + done) % page_size);
    const int64_t row = KvRow(kv, task.row, begin + done, task.kv_head);
    LoadKvRows(context, KeysOf(kv), row, run, work.k + done * head_dim);
    LoadKvRows(context, ValuesOf(kv), row, run, work.v + done * head_dim);
    done += run;
  }
}

void LoadQueries(const CpuContext& context, const AttentionPrefillArgs& args, const Shape& shape,
                 const Task& task, const Work& work) {
  const int64_t unit = shape.group_size * shape.head_dim;
  const int64_t stride = shape.num_q_heads * shape.head_dim;
  const float* q = args.q.data<float>() + task.first_token * stride + task.kv_head * unit;
  for (int64_t t = 0; t < task.num_tokens; ++t) {
    context.kernels->scale(q + t * stride, args.rule.sm_scale, unit, work.q + t * unit);
  }
  const int64_t rows = task.num_tokens * shape.group_size;
  std::fill_n(work.acc, rows * shape.head_dim, 0.0f);
  std::fill_n(work.maximum, rows, BitsToFloat(0xff800000u));
  std::fill_n(work.sum, rows, 0.0f);
}

void AddTokenBlock(const CpuContext& context, const AttentionPrefillArgs& args, const Shape& shape,
                   const Task& task, const Work& work, int64_t begin, int64_t count) {
  const int64_t dim = shape.head_dim;
  const int64_t rows = task.num_tokens * shape.group_size;
  GatherTokens(context, args.kv, task, begin, count, work);
  // Whole vectors for the softmax kernel: the columns past `count` are its to fill.
  const int64_t width = (count + 15) / 16 * 16;
  Sgemm({.m = rows,
         .n = count,
         .k = dim,
         .a = work.q,
         .lda = dim,
         .b = work.k,
         .ldb = dim,
         .b_transposed = true,
         .c = work.scores,
         .ldc = width});
  const int64_t window = args.rule.window;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t seen = task.first_position + row / shape.group_size + 1 - begin;
    const int64_t hidden = window == 0 ? 0 : seen - window;
    context.kernels->softmax_row({.scores = work.scores + row * width,
                                  .softcap = args.rule.softcap,
                                  .hidden = std::clamp<int64_t>(hidden, 0, count),
                                  .visible = std::clamp<int64_t>(seen, 0, count),
                                  .width = width,
                                  .maximum = work.maximum + row,
                                  .sum = work.sum + row,
                                  .acc = work.acc + row * dim,
                                  .head_dim = dim});
  }
  Sgemm({.m = rows,
         .n = dim,
         .k = count,
         .a = work.scores,
         .lda = width,
         .b = work.v,
         .ldb = dim,
         .c = work.acc,
         .ldc = dim,
         .accumulate = true});
}

// What the weighted values are multiplied by, given the running softmax's maximum and sum.
float OutputFactor(float maximum, float sum, const TensorView& sinks, int64_t head) {
  if (!sinks) return sum == 0.0f ? 0.0f : 1.0f / sum;
  const float sink = sinks.data<float>()[head];
  if (sink <= maximum) return 1.0f / (sum + std::exp(sink - maximum));
  const float rescaled = std::exp(maximum - sink);
  return rescaled / (sum * rescaled + 1.0f);
}

void StoreOutput(const CpuContext& context, const AttentionPrefillArgs& args, const Shape& shape,
                 const Task& task, const Work& work) {
  const int64_t dim = shape.head_dim;
  for (int64_t row = 0; row < task.num_tokens * shape.group_size; ++row) {
    const int64_t token = task.first_token + row / shape.group_size;
    const int64_t head = task.kv_head * shape.group_size + row % shape.group_size;
    const float factor = OutputFactor(work.maximum[row], work.sum[row], args.rule.sinks, head);
    context.kernels->scale(work.acc + row * dim, factor, dim,
                           args.out.data<float>() + (token * shape.num_q_heads + head) * dim);
  }
}

void RunTask(const CpuContext& context, const AttentionPrefillArgs& args, const Shape& shape,
             const Task& task, const Work& work) {
  LoadQueries(context, args, shape, task, work);
  const int64_t end = task.first_position + task.num_tokens, window = args.rule.window;
  const int64_t seen = window == 0 ? 0 : std::max<int64_t>(task.first_position + 1 - window, 0);
  for (int64_t begin = seen / kScoreColumns * kScoreColumns; begin < end; begin += kScoreColumns) {
    AddTokenBlock(context, args, shape, task, work, begin, std::min(kScoreColumns, end - begin));
  }
  StoreOutput(context, args, shape, task, work);
}

// Rows with many queries.
void PrefillBlocks(CpuContext& context, const AttentionPrefillArgs& args, int64_t longest) {
  const Shape shape = ShapeOf(args);
  const int64_t block_tokens = BlockTokens(shape.group_size);
  const int64_t blocks = (longest + block_tokens - 1) / block_tokens;
  const int64_t num_rows = args.kv.seq_lens.dim(0);
  const int64_t floats = PrefillScratchFloats(shape.group_size, shape.head_dim);
  float* scratch = context.scratch.Take<float>(Scratch::kThreads, context.num_threads * floats);
  const int32_t* starts = args.q_starts.data<int32_t>();
  const int32_t* seq_lens = args.kv.seq_lens.data<int32_t>();
  const int64_t num_tasks = num_rows * blocks * shape.num_kv_heads;
  const int threads = context.ThreadsForProduct(args.q.numel() * args.max_seq_len);
  context.ParallelFor(threads, num_tasks, [&](int64_t index) {
    Task task;
    task.kv_head = index % shape.num_kv_heads;
    task.row = index / shape.num_kv_heads % num_rows;
    // The last blocks see the most tokens: first, so that no thread is left with one at the end.
    const int64_t first = (blocks - 1 - index / (shape.num_kv_heads * num_rows)) * block_tokens;
    const int64_t num_queries = starts[task.row + 1] - starts[task.row];
    if (num_queries <= kFewQueries || first >= num_queries) return;
    task.first_token = starts[task.row] + first;
    task.num_tokens = std::min(block_tokens, num_queries - first);
    task.first_position = seq_lens[task.row] - num_queries + first;
    const int64_t score_rows = block_tokens * shape.group_size;
    RunTask(context, args, shape, task,
            Carve(scratch + ThreadIndex() * floats, score_rows, shape.head_dim));
  });
}

}  // namespace

int64_t PrefillScratchFloats(int64_t group_size, int64_t head_dim) {
  const int64_t rows = BlockTokens(group_size) * group_size;
  const int64_t floats =
      2 * rows * head_dim + 2 * kScoreColumns * head_dim + rows * kScoreColumns + 2 * rows;
  return (floats + 15) / 16 * 16;
}

void CpuAttentionPrefill(CpuContext& context, const AttentionPrefillArgs& args) {
  const int64_t num_rows = args.kv.seq_lens.dim(0);
  const int64_t token_size = args.q.dim(1) * args.q.dim(2);
  const int32_t* starts = args.q_starts.data<int32_t>();
  AttendBatch few;
  few.kv = &args.kv;
  few.num_q_heads = args.q.dim(1);
  few.rule = args.rule;
  few.rows = context.scratch.Take<AttendRow>(Scratch::kPlan, num_rows);
  few.num_rows = num_rows;
  int64_t longest = 0;
  for (int64_t b = 0; b < num_rows; ++b) {
    const int64_t num_queries = starts[b + 1] - starts[b];
    AttendRow row;
    if (num_queries <= kFewQueries) {
      row.row = b;
      row.q = args.q.data<float>() + starts[b] * token_size;
      row.out = args.out.data<float>() + starts[b] * token_size;
      row.num_tokens = num_queries;
      row.length = args.kv.seq_lens.data<int32_t>()[b];
    }
    few.rows[b] = row;
    longest = std::max(longest, num_queries);
  }
  AttendRows(context, few);
  if (longest > kFewQueries) PrefillBlocks(context, args, longest);
}

}  // namespace tidal
