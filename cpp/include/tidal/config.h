// What the checkpoint is (ModelConfig), which layers choose positions (PlanConfig), what the user
// wants of the engine (DecodeConfig) and of one request (SamplingParams). Plain values; each
// setting has its one default here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "tidal/device.h"
#include "tidal/dtype.h"

namespace tidal {

enum class RopeType : int32_t { kDefault, kLinear, kDynamic, kLlama3, kYarn, kLongrope };

// Rotary position embedding, with the parameters of every type Hugging Face configs name.
// Meaning and formulas: src/model/rope.cc.
struct RopeConfig {
  RopeType type = RopeType::kDefault;
  double theta = 10000.0;
  int64_t rotary_dim = 0;                        // dims of a head that turn, its first; 0: all
  bool interleaved = false;                      // dim 2 i turns with dim 2 i + 1
  double factor = 1.0;                           // linear, dynamic, llama3, yarn, longrope
  double low_freq_factor = 1.0;                  // llama3
  double high_freq_factor = 4.0;                 // llama3
  int64_t original_max_position_embeddings = 0;  // llama3, yarn, longrope
  std::optional<double> attention_factor;        // yarn, longrope; derived from factor if unset
  double beta_fast = 32.0;                       // yarn
  double beta_slow = 1.0;                        // yarn
  double mscale = 0.0;                           // yarn; 0 = unset
  double mscale_all_dim = 0.0;                   // yarn; 0 = unset
  bool truncate = true;                          // yarn
  // The query at position p is multiplied by 1 + query_scale_beta * log(1 + floor(p / original)),
  // with original_max_position_embeddings (ministral3); 0: by 1.
  double query_scale_beta = 0.0;
  std::vector<double> short_factor;  // longrope, [rotary_dim / 2]
  std::vector<double> long_factor;   // longrope, [rotary_dim / 2]
};

// What the layers of a model may differ in.
struct LayerConfig {
  bool has_rope = true;      // false: its q and k are not rotated (NoPE)
  int64_t window = 0;        // a token attends to so many last ones, itself included; 0: to all
  bool has_experts = false;  // its MLP is one of experts
  // An fp8 cache holds keys / k_scale and values / v_scale, in the range of fp8's numbers.
  float k_scale = 1.0f;
  float v_scale = 1.0f;

  bool operator==(const LayerConfig&) const = default;
};

// What the MLP makes of its gate and of up, which stands beside it.
enum class Activation : int32_t {
  kSilu,           // up * gate / (1 + exp(-gate))
  kGeluTanh,       // up * GELU(gate), by tanh (arXiv 1606.08415)
  kClampedSwiglu,  // (up + 1) * gate / (1 + exp(-alpha * gate)), both clamped first (gpt_oss)
};

// How likely an expert is, of the numbers that a token's router gives.
enum class RouterScore : int32_t {
  kSoftmax,  // over all experts
  kSigmoid,  // each for itself
};

// A decoder-only transformer of the Llama kind: RMSNorm, RoPE, grouped-query attention, gated MLP.
struct ModelConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;      // with experts, of each of them and of what chooses them
  bool input_norms = true;    // RMSNorm of what attention and MLP read; not of olmo2
  bool branch_norms = false;  // RMSNorm of what attention and MLP add (glm4)
  bool qk_norm = false;       // RMSNorm of each head of q and k before RoPE (qwen3)
  bool wide_qk_norm = false;  // with qk_norm: of all heads of q, and of k, together (olmo2)
  double norm_offset = 0.0;   // is added to the weights of norms (gemma)
  Activation activation = Activation::kSilu;
  // For kClampedSwiglu: a gate is at most the limit, up at most that far from 0.
  double swiglu_limit = 7.0;
  double swiglu_alpha = 1.702;
  // Experts of a layer, each an MLP of expert_intermediate_size, of which every token has the most
  // likely ones, weighted by how likely they are.
  int64_t num_experts = 0;
  int64_t experts_per_token = 0;
  int64_t expert_intermediate_size = 0;
  RouterScore router_score = RouterScore::kSoftmax;
  bool router_correction = false;  // a number of each expert counts in the choice, not in weights
  bool normalized_routing = true;  // a token's weights add up to 1
  double routing_scale = 1.0;      // multiplies the weights
  // Beside them an MLP of this size that all tokens have (a shared expert); 0: none. With a gate it
  // is weighted by the sigmoid of a product with the token (qwen2_moe).
  int64_t shared_expert_size = 0;
  bool shared_expert_gate = false;
  bool attention_sinks = false;  // a score of each head without a value, in the softmax (gpt_oss)
  bool tie_word_embeddings = false;
  double embedding_scale = 1.0;  // multiplies the embeddings
  double residual_scale = 1.0;   // multiplies what attention and MLP add
  double attention_scale = 0.0;  // of q.k; 0: 1 / sqrt(head_dim)
  double logit_scale = 1.0;      // multiplies the logits
  // Scores, and logits, become softcap * tanh(x / softcap) (gemma2); 0: stay as they are.
  double attention_softcap = 0.0;
  double logit_softcap = 0.0;
  RopeConfig rope;
  std::optional<RopeConfig> window_rope;  // of layers with a window; unset: rope
  std::vector<LayerConfig> layers;        // [num_layers]; empty: all as by default

  int64_t group_size() const { return num_q_heads / num_kv_heads; }
  int64_t q_size() const { return num_q_heads * head_dim; }
  int64_t kv_size() const { return num_kv_heads * head_dim; }
  int64_t rotary_dim() const { return rope.rotary_dim == 0 ? head_dim : rope.rotary_dim; }
  LayerConfig layer(int64_t index) const {
    return layers.empty() ? LayerConfig{} : layers[static_cast<size_t>(index)];
  }
  bool has_windows() const {
    return std::any_of(layers.begin(), layers.end(),
                       [](const LayerConfig& each) { return each.window > 0; });
  }
  bool has_experts() const {
    return std::any_of(layers.begin(), layers.end(),
                       [](const LayerConfig& each) { return each.has_experts; });
  }
};

// Which heads share one set of positions.
enum class Granularity : int32_t {
  kKvHead,  // one set per KV head; softmax over all positions, pooled over the group's query heads
  kHead,    // one set per query head; raw q.k (the paper)
  kLayer,   // one set for all heads; softmax, pooled over all query heads
};

enum class Pooling : int32_t { kSum, kMax };

// What scored layers read to choose.
enum class Shadow : int32_t {
  kNone,  // the keys themselves
  kInt4,  // copies of them in 4 bits (core/shadow_code.h)
};

inline constexpr int64_t kAutomatic = -1;  // where 0 has a meaning of its own

inline constexpr double kAutomaticMass = 0.98;
inline constexpr int64_t kAutomaticBudget = 4096;
inline constexpr int64_t kAutomaticMinBudget = 64;

// Bounds the memory of a pass over drafts, of which the logits are most: [max_batch_size x 65,
// vocab_size] float32.
inline constexpr int64_t kMaxDraftTokens = 64;
// Longer drafts gain little: of 17 tokens one dense pass is a small part.
inline constexpr int64_t kMaxAutomaticDrafts = 16;

// Which layers choose positions, and how. Holds nothing of a device.
struct PlanConfig {
  // Layers that choose positions, each list strictly ascending; both empty: dense decoding.
  std::vector<int64_t> select_layers;  // S: read everything densely on the way
  std::vector<int64_t> scored_layers;  // P: score all keys, attend to what they chose
  int64_t full_layers = 2;             // so many first layers choose nothing
  // Positions a sparse layer attends to, per set, >= 1. kAutomatic: as many as top_p_mass asks for,
  // kAutomaticMass if that is 1, up to kAutomaticBudget.
  int64_t token_budget = 1024;
  // Below 1, an adaptive budget: of the token_budget positions a set keeps as few as hold this
  // share of the softmax of its heads together, but at least min_token_budget.
  double top_p_mass = 1.0;       // in (0, 1]
  int64_t min_token_budget = 0;  // with top_p_mass; 0: kAutomaticMinBudget, if the budget allows
  Granularity granularity = Granularity::kLayer;
  Pooling pooling = Pooling::kSum;
  Shadow shadow = Shadow::kNone;  // needs scored_layers
  int64_t sink_tokens = 1;        // first positions, always chosen
  // Last positions, always chosen, >= 1. kAutomatic: a quarter of those that every set has, which
  // are token_budget, or min_token_budget of an adaptive budget.
  int64_t recent_tokens = kAutomatic;
  // Sequences of at most this length are decoded densely.
  int64_t sparse_min_context = kAutomatic;  // as long as that is the faster way on the device

  // Errors of sparse steps: they leave slightly wrong K and V in the layers after the first sparse
  // one. Every so many tokens that a sequence decoded sparsely, a dense pass rewrites theirs.
  int64_t correction_interval = 0;  // 0: never; with verify it must be

  bool operator==(const PlanConfig&) const = default;
};

// How the matrices of a model's layers are kept, or its output matrix.
enum class KeepWeights : int32_t {
  kAsStored,  // in the codes of the checkpoint, if it has some that the device's products read
  kDecoded,   // as numbers
  kFloat8,    // in codes (tidal/weights.h) to which a checkpoint's numbers are rounded
  kInt4,
  kMxfp4,  // likewise those of experts, the others as numbers
};

// What products of prompts with a layer's matrix in fp8 codes make of their inputs.
enum class KeepActivations : int32_t {
  kAsStored,  // what the checkpoint says, on a device that gains by it
  kPlain,     // nothing: they stay as they are
  kFloat8,    // fp8 codes too (LinearArgs in backend/op_args.h)
};

// What drafts the tokens that a dense pass checks.
enum class Drafts : int32_t {
  kTidal,  // sparse steps
  // The text so far: what followed its last tokens when they occurred in it before. Where they
  // never did, a dense step decides on the next token. Dense plans draft so too.
  kNgram,
  kBoth,  // the text where it has drafts, else sparse steps
};

struct DecodeConfig : PlanConfig {
  Device device;
  DType dtype = DType::kBFloat16;  // of the weights that are numbers
  // As whoever makes the WeightSource heeds.
  KeepWeights weight_format = KeepWeights::kAsStored;   // of the layers
  KeepWeights lm_head_format = KeepWeights::kAsStored;  // kDecoded where weight_format is
  // Likewise; a decoder's own is what its weights then say.
  KeepActivations activation_format = KeepActivations::kAsStored;
  // The cache's: a float type, which on CUDA must equal dtype; fp8; or on the CPU int8.
  DType kv_dtype = DType::kBFloat16;

  // Tokens are drafted first. One dense pass over the drafts of a sequence draws the tokens that
  // dense decoding would have, and keeps the drafts up to the first that differs.
  bool verify = false;
  Drafts drafts = Drafts::kTidal;
  int64_t draft_tokens = 0;  // per pass; 0: by how many were kept, up to kMaxAutomaticDrafts

  // Memory.
  int64_t max_seq_len = 0;     // tokens of one sequence, prompt and output
  int64_t max_batch_size = 8;  // sequences decoded together
  int64_t page_size = 64;      // tokens per KV page
  int64_t num_pages = 0;       // 0: what memory allows, at most max_batch_size x max_seq_len
  // Share of the memory that weights, cache and everything else may take in all, in (0, 1]: of a
  // GPU's own; of a host's, which other programs use too, what is free.
  double gpu_memory_utilization = 0.9;

  // Host memory for the pages of paused requests, which go on from them; what has no room there
  // reads its tokens again.
  double host_kv_gib = 0.0;

  // Whether prompts find the pages of what was read before (kv/prefix_cache.h).
  bool prefix_cache = true;

  // Execution.
  int64_t prefill_chunk = 0;  // prompt tokens per pass; 0: the backend's choice
  // While anybody decodes, a pass over prompts takes at most so long, > 0, and decoding gets at
  // least this share of the time, in [0, 1). A share of 0 reads all prompts first.
  double max_chunk_ms = 60.0;
  double decode_share = 0.25;
  bool cuda_graphs = true;  // false: launch every kernel of a step by itself
  // Whether on CUDA a text is the same token for token whatever else runs, and verified decoding
  // that of dense decoding. Changes nothing on the CPU: its steps are always so, and chunks of more
  // than 64 tokens of prompts to rounding.
  bool batch_invariant = false;
  int32_t num_threads = 0;  // CPU backend; 0: one per processor it may use
};

inline constexpr double kMaxHostKvGib = 65536.0;

// Bounds of what is added to logits, of either sign, as in the OpenAI API.
inline constexpr double kMaxPenalty = 2.0;  // of frequency and presence
inline constexpr double kMaxLogitBias = 100.0;
// Logits are divided by it, or multiplied, in float32: beyond this hardly one would stay finite.
inline constexpr double kMaxRepetitionPenalty = 1e6;  // and 1 / it at least
inline constexpr int64_t kMaxLogitBiases = 1024;
inline constexpr int64_t kMaxLogprobs = 20;  // of the most likely tokens, beside the drawn one's

// How one sequence chooses its next tokens and when it ends. "Generated" tokens are those after the
// ones that the call was given.
struct SamplingParams {
  int64_t max_new_tokens = 256;
  double temperature = 0.0;         // 0 = greedy: the highest logit, lowest id on ties
  int64_t top_k = 0;                // 0 = off
  double top_p = 1.0;               // (0, 1]
  double min_p = 0.0;               // [0, 1], relative to the most likely token
  double repetition_penalty = 1.0;  // 1 = off; applies to tokens of prompt and output
  double frequency_penalty = 0.0;   // taken off a token's logit each time it was generated
  double presence_penalty = 0.0;    // taken off it once it was generated
  uint64_t seed = 0;
  std::vector<int32_t> stop_token_ids;   // ending ids, the model's own end-of-text ids included
  int64_t min_new_tokens = 0;            // before so many, no ending id is drawn
  int64_t no_repeat_ngram_size = 0;      // no n tokens in a row occur twice; 0 = off
  std::map<int32_t, double> logit_bias;  // added to the logits; up to kMaxLogitBiases
  std::vector<int32_t> suppress_tokens;  // are never drawn
  std::vector<std::vector<int32_t>> bad_words;  // rows of tokens that are never completed
  std::vector<int32_t> allowed_token_ids;       // all others are never drawn; empty = off
  int64_t guide = 0;  // who is asked before each draw (tidal/guide.h); 0: nobody
};

}  // namespace tidal
