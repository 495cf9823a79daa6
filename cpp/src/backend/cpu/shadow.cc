// Keys in 4 bits: written beside the cache, and scored in place of the keys.
#include "backend/cpu/shadow.h"

#include <algorithm>

#include "backend/cpu/attend_rows.h"
#include "backend/cpu/kv_rows.h"
#include "backend/cpu/ops.h"
#include "core/checked.h"
#include "core/shadow_code.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// The queries of all rows in codes; in scratch.
struct EncodedQueries {
  int32_t* sums;   // [B, Hq]
  float* factors;  // [B, Hq]
  int8_t* codes;   // [B, Hq, D]
};

EncodedQueries EncodeQueries(CpuContext& context, const ScoreKeysArgs& args) {
  const int64_t num_rows = args.q.dim(0), num_q_heads = args.q.dim(1), head_dim = args.q.dim(2);
  const int64_t group_size = num_q_heads / args.kv.k_pages.dim(1);
  char* memory =
      context.scratch.Take<char>(Scratch::kPlan, ShadowQueryBytes(num_rows, num_q_heads, head_dim));
  EncodedQueries queries;
  queries.sums = reinterpret_cast<int32_t*>(memory);
  queries.factors = reinterpret_cast<float*>(queries.sums + num_rows * num_q_heads);
  queries.codes = reinterpret_cast<int8_t*>(queries.factors + num_rows * num_q_heads);
  for (int64_t i = 0; i < num_rows * num_q_heads; ++i) {
    const int64_t kv_head = i % num_q_heads / group_size;
    const ShadowQuery query = EncodeShadowQuery(
        args.q.data<float>() + i * head_dim, args.shadow.balance.data<float>() + kv_head * head_dim,
        static_cast<int>(head_dim), queries.codes + i * head_dim);
    queries.sums[i] = query.sum;
    queries.factors[i] = query.factor * args.rule.sm_scale;
  }
  return queries;
}

}  // namespace

int64_t ShadowQueryBytes(int64_t num_rows, int64_t num_q_heads, int64_t head_dim) {
  const auto head_bytes = head_dim + static_cast<int64_t>(sizeof(int32_t) + sizeof(float));
  return Product({num_rows, num_q_heads, head_bytes});
}

void CpuAppendShadow(CpuContext& context, const AppendShadowArgs& args) {
  const int64_t num_kv_heads = args.kv.k_pages.dim(1), head_dim = args.kv.k_pages.dim(3);
  // A cache line more than a head, so that no two threads write to one.
  const int64_t stride = (head_dim + 15) / 16 * 16;
  float* keys = context.scratch.Take<float>(Scratch::kThreads, context.num_threads * stride);
  const int64_t num_keys = args.positions.dim(0) * num_kv_heads;
  const int threads = context.ThreadsFor(8 * num_keys * head_dim);
  context.ParallelFor(threads, num_keys, [&](int64_t i) {
    const int64_t token = i / num_kv_heads, head = i % num_kv_heads;
    const int64_t position = args.positions.data<int32_t>()[token];
    if (position < 0) return;
    const int64_t slot = KvRow(args.kv, args.seq_idx.data<int32_t>()[token], position, head);
    float* key = keys + ThreadIndex() * stride;
    LoadKvRows(context, KeysOf(args.kv), slot, 1, key);
    EncodeShadowKey(key, args.shadow.balance.data<float>() + head * head_dim,
                    static_cast<int>(head_dim),
                    args.shadow.codes.data<uint8_t>() + slot * head_dim / 2,
                    args.shadow.scales.data<Float16>() + slot);
  });
}

void CpuScoreShadow(CpuContext& context, const ScoreKeysArgs& args) {
  const int64_t num_rows = args.q.dim(0), num_q_heads = args.q.dim(1), head_dim = args.q.dim(2);
  const int64_t num_kv_heads = args.kv.k_pages.dim(1), page_size = args.kv.k_pages.dim(2);
  const int64_t group_size = num_q_heads / num_kv_heads, max_len = args.scores.dim(2);
  const int64_t num_queries = num_rows * num_q_heads;
  TIDAL_CHECK(args.scores.dtype == DType::kFloat32, UnsupportedError, "ScoreKeys: scores: got ",
              DTypeName(args.scores.dtype), " on the CPU, expected float32");
  TIDAL_CHECK(head_dim <= kShadowMaxDim, UnsupportedError, "ScoreKeys: head_dim ", head_dim,
              " with a shadow, expected at most ", kShadowMaxDim);
  const int32_t* seq_lens = args.kv.seq_lens.data<int32_t>();
  const EncodedQueries queries = EncodeQueries(context, args);
  int64_t longest = 0;
  for (int64_t b = 0; b < num_rows; ++b) longest = std::max<int64_t>(longest, seq_lens[b]);
  const int64_t spans = (longest + kSpanTokens - 1) / kSpanTokens;
  float* records =
      context.scratch.Take<float>(Scratch::kRecords, spans * num_queries * PartialStride(0));
  const int threads = context.ThreadsFor(num_rows * num_kv_heads * longest * head_dim / 4);
  context.ParallelFor(threads, num_rows * num_kv_heads * spans, [&](int64_t task) {
    const int64_t span = task % spans, head = task / spans % num_kv_heads;
    const int64_t row = task / spans / num_kv_heads;
    const int64_t query = row * num_q_heads + head * group_size;
    ShadowSpan work;
    work.begin = span * kSpanTokens;
    work.end = std::min<int64_t>(seq_lens[row], work.begin + kSpanTokens);
    if (work.begin >= work.end) return;
    work.codes = args.shadow.codes.data<uint8_t>() + head * page_size * head_dim / 2;
    work.scales = static_cast<const uint16_t*>(args.shadow.scales.ptr) + head * page_size;
    work.page_stride = num_kv_heads * page_size;
    work.page_size = page_size;
    work.page_table = args.kv.page_table.data<int32_t>() + row * args.kv.page_table.dim(1);
    work.queries = queries.codes + query * head_dim;
    work.sums = queries.sums + query;
    work.factors = queries.factors + query;
    work.num_queries = group_size;
    work.head_dim = head_dim;
    work.softcap = args.rule.softcap;
    work.scores = args.scores.data<float>() + query * max_len;
    work.scores_stride = max_len;
    work.partial = records + (span * num_queries + query) * PartialStride(0);
    context.kernels->score_shadow(work);
  });
  for (int64_t i = 0; i < num_queries; ++i) {
    MergeSpans merge;
    merge.partial = records + i * PartialStride(0);
    merge.stride = num_queries * PartialStride(0);
    merge.num_spans = (seq_lens[i / num_q_heads] + kSpanTokens - 1) / kSpanTokens;
    merge.lse = args.lse.data<float>() + i;
    context.kernels->merge_spans(merge);
  }
}

}  // namespace tidal
