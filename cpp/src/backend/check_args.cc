#include "backend/check_args.h"

#include <cmath>

#include "backend/op_check.h"

namespace tidal {
namespace {

// What the decode ops share; returns their letters to tie further tensors to.
struct DecodeDims {
  Dim batch{"B"}, num_q_heads{"Hq"}, num_kv_heads{"Hkv"}, head_dim{"D"};
};

DecodeDims CheckQuery(OpCheck& op, const TensorView& q, const PagedKv& kv) {
  DecodeDims dims;
  op.Tensor("q", q, {&dims.batch, &dims.num_q_heads, &dims.head_dim}, op.act());
  op.Cache(kv, dims.batch, dims.num_kv_heads, dims.head_dim);
  op.Groups(dims.num_q_heads, dims.num_kv_heads);
  return dims;
}

DecodeDims CheckDecode(OpCheck& op, const AttentionArgs& args) {
  DecodeDims dims = CheckQuery(op, args.q, args.kv);
  op.Tensor("out", args.out, {&dims.batch, &dims.num_q_heads, &dims.head_dim}, op.act());
  op.Rule(args.rule, dims.num_q_heads);
  return dims;
}

// The sets that an op reads.
void CheckSets(OpCheck& op, DecodeDims& dims, const TensorView& token_idx,
               const TensorView& num_selected) {
  Dim num_sets{"num_sets"}, token_budget{"token_budget"};
  op.Tensor("token_idx", token_idx, {&dims.batch, &num_sets, &token_budget}, op.int32());
  op.Tensor("num_selected", num_selected, {&dims.batch, &num_sets}, op.int32());
  const int64_t sets = num_sets.size;
  TIDAL_CHECK(sets == dims.num_kv_heads.size || sets == dims.num_q_heads.size || sets == 1,
              InvalidArgument, op.name(), ": token_idx: got num_sets = ", sets,
              ", expected Hkv = ", dims.num_kv_heads.size, ", Hq = ", dims.num_q_heads.size,
              " or 1");
}

void CheckScores(OpCheck& op, DecodeDims& dims, const TensorView& scores, Kind& kind,
                 const TensorView& lse) {
  Dim max_len{"max_len"};
  op.Tensor("scores", scores, {&dims.batch, &dims.num_q_heads, &max_len}, kind);
  op.Tensor("lse", lse, {&dims.batch, &dims.num_q_heads}, op.float32());
}

// In an op of several parts the one's output is the next one's input.
}  // namespace

void Check(const EmbedArgs& args, std::optional<DType> act) {
  OpCheck op("Embed", act);
  Dim tokens{"T"}, hidden{"H"}, vocab{"V"};
  op.Tensor("token_ids", args.token_ids, {&tokens}, op.int32());
  op.Tensor("table", args.table, {&vocab, &hidden}, op.weight());
  op.Tensor("out", args.out, {&tokens, &hidden}, op.float32());
}

void Check(const RmsNormArgs& args, std::optional<DType> act) {
  OpCheck op("RmsNorm", act);
  Dim tokens{"T"}, hidden{"H"};
  op.Tensor("x", args.x, {&tokens, &hidden}, op.float32());
  op.Optional("weight", args.weight, {&hidden}, op.norm());
  op.Tensor("out", args.out, {&tokens, &hidden}, args.adds ? op.float32() : op.act());
  TIDAL_CHECK(args.weight || !args.adds, InvalidArgument,
              "RmsNorm: weight: got none with adds, expected one");
}

void Check(const LinearArgs& args, std::optional<DType> act) {
  OpCheck op("Linear", act);
  Dim tokens{"T"}, in_features{"K"}, out_features{"N"};
  op.Tensor("x", args.x, {&tokens, &in_features}, op.act());
  op.Matrix("weight", args.weight, out_features, in_features);
  op.Optional("bias", args.bias, {&out_features}, op.weight());
  const bool float_out =
      args.output == LinearOutput::kAccumulate || args.out.dtype == DType::kFloat32;
  op.Tensor("out", args.out, {&tokens, &out_features}, float_out ? op.float32() : op.act());
  if (!args.quantizes_inputs) return;
  TIDAL_CHECK(args.weight.codes == WeightCodes::kFloat8, InvalidArgument,
              "Linear: quantizes_inputs: got another weight, expected codes of float8");
  const float scale = args.weight.input_scale;
  TIDAL_CHECK(std::isfinite(scale) && scale >= 0.0f, InvalidArgument,
              "Linear: weight.input_scale: got ", scale, ", expected a finite number >= 0");
}

void Check(const RopeTableArgs& args, std::optional<DType> act) {
  OpCheck op("RopeTable", act);
  Dim tokens{"T"}, batch{"B"}, half{"D / 2"};
  op.Tensor("positions", args.positions, {&tokens}, op.int32());
  op.Tensor("seq_idx", args.seq_idx, {&tokens}, op.int32());
  op.Tensor("inv_freq", args.inv_freq, {&batch, &half}, op.float32());
  Dim head_dim{"D", 2 * half.size};
  op.Tensor("cos_sin", args.cos_sin, {&tokens, &head_dim}, op.float32());
  op.Optional("q_cos_sin", args.q_cos_sin, {&tokens, &head_dim}, op.float32());
  TIDAL_CHECK(!args.q_cos_sin || args.original_len >= 1, InvalidArgument,
              "RopeTable: original_len: got ", args.original_len,
              " with q_cos_sin, expected at least 1");
}

void Check(const RopeAppendKvArgs& args, std::optional<DType> act) {
  OpCheck op("RopeAppendKv", act);
  Dim tokens{"T"}, batch{"B"}, num_q_heads{"Hq"}, num_kv_heads{"Hkv"}, head_dim{"D"};
  op.Tensor("q", args.q, {&tokens, &num_q_heads, &head_dim}, op.act());
  op.Cache(args.kv, batch, num_kv_heads, head_dim);
  op.Groups(num_q_heads, num_kv_heads);
  Dim qkv{"(Hq + 2 Hkv) * D", (num_q_heads.size + 2 * num_kv_heads.size) * head_dim.size};
  op.Tensor("qkv", args.qkv, {&tokens, &qkv}, op.act());
  op.Tensor("cos_sin", args.cos_sin, {&tokens, &head_dim}, op.float32());
  op.HeadNorm("q_norm", args.q_norm, num_q_heads, head_dim);
  op.HeadNorm("k_norm", args.k_norm, num_kv_heads, head_dim);
  op.Optional("q_cos_sin", args.q_cos_sin, {&tokens, &head_dim}, op.float32());
  op.Tensor("positions", args.positions, {&tokens}, op.int32());
  op.Tensor("seq_idx", args.seq_idx, {&tokens}, op.int32());
  TIDAL_CHECK(head_dim.size % 2 == 0, InvalidArgument, "RopeAppendKv: q: got D = ", head_dim.size,
              ", expected an even head_dim");
  TIDAL_CHECK(args.appended == Appended::kAnywhere || tokens.size == batch.size, InvalidArgument,
              "RopeAppendKv: got ", tokens.size, " tokens as the newest of ", batch.size,
              " rows, expected one of each");
}

void Check(const AttentionPrefillArgs& args, std::optional<DType> act) {
  OpCheck op("AttentionPrefill", act);
  Dim tokens{"T"}, batch{"B"}, num_q_heads{"Hq"}, num_kv_heads{"Hkv"}, head_dim{"D"};
  op.Tensor("q", args.q, {&tokens, &num_q_heads, &head_dim}, op.act());
  op.Tensor("out", args.out, {&tokens, &num_q_heads, &head_dim}, op.act());
  op.Cache(args.kv, batch, num_kv_heads, head_dim);
  op.Groups(num_q_heads, num_kv_heads);
  Dim starts{"B + 1", batch.size + 1};
  op.Tensor("q_starts", args.q_starts, {&starts}, op.int32());
  op.Rule(args.rule, num_q_heads);
}

void Check(const AttentionArgs& args, std::optional<DType> act) {
  OpCheck op("AttentionFull", act);
  CheckDecode(op, args);
}

void Check(const AttentionSelectArgs& args, std::optional<DType> act) {
  OpCheck op("AttentionSelect", act);
  DecodeDims dims = CheckDecode(op, args.attention);
  op.NoWindow(args.attention.rule);
  CheckScores(op, dims, args.scores, op.float32(), args.lse);
}

void Check(const AppendShadowArgs& args, std::optional<DType> act) {
  OpCheck op("AppendShadow", act);
  Dim tokens{"T"}, batch{"B"}, num_kv_heads{"Hkv"}, head_dim{"D"};
  op.Cache(args.kv, batch, num_kv_heads, head_dim);
  op.Shadow(args.shadow, args.kv);
  op.Tensor("positions", args.positions, {&tokens}, op.int32());
  op.Tensor("seq_idx", args.seq_idx, {&tokens}, op.int32());
}

void Check(const ScoreKeysArgs& args, std::optional<DType> act) {
  OpCheck op("ScoreKeys", act);
  DecodeDims dims = CheckQuery(op, args.q, args.kv);
  op.Rule(args.rule, dims.num_q_heads);
  op.NoWindow(args.rule);
  const bool has_shadow = static_cast<bool>(args.shadow.codes);
  CheckScores(op, dims, args.scores, has_shadow ? op.scores() : op.float32(), args.lse);
  if (has_shadow) op.Shadow(args.shadow, args.kv);
}

void Check(const SelectTopKArgs& args, std::optional<DType> act) {
  OpCheck op("SelectTopK", act);
  Dim batch{"B"}, num_q_heads{"Hq"}, num_kv_heads{"Hkv", args.num_kv_heads}, max_len{"max_len"};
  Dim token_budget{"token_budget"};
  op.Tensor("scores", args.scores, {&batch, &num_q_heads, &max_len}, op.scores());
  op.Tensor("lse", args.lse, {&batch, &num_q_heads}, op.float32());
  op.Tensor("seq_lens", args.seq_lens, {&batch}, op.int32());
  op.Groups(num_q_heads, num_kv_heads);
  Dim num_sets{"num_sets", NumSets(args.granularity, num_q_heads.size, num_kv_heads.size)};
  op.Tensor("token_idx", args.token_idx, {&batch, &num_sets, &token_budget}, op.int32());
  op.Tensor("num_selected", args.num_selected, {&batch, &num_sets}, op.int32());
  TIDAL_CHECK(
      args.sink_tokens >= 0 && args.recent_tokens >= 1 &&
          args.sink_tokens + args.recent_tokens <= token_budget.size,
      InvalidArgument, "SelectTopK: got sink_tokens ", args.sink_tokens, ", recent_tokens ",
      args.recent_tokens,
      ", expected sink_tokens >= 0, recent_tokens >= 1 and a sum of at most token_budget = ",
      token_budget.size);
  if (args.top_p_mass == 1.0f) return;
  TIDAL_CHECK(args.top_p_mass > 0.0f && args.top_p_mass < 1.0f, InvalidArgument,
              "SelectTopK: top_p_mass: got ", args.top_p_mass, ", expected in (0, 1]");
  TIDAL_CHECK(args.pooling == Pooling::kSum || args.granularity == Granularity::kHead,
              InvalidArgument, "SelectTopK: top_p_mass ", args.top_p_mass,
              ": got pooling kMax, expected kSum");
  TIDAL_CHECK(args.min_tokens >= args.sink_tokens + args.recent_tokens &&
                  args.min_tokens <= token_budget.size,
              InvalidArgument, "SelectTopK: min_tokens: got ", args.min_tokens, ", expected from ",
              args.sink_tokens + args.recent_tokens,
              " (sinks and recents) to token_budget = ", token_budget.size);
}

void Check(const AttentionSparseArgs& args, std::optional<DType> act) {
  OpCheck op("AttentionSparse", act);
  DecodeDims dims = CheckDecode(op, args.attention);
  op.NoWindow(args.attention.rule);
  CheckSets(op, dims, args.token_idx, args.num_selected);
}

void Check(const GateMulArgs& args, std::optional<DType> act) {
  OpCheck op("GateMul", act);
  Dim tokens{"T"}, intermediate{"I"};
  op.Tensor("out", args.out, {&tokens, &intermediate}, op.act());
  Dim both{"2 * I", 2 * intermediate.size};
  op.Tensor("gate_up", args.gate_up, {&tokens, &both}, op.act());
}

void Check(const GateRowsArgs& args, std::optional<DType> act) {
  OpCheck op("GateRows", act);
  Dim tokens{"T"}, hidden{"H"}, one{"1", 1}, intermediate{"I"};
  op.Tensor("x", args.x, {&tokens, &hidden}, op.act());
  op.Tensor("weight", args.weight, {&one, &hidden}, op.weight());
  op.Tensor("out", args.out, {&tokens, &intermediate}, op.act());
}

void Check(const SelectExpertsArgs& args, std::optional<DType> act) {
  OpCheck op("SelectExperts", act);
  Dim tokens{"T"}, experts{"E"}, chosen{"k"};
  op.Tensor("logits", args.logits, {&tokens, &experts}, op.float32());
  op.Optional("correction", args.correction, {&experts}, op.float32());
  op.Tensor("expert_ids", args.expert_ids, {&tokens, &chosen}, op.int32());
  op.Tensor("weights", args.weights, {&tokens, &chosen}, op.float32());
  TIDAL_CHECK(chosen.size >= 1 && chosen.size <= experts.size, InvalidArgument,
              "SelectExperts: expert_ids: got k = ", chosen.size,
              ", expected 1 to E = ", experts.size);
}

void Check(const ExpertLinearArgs& args, std::optional<DType> act) {
  OpCheck op("ExpertLinear", act);
  Dim tokens{"T"}, chosen{"k"}, rows{"T or T * k"}, in_features{"K"}, outputs{"E * N"};
  op.Tensor("expert_ids", args.expert_ids, {&tokens, &chosen}, op.int32());
  op.Tensor("x", args.x, {&rows, &in_features}, op.act());
  op.Matrix("weight", args.weight, outputs, in_features);
  Dim choices{"T * k", tokens.size * chosen.size}, out_features{"N"};
  op.Tensor("out", args.out, {&choices, &out_features}, op.act());
  TIDAL_CHECK(rows.size == tokens.size || rows.size == choices.size, InvalidArgument,
              "ExpertLinear: x: got ", rows.size, " rows, expected T = ", tokens.size,
              " or T * k = ", choices.size);
  TIDAL_CHECK(out_features.size >= 1 && outputs.size % out_features.size == 0, InvalidArgument,
              "ExpertLinear: weight: got ", outputs.size,
              " outputs, expected a multiple of N = ", out_features.size);
  op.Optional("bias", args.bias, {&outputs}, op.weight());
}

void Check(const AddExpertsArgs& args, std::optional<DType> act) {
  OpCheck op("AddExperts", act);
  Dim tokens{"T"}, chosen{"k"}, hidden{"H"};
  op.Tensor("weights", args.weights, {&tokens, &chosen}, op.float32());
  op.Tensor("out", args.out, {&tokens, &hidden}, op.float32());
  Dim choices{"T * k", tokens.size * chosen.size};
  op.Tensor("x", args.x, {&choices, &hidden}, op.act());
}

void Check(const ScaleLogitsArgs& args, std::optional<DType> act) {
  OpCheck op("ScaleLogits", act);
  Dim rows{"R"}, vocab{"V"};
  op.Tensor("logits", args.logits, {&rows, &vocab}, op.float32());
}

void Check(const GatherRowsArgs& args, std::optional<DType> act) {
  OpCheck op("GatherRows", act);
  Dim tokens{"T"}, rows{"R"}, hidden{"H"};
  op.Tensor("x", args.x, {&tokens, &hidden}, op.float32());
  op.Tensor("rows", args.rows, {&rows}, op.int32());
  op.Tensor("out", args.out, {&rows, &hidden}, op.float32());
}

void Check(const SampleArgs& args, std::optional<DType> act) {
  OpCheck op("Sample", act);
  Dim batch{"B"}, vocab{"V"}, num_slots{"num_slots"}, bias_bytes{"M * sizeof(TokenBias)"};
  Dim num_copies{"C"};
  Dim row_bytes{"sizeof(SamplingRow)", static_cast<int64_t>(sizeof(SamplingRow))};
  op.Tensor("logits", args.logits, {&batch, &vocab}, op.float32());
  op.Tensor("rows", args.rows, {&batch, &row_bytes}, op.uint8());
  op.Tensor("seq_lens", args.seq_lens, {&batch}, op.int32());
  op.Tensor("history", args.history, {&num_slots, &vocab}, op.int32());
  op.Tensor("biases", args.biases, {&num_slots, &bias_bytes}, op.uint8());
  Dim mask_words{"W", NumMaskWords(vocab.size)};
  op.Tensor("masks", args.masks, {&batch, &mask_words}, op.int32());
  op.Tensor("copies", args.copies, {&num_copies, &vocab}, op.float32());
  op.Tensor("token_ids", args.token_ids, {&batch}, op.int32());
}

void Check(const LogprobsArgs& args, std::optional<DType> act) {
  OpCheck op("Logprobs", act);
  Dim batch{"B"}, vocab{"V"}, rows{"R"}, num_given{"1 + K"};
  op.Tensor("logits", args.logits, {&batch, &vocab}, op.float32());
  op.Tensor("rows", args.rows, {&rows}, op.int32());
  op.Tensor("token_ids", args.token_ids, {&rows}, op.int32());
  op.Tensor("logprobs", args.logprobs, {&rows, &num_given}, op.float32());
  op.Tensor("ids", args.ids, {&rows, &num_given}, op.int32());
}

}  // namespace tidal
