// The table of inner loops of the CPU backend: one per instruction set, chosen once at run time.
//
// A kernel is the work of one thread on one piece of an op; the ops (../*.cc) cut the work, run the
// threads and own the scratch. Members that read stored numbers come in threes, those that read a
// cache in fives, indexed by StorageIndex: float32, bfloat16, float16, int8, fp8. The kernels throw
// nothing and allocate nothing.
#pragma once

#include <cstdint>

#include "tidal/dtype.h"

namespace tidal {

// Some outputs of a weight (op_args.h).
struct WeightRows {
  const void* data = nullptr;  // [num_outputs, in_features] numbers or codes
  int64_t num_outputs = 0;
  int64_t in_features = 0;
  int64_t group_size = 0;  // in_features of numbers
  // For codes: the scale and the zero of output n and group g are at g * group_stride + n.
  const void* scales = nullptr;
  const uint8_t* zeros = nullptr;  // or absent
  DType scale_dtype = DType::kFloat32;
  int64_t group_stride = 0;
};

// out[t, n] = x[t] . weight[n] (+ bias[n]) for t < num_rows and all outputs n. The bits of out[t,
// n] depend on x[t], weight[n] and bias[n] only; those of codes are those of the float32 numbers
// they stand for.
struct LinearTile {
  const float* x = nullptr;  // [num_rows, in_features]
  WeightRows weight;
  const void* bias = nullptr;  // [num_outputs], or absent
  DType bias_dtype = DType::kFloat32;
  float* out = nullptr;  // out[t, n] is at t * out_stride + n
  int64_t num_rows = 0;
  int64_t out_stride = 0;
  bool accumulate = false;
};

// One span of attended tokens for queries that share a KV head: the running softmax's maximum, sum
// and weighted values. Span element i is position token_idx[i], or i itself without a list.
struct AttendSpan {
  // Query m is at q + (m / group_size) * q_stride + (m % group_size) * head_dim.
  const float* q = nullptr;
  int64_t q_stride = 0;
  int64_t group_size = 0;
  int64_t num_queries = 0;
  int64_t head_dim = 0;
  float sm_scale = 0.0f;
  float softcap = 0.0f;  // 0: none

  const void* k_pages = nullptr;    // page 0 of this KV head; page p is page_rows x p rows further
  const void* v_pages = nullptr;    // or absent: only scores, maximum and sum are made
  const float* k_scales = nullptr;  // of the rows, likewise; int8 only
  const float* v_scales = nullptr;
  int64_t page_rows = 0;
  int64_t page_size = 0;
  const int32_t* page_table = nullptr;

  const int32_t* token_idx = nullptr;  // or absent
  int64_t begin = 0;                   // span elements [begin, end)
  int64_t end = 0;
  // Without a list query m sees positions below causal_len + m / group_size; with a window its last
  // so many.
  int64_t causal_len = 0;
  int64_t window = 0;  // 0: none

  // Query m's score of element i goes to scores + m * scores_stride + i; or absent.
  float* scores = nullptr;
  int64_t scores_stride = 0;

  // Record of query m at partial + m * PartialStride(head_dim): head_dim weighted values, maximum,
  // sum.
  float* partial = nullptr;
};

// Tokens that a kernel takes at once. The cut decides the rounding, so a span begins at a multiple.
// 64 rows of K and V at head_dim 128 in float32 are 64 KiB: in L2, while a span streams by.
inline constexpr int64_t kTokenBlock = 64;

// Floats of one record of AttendSpan; a multiple of a cache line so that threads share none.
constexpr int64_t PartialStride(int64_t head_dim) {
  return (head_dim + 2 + 15) / 16 * 16;
}

// The records of all spans of one query, in ascending order, to its output.
struct MergeSpans {
  const float* partial = nullptr;  // span s at partial + s * stride
  int64_t stride = 0;
  int64_t num_spans = 0;
  int64_t head_dim = 0;
  const float* sink = nullptr;  // a score without a value, not in lse; or absent
  float* out = nullptr;         // [head_dim], or absent
  float* lse = nullptr;         // or absent
};

// One row of a block of prefill scores, turned into weights in place.
struct SoftmaxRow {
  float* scores = nullptr;  // [width]; out: exp(score - maximum), 0 outside of [hidden, visible)
  float softcap = 0.0f;     // 0: none
  int64_t hidden = 0;
  int64_t visible = 0;
  int64_t width = 0;
  float* maximum = nullptr;  // running
  float* sum = nullptr;      // running
  float* acc = nullptr;      // [head_dim] running weighted values: rescaled to the new maximum
  int64_t head_dim = 0;
};

// Ranking keys of positions [0, count) of one set: larger is better, equal scores give equal keys,
// NaN gives 0.
struct RankKeys {
  const float* scores = nullptr;  // head h at scores + h * scores_stride
  int64_t scores_stride = 0;
  const float* lse = nullptr;  // [num_heads]; absent: one head, ranked by the raw score
  int64_t num_heads = 0;
  int64_t count = 0;
  bool pool_max = false;          // else the sum in ascending head order
  uint32_t* keys = nullptr;       // out [count]
  uint32_t* block_max = nullptr;  // out: largest key of each kRankBlock positions
};

inline constexpr int64_t kRankBlock = 64;

// Scores of one span of tokens from their shadows (core/shadow_code.h), for queries that share a KV
// head; and their running softmax without values.
struct ShadowSpan {
  const uint8_t* codes = nullptr;    // page 0 of this KV head: [page_size, head_dim / 2]
  const uint16_t* scales = nullptr;  // page 0 of this KV head: [page_size], bits of float16
  int64_t page_stride = 0;           // tokens: page p is page_stride x p of them further
  int64_t page_size = 0;
  const int32_t* page_table = nullptr;
  int64_t begin = 0;  // tokens [begin, end)
  int64_t end = 0;

  // Codes of query m at queries + m * head_dim, those of even dims in front.
  const int8_t* queries = nullptr;
  const int32_t* sums = nullptr;   // [num_queries], of the codes
  const float* factors = nullptr;  // [num_queries]: the query's factor x sm_scale
  int64_t num_queries = 0;
  int64_t head_dim = 0;  // at most kShadowMaxDim
  float softcap = 0.0f;  // 0: none

  float* scores = nullptr;  // out: query m's of token i at m * scores_stride + i
  int64_t scores_stride = 0;
  float* partial = nullptr;  // out: maximum and sum of query m at m * PartialStride(0)
};

inline constexpr int64_t kShadowMaxDim = 512;

// Numbers of a gate and of up, and what an Activation makes of them.
struct GateRow {
  const float* gate = nullptr;
  const float* up = nullptr;
  int64_t count = 0;
  float* out = nullptr;
  float limit = 0.0f;  // of kClampedSwiglu
  float alpha = 0.0f;  // likewise
};

struct CpuKernels {
  const char* name;  // "AVX-512 VNNI", "AVX-512", "AVX2", "generic"

  // These come in sixes: float32, bfloat16, float16, and codes of float8, int4 and MXFP4.
  void (*linear[6])(const LinearTile& tile);
  // dst [num_outputs, in_features] = the weight as float32
  void (*decode[6])(const WeightRows& weight, float* dst);
  void (*attend_span[5])(const AttendSpan& span);
  void (*merge_spans)(const MergeSpans& merge);
  void (*softmax_row)(const SoftmaxRow& row);
  void (*rank_keys)(const RankKeys& rank);
  void (*score_shadow)(const ShadowSpan& span);

  // dst[i] = float32(src[i]); of int8 and fp8 without their scales
  void (*widen[5])(const void* src, int64_t count, float* dst);
  // out = weight * (x / rms(x)); out may be x
  void (*rms_norm[3])(const float* x, const void* weight, int64_t size, float eps, float* out);
  // Rotate-half of one head: x1' = x1 cos - x2 sin, x2' = x2 cos + x1 sin; out may be x.
  // cos_sin: head_dim / 2 cosines, then as many sines.
  void (*rotate_half)(const float* x, const float* cos_sin, int64_t head_dim, float* out);
  void (*gate_mul[3])(const GateRow& row);  // by Activation
  // out = x * factor
  void (*scale)(const float* x, float factor, int64_t count, float* out);
  // x = softcap * tanh(x / softcap); a softcap of 0 is none
  void (*softcap)(float* x, float softcap, int64_t count);
};

inline int StorageIndex(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return 1;
    case DType::kFloat16:
      return 2;
    case DType::kInt8:
      return 3;
    case DType::kFloat8:
      return 4;
    default:
      return 0;
  }
}

const CpuKernels& GenericKernels();
// Only on x86-64.
const CpuKernels& Avx2Kernels();
const CpuKernels& Avx512Kernels();
const CpuKernels& Avx512VnniKernels();

}  // namespace tidal
