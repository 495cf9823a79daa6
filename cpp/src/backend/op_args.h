// The arguments of every op of the Backend seam, one struct each.
//
// Letters in shapes: T tokens of a pass (one per row in a decode step), B batch rows, H
// hidden_size, Hq num_q_heads, Hkv num_kv_heads, G group_size = Hq / Hkv, D head_dim, V vocab_size,
// I intermediate_size. "act" is the backend's activation dtype (float32 on the CPU, the weights'
// dtype on CUDA), "weight" the weights' dtype, "kv" the cache's. Query head h reads KV head h / G.
// All tensors are contiguous. Rules for all ops: inputs are const, outputs pre-shaped and fully
// written, sums are float32 or better.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "core/tensor_view.h"
#include "tidal/config.h"
#include "tidal/weights.h"

namespace tidal {

// A matrix [N, K] of a product: numbers, or codes that stand for them, (code - zero) * scale. A
// scale, and a zero, belongs to some neighbouring inputs of one output, a group. A scale of uint8,
// of kMxfp4 alone, is the power of 2 of itself less 127 (core/mxfp4.h).
struct Weight {
  TensorView data;  // [N, K] weight; uint8 [N, K] of kFloat8, [N, K / 2] of other codes
  WeightCodes codes = WeightCodes::kNone;
  int64_t group_size = 0;  // K, or a multiple of 32; the last group may be smaller
  TensorView scales;       // [K / group_size, N] float32, bfloat16 or float16; uint8 of kMxfp4
  TensorView zeros;        // likewise uint8, of kInt4; absent: 8. 0 of other codes
  // From the scales and zeros of one group to those of the next, of rows that are part of a larger
  // matrix; 0: N.
  int64_t group_stride = 0;
  // Whether its products of prompts round their inputs to float8 too (LinearArgs), and the scale of
  // those; 0: they have scales of their own.
  bool quantizes_inputs = false;
  float input_scale = 0.0f;

  Weight() = default;
  Weight(const TensorView& numbers) : data(numbers) {}  // NOLINT: a plain matrix is one

  int64_t num_outputs() const { return data.dim(0); }
  int64_t num_inputs() const { return data.dim(1) * (is_coded() ? 8 / CodeBits(codes) : 1); }
  bool is_coded() const { return codes != WeightCodes::kNone; }
  // Outputs [begin, begin + count).
  Weight Rows(int64_t begin, int64_t count) const;
};

// One layer's cache as a step sees it. Token t of row b lies in page page_table[b, t / page_size],
// slot t % page_size.
struct PagedKv {
  TensorView k_pages;     // [num_pages, Hkv, page_size, D] kv
  TensorView v_pages;     // [num_pages, Hkv, page_size, D] kv
  TensorView page_table;  // [B, max_pages] int32; entries past a row's last page are not read
  TensorView seq_lens;  // [B] int32: tokens in the cache, those of this pass included; 0 = idle row
  // For int8 pages, whose rows are codes x scale (core/int8_row.h); else absent.
  TensorView k_scales = {};  // [num_pages, Hkv, page_size] float32
  TensorView v_scales = {};  // [num_pages, Hkv, page_size] float32
  // For fp8 pages, whose numbers are code x scale (core/float8.h); of others 1.
  float k_scale = 1.0f;
  float v_scale = 1.0f;
};

struct EmbedArgs {
  TensorView token_ids;  // [T] int32, each in [0, V)
  TensorView table;      // [V, H] weight
  TensorView out;        // [T, H] float32: scale x the row
  float scale = 1.0f;
};

struct RmsNormArgs {
  TensorView x;       // [T, H] float32; with adds it is undefined afterwards
  TensorView weight;  // [H] weight or float32; absent: x is not normalised, out is x as act
  TensorView out;     // [T, H] act; float32 with adds
  float eps = 0.0f;
  bool adds = false;  // adds to out, instead of writing it
};

enum class LinearOutput : int32_t {
  kStore,       // out = x . weight^T + bias
  kAccumulate,  // out += x . weight^T + bias (the residual stream)
};

struct LinearArgs {
  TensorView x;     // [T, K] act
  Weight weight;    // [N, K]
  TensorView bias;  // [N] weight, or absent
  TensorView out;   // [T, N] act or float32; float32 if output is kAccumulate
  LinearOutput output = LinearOutput::kStore;
  // With a weight in float8: x is rounded to float8 first. A token's inputs have a scale for each
  // group of the weight's: weight.input_scale, or else Float8Scale of their largest magnitude
  // (core/float8.h), NaNs left out. What is multiplied is the nearest code to input / scale, times
  // the scale, or that number as act.
  bool quantizes_inputs = false;
};

// cos and sin of position x frequency (a float32 product, as in transformers), once a pass for all
// layers. Where the frequency is 0 nothing turns: cos is 1, and not scaled.
struct RopeTableArgs {
  TensorView positions;            // [T] int32; -1 = idle row (its output is not read)
  TensorView seq_idx;              // [T] int32: row of inv_freq
  TensorView inv_freq;             // [B, D / 2] float32
  float attention_scaling = 1.0f;  // multiplies cos and sin (yarn, longrope)
  TensorView cos_sin;              // out [T, D] float32: D/2 cosines, then D/2 sines
  // For queries, whose cosines and sines are multiplied by 1 + query_scale_beta * log(1 +
  // floor(position / original_len)); or absent.
  TensorView q_cos_sin = {};  // out [T, D] float32
  float query_scale_beta = 0.0f;
  int64_t original_len = 0;
};

// Where the tokens stand that a call appends to the cache.
enum class Appended {
  kAnywhere,
  kNewestOfEachRow,  // T = B: the b-th is the last of row b, at seq_len - 1, or none of an idle row
};

// Splits qkv, normalises q and k per head if asked, rotates them (rotate-half layout) and appends k
// and v to the cache at `positions`.
struct RopeAppendKvArgs {
  TensorView qkv;      // [T, (Hq + 2 Hkv) * D] act
  TensorView cos_sin;  // [T, D] float32
  // Weight or float32: [D] of each head, or [Hq * D] and [Hkv * D] of all together; or absent.
  TensorView q_norm;
  TensorView k_norm;
  float norm_eps = 0.0f;
  TensorView positions;       // [T] int32; -1 = idle row: nothing is appended
  TensorView seq_idx;         // [T] int32: row of kv.page_table
  TensorView q;               // out [T, Hq, D] act
  PagedKv kv;                 // written
  TensorView q_cos_sin = {};  // [T, D] float32: of q, where it is not cos_sin; or absent
  Appended appended = Appended::kAnywhere;  // a device may start attention before this has ended
};

// What the layers of a model may do to attention. The score of a query and a key is sm_scale * q.k,
// or softcap * tanh(sm_scale * q.k / softcap); weights are the softmax of scores.
struct AttentionRule {
  float sm_scale = 0.0f;
  float softcap = 0.0f;   // 0: none
  int64_t window = 0;     // a query sees so many last tokens, its own included; 0: all before it
  TensorView sinks = {};  // [Hq] float32: one more score of each head, without a value; or absent
};

// Causal attention of a prompt chunk over the paged cache, the chunk's own K and V included: the
// queries of row b are the last q_starts[b + 1] - q_starts[b] positions of its seq_lens[b] tokens.
struct AttentionPrefillArgs {
  TensorView q;  // [T, Hq, D] act
  // [B + 1] int32, ascending from 0 to at most T. The tokens past the last row's are idle: their
  // `out` is left as it is.
  TensorView q_starts;
  PagedKv kv;
  AttentionRule rule;
  TensorView out;  // [T, Hq, D] act
  // Host bounds. In a recorded step they stay as they were when it was recorded.
  int64_t max_q_len = 0;    // on the queries of one row
  int64_t max_seq_len = 0;  // on seq_lens
};

// Dense attention of one query per row. An idle row gives 0.
struct AttentionArgs {
  TensorView q;  // [B, Hq, D] act
  PagedKv kv;
  AttentionRule rule;
  TensorView out;  // [B, Hq, D] act
};

// AttentionArgs without a window, and the scores it computed on the way. `out` equals
// AttentionFull's bit for bit.
struct AttentionSelectArgs {
  AttentionArgs attention;
  TensorView scores;  // out [B, Hq, max_len] float32: of [0, seq_len); the rest is left
  // out [B, Hq] float32: log of the sum of exp(score) over tokens; -inf for an idle row
  TensorView lse;
};

// One layer's keys in 4 bits (core/shadow_code.h), in pages beside the cache's: what is read to
// choose among many keys in place of the keys themselves.
struct ShadowKeys {
  TensorView codes;    // [num_pages, Hkv, page_size, D / 2] uint8
  TensorView scales;   // [num_pages, Hkv, page_size] float16
  TensorView balance;  // [Hkv, D] float32, > 0
};

// Writes the shadows of the keys at `positions`, which are in the cache.
struct AppendShadowArgs {
  PagedKv kv;
  TensorView positions;  // [T] int32; -1 = idle row: nothing is written
  TensorView seq_idx;    // [T] int32: row of kv.page_table
  ShadowKeys shadow;     // written
};

// The scores of AttentionSelect without its attention: all keys are read, and no value. With a
// shadow its keys are read instead, and the scores are about those.
struct ScoreKeysArgs {
  TensorView q;  // [B, Hq, D] act
  PagedKv kv;
  ShadowKeys shadow;   // or absent
  AttentionRule rule;  // without a window; sinks are not looked at
  // out [B, Hq, max_len]: of [0, seq_len); the rest is left. float32, with a shadow the backend's
  // shadow_score_dtype.
  TensorView scores;
  TensorView lse;  // out [B, Hq] float32: log of the sum of exp(score); -inf for an idle row
};

// From scores to sets. The set of a row with n = seq_lens[b] tokens has min(token_budget, n)
// positions: the first sink_tokens, the last recent_tokens, and the best-scoring others; equal
// scores: the lower position. A position's score: kKvHead: exp(score - lse) pooled over the group's
// G query heads in ascending order; kHead: the raw score; kLayer: exp(score - lse) pooled over all
// query heads in ascending order; weights below 2^-126 may count as 0. NaN scores rank below -inf.
// With top_p_mass < 1 a set has fewer of them: the smallest number whose weights, exp(score - lse)
// summed over the query heads that share the set, reach top_p_mass x those heads, but at least
// min(min_tokens, n). Weights count in whole units of 2^-40 (core/mass.h), NaN and smaller ones as
// 0, so the order of the sum does not matter.
struct SelectTopKArgs {
  TensorView scores;    // [B, Hq, max_len] float32 or the backend's shadow_score_dtype
  TensorView lse;       // [B, Hq] float32
  TensorView seq_lens;  // [B] int32
  int64_t num_kv_heads = 0;
  Granularity granularity = Granularity::kKvHead;
  Pooling pooling = Pooling::kSum;
  int64_t sink_tokens = 0;
  int64_t recent_tokens = 1;  // >= 1; sink_tokens + recent_tokens <= token_budget
  float top_p_mass = 1.0f;    // in (0, 1]; below 1 pooling is kSum
  int64_t min_tokens = 0;     // with top_p_mass < 1; from sinks and recents up to token_budget
  TensorView token_idx;  // out [B, num_sets, token_budget] int32, ascending; -1 past num_selected
  TensorView num_selected;  // out [B, num_sets] int32
};

// Whether the sets of long rows have about as many positions each.
enum class SetSizes : int32_t { kEqual, kRagged };

// Attention without a window to the chosen positions only. Rows with seq_lens[b] <= dense_len
// attend to all positions instead (on the CPU bit for bit as AttentionFull, elsewhere to rounding).
struct AttentionSparseArgs {
  AttentionArgs attention;
  TensorView token_idx;     // [B, num_sets, token_budget] int32; num_sets is Hkv, Hq or 1
  TensorView num_selected;  // [B, num_sets] int32
  SetSizes set_sizes = SetSizes::kEqual;  // how to share out the work; changes no result
  int64_t dense_len = 0;
};

struct GateMulArgs {
  TensorView gate_up;  // [T, 2 * I] act: gate, then up
  TensorView out;      // [T, I] act: what the activation makes of the two
  Activation activation = Activation::kSilu;
  // For kClampedSwiglu. A NaN stays one.
  float limit = 0.0f;
  float alpha = 0.0f;
};

// In place: each token's row times sigmoid(x . weight).
struct GateRowsArgs {
  TensorView x;       // [T, H] act
  TensorView weight;  // [1, H] weight
  TensorView out;     // [T, I] act
};

// Which experts a token has, the most likely ones, and their weights: these likelihoods, or their
// shares, times scale. Equal likelihoods: the lower id.
struct SelectExpertsArgs {
  TensorView logits;           // [T, E] float32
  TensorView correction = {};  // [E] float32, added to likelihoods in the choice only, or absent
  TensorView expert_ids;       // out [T, k] int32, all different, the first choice first
  TensorView weights;          // out [T, k] float32
  RouterScore score = RouterScore::kSoftmax;  // what is likely
  bool normalized = true;                     // shares: a token's weights add up to scale
  float scale = 1.0f;
};

// Products with the experts that tokens have chosen.
struct ExpertLinearArgs {
  TensorView x;           // [T, K] act, or [T * k, K]: a row for each choice
  Weight weight;          // [E * N, K]: expert e is rows [e * N, (e + 1) * N)
  TensorView bias = {};   // [E * N] weight, or absent
  TensorView expert_ids;  // [T, k] int32
  TensorView out;         // [T * k, N] act: row t * k + j of token t's choice j
};

// What a token's experts give, weighted, into the residual stream.
struct AddExpertsArgs {
  TensorView x;        // [T * k, H] act
  TensorView weights;  // [T, k] float32
  TensorView out;      // [T, H] float32: is added to
};

// Several ops in one. Their tensors between the parts (norm.out is linear.x, and so on) are
// scratch: what they hold afterwards is undefined.

// RmsNorm, Linear.
struct NormLinearArgs {
  RmsNormArgs norm;
  LinearArgs linear;  // .x is norm.out
};

// RmsNorm, Linear, RopeAppendKv: what stands before attention in a layer.
struct QkvRopeAppendArgs {
  RmsNormArgs norm;
  LinearArgs linear;        // .x is norm.out
  RopeAppendKvArgs append;  // .qkv is linear.out
};

// RmsNorm, Linear, GateMul: the first half of the MLP.
struct GateUpMulArgs {
  RmsNormArgs norm;      // or absent, without norm.x: linear.x is normed
  LinearArgs linear;     // .x is norm.out
  GateMulArgs gate_mul;  // .gate_up is linear.out
};

// SelectExperts, ExpertLinear, GateMul, ExpertLinear, AddExperts: an MLP behind its router. The
// choices and their weights are kept.
struct ExpertMlpArgs {
  SelectExpertsArgs select;
  ExpertLinearArgs gate_up;  // .expert_ids is select.expert_ids
  GateMulArgs gate_mul;      // .gate_up is gate_up.out
  ExpertLinearArgs down;     // .x is gate_mul.out, .expert_ids is select.expert_ids
  AddExpertsArgs add;        // .x is down.out, .weights is select.weights
};

// AppendShadow of each row's newest token, ScoreKeys.
struct AppendShadowScoreKeysArgs {
  AppendShadowArgs append;  // positions[b] = seq_lens[b] - 1, -1 of an idle row; seq_idx[b] = b
  ScoreKeysArgs score;      // .shadow is append.shadow
};

// In place: logits x scale, then softcap * tanh(logits / softcap).
struct ScaleLogitsArgs {
  TensorView logits;  // [R, V] float32
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: none
};

struct GatherRowsArgs {
  TensorView x;     // [T, H] float32
  TensorView rows;  // [R] int32
  TensorView out;   // [R, H] float32
};

// Sampling parameters of one row, as the device reads them.
struct SamplingRow {
  float temperature;         // 0 = greedy
  float top_p;               // 1 = off
  float min_p;               // 0 = off
  float repetition_penalty;  // 1 = off
  float frequency_penalty;   // 0 = off
  float presence_penalty;    // 0 = off
  int32_t top_k;             // 0 = off
  int32_t slot;              // row of `history` and of `biases`
  int32_t num_biases;        // of the slot
  uint16_t has_mask;         // 1: draws only what the row's mask allows
  uint16_t keeps_logits;     // 1: the row's logits stay as they are; it works on a copy
  uint64_t seed;
};
static_assert(sizeof(SamplingRow) == 48, "SamplingRow is copied to the device as bytes");

// Returns whether the draw depends on the tokens before it, and marks its own.
TIDAL_HOST_DEVICE inline bool UsesHistory(const SamplingRow& row) {
  return row.repetition_penalty != 1.0f || row.frequency_penalty != 0.0f ||
         row.presence_penalty != 0.0f;
}

// An addition to the logit of a token.
struct TokenBias {
  int32_t token_id;
  float bias;
};
static_assert(sizeof(TokenBias) == 8, "TokenBias is copied to the device as bytes");

// What `history` holds of a token: 1 if it was given, and 2 for each time it was generated.
inline constexpr int32_t kGivenMark = 1;
inline constexpr int32_t kGeneratedMark = 2;

// A mask has one bit for each token of the vocabulary, token i at bit i % 32 of word i / 32: 1 if
// it may be drawn.
inline constexpr int64_t kMaskWordBits = 32;
inline int64_t NumMaskWords(int64_t vocab_size) {
  return (vocab_size + kMaskWordBits - 1) / kMaskWordBits;
}

// Logits to the next token, in this order: biases; repetition penalty (a logit above 0 is divided,
// any other multiplied), frequency and presence penalty (subtracted); mask; temperature, top-k,
// top-p, min-p, draw. Greedy: highest logit, lowest id on ties. Otherwise the Gumbel-max rule with
// noise from Philox4x32-10(key = seed, counter = (position of the new token, token id)): an exact
// draw that depends on nothing else. Formulas: core/philox.h.
struct SampleArgs {
  TensorView logits;     // [B, V] float32; overwritten, but for rows that keep them
  TensorView rows;       // [B, sizeof(SamplingRow)] uint8
  TensorView seq_lens;   // [B] int32: tokens before the new one, so also its position; 0 = idle row
  TensorView history;    // [num_slots, V] int32: marks of the sequence's tokens; a draw that uses
                         // them adds its own
  TensorView biases;     // [num_slots, M * sizeof(TokenBias)] uint8, no token twice in a row
  TensorView masks;      // [B, W] int32, W = NumMaskWords(V)
  TensorView copies;     // [C, V] float32: where rows below C work that keep their logits; none of
                         // the others does
  TensorView token_ids;  // out [B] int32; -1 if the row holds a NaN or +inf, or nothing above -inf
                         // that may be drawn; 0 if idle
};

// Log-probabilities, log(softmax(logits)), of one token of a row and of its most likely ones. Of
// equals the lower id comes first.
struct LogprobsArgs {
  TensorView logits;     // [B, V] float32
  TensorView rows;       // [R] int32: which of the B rows
  TensorView token_ids;  // [R] int32; -1 = none
  TensorView logprobs;   // out [R, 1 + K] float32: of the token, -inf without one; then the K most
                         // likely, -inf past those above -inf
  TensorView ids;        // out [R, 1 + K] int32: the rank of the token, 1 = most likely, 0 without
                         // one; then the K most likely, -1 past those above -inf
};

// How many sets of positions one selection has.
inline int64_t NumSets(Granularity granularity, int64_t num_q_heads, int64_t num_kv_heads) {
  switch (granularity) {
    case Granularity::kKvHead:
      return num_kv_heads;
    case Granularity::kHead:
      return num_q_heads;
    case Granularity::kLayer:
      return 1;
  }
  return 0;
}

}  // namespace tidal
