// The table of a model's tensors: names, shapes, and what is stacked into one device tensor.
#include "model/weight_placement.h"

#include <algorithm>
#include <utility>

#include "core/shape.h"
#include "tidal/error.h"
#include "tidal/quantized_weights.h"

namespace tidal {
namespace {

// Fills the table for one model; the targets are the tensors of `weights`.
class Planner {
 public:
  Planner(const ModelConfig& model, Head head, ModelWeights& weights) : model_(model), head_(head) {
    weights.layers.resize(static_cast<size_t>(model.num_layers));
    PlanModel(weights);
  }

  std::vector<Placement> Take() { return std::move(placements_); }

 private:
  void PlanModel(ModelWeights& weights) {
    const ModelConfig& m = model_;
    Add(&weights.embedding, {"model.embed_tokens.weight"}, {m.vocab_size}, m.hidden_size,
        "vocab_size x hidden_size");
    for (int64_t i = 0; i < m.num_layers; ++i) PlanLayer(i, weights.layers[static_cast<size_t>(i)]);
    AddNorm(&weights.final_norm, "model.norm.weight");
    if (head_ == Head::kOwn) {
      AddMatrix(&weights.lm_head, {kLmHeadName}, {m.vocab_size}, m.hidden_size,
                "vocab_size x hidden_size");
      placements_.back().is_for_prompts = false;
    }
  }

  void PlanLayer(int64_t index, LayerWeights& layer) {
    const ModelConfig& m = model_;
    std::string prefix = "model.layers." + std::to_string(index) + ".";
    const std::string attn = prefix + "self_attn.", mlp = prefix + "mlp.";
    std::vector<std::string> qkv = {attn + "q_proj", attn + "k_proj", attn + "v_proj"};
    std::vector<int64_t> qkv_rows = {m.q_size(), m.kv_size(), m.kv_size()};
    std::string heads = Concat("num_q_heads ", m.num_q_heads, ", num_kv_heads ", m.num_kv_heads,
                               ", head_dim ", m.head_dim, ", hidden_size ", m.hidden_size);

    const RowRuns q = RotatedRows(m.num_q_heads), k = RotatedRows(m.num_kv_heads);
    const RowRuns v = {{0, m.kv_size()}};
    if (m.input_norms) AddNorm(&layer.input_norm, prefix + "input_layernorm.weight");
    AddMatrix(&layer.qkv, WithSuffix(qkv, ".weight"), qkv_rows, m.hidden_size, heads);
    placements_.back().runs = {q, k, v};
    if (m.qkv_bias) {
      Add(&layer.qkv_bias, WithSuffix(qkv, ".bias"), qkv_rows, 0, heads);
      placements_.back().runs = {q, k, v};
    }
    if (m.qk_norm) {
      AddHeadNorm(&layer.q_norm, attn + "q_norm.weight", m.wide_qk_norm ? m.num_q_heads : 1);
      AddHeadNorm(&layer.k_norm, attn + "k_norm.weight", m.wide_qk_norm ? m.num_kv_heads : 1);
    }
    if (m.attention_sinks) {
      Add(&layer.sinks, {attn + "sinks"}, {m.num_q_heads}, 0, "num_q_heads");
      placements_.back().is_float32 = true;
    }
    AddMatrix(&layer.o, {attn + "o_proj.weight"}, {m.hidden_size}, m.q_size(), heads);
    if (m.o_bias) Add(&layer.o_bias, {attn + "o_proj.bias"}, {m.hidden_size}, 0, "hidden_size");

    if (m.input_norms) AddNorm(&layer.post_norm, prefix + "post_attention_layernorm.weight");
    if (m.layer(index).has_experts) {
      PlanExperts(mlp, layer);
    } else {
      PlanMlp(mlp, m.intermediate_size, "intermediate_size", layer);
    }
    if (m.branch_norms) {
      AddNorm(&layer.o_norm, prefix + "post_self_attn_layernorm.weight");
      AddNorm(&layer.down_norm, prefix + "post_mlp_layernorm.weight");
    }
  }

  // `field`: what says its intermediate size.
  void PlanMlp(const std::string& mlp, int64_t size, const char* field, LayerWeights& layer) {
    const ModelConfig& m = model_;
    const std::string sizes = Concat("hidden_size ", m.hidden_size, ", ", field, " ", size);
    const std::vector<std::string> gate_up = {mlp + "gate_proj", mlp + "up_proj"};
    const std::vector<int64_t> rows = {size, size};
    AddMatrix(&layer.gate_up, WithSuffix(gate_up, ".weight"), rows, m.hidden_size, sizes);
    AddMatrix(&layer.down, {mlp + "down_proj.weight"}, {m.hidden_size}, size, sizes);
    if (!m.mlp_bias) return;
    Add(&layer.gate_up_bias, WithSuffix(gate_up, ".bias"), rows, 0, sizes);
    Add(&layer.down_bias, {mlp + "down_proj.bias"}, {m.hidden_size}, 0, "hidden_size");
  }

  void PlanExperts(const std::string& mlp, LayerWeights& layer) {
    const ModelConfig& m = model_;
    const std::string sizes = Concat("num_experts ", m.num_experts, ", hidden_size ", m.hidden_size,
                                     ", expert_intermediate_size ", m.expert_intermediate_size);
    Add(&layer.router, {mlp + "gate.weight"}, {m.num_experts}, m.hidden_size, sizes);
    placements_.back().may_be_float32 = !m.mlp_bias;  // which would be of the same dtype
    if (m.router_correction) {
      Add(&layer.router_correction, {mlp + "gate.e_score_correction_bias"}, {m.num_experts}, 0,
          sizes);
      placements_.back().is_float32 = true;
    }
    if (m.shared_expert_size > 0) {
      PlanMlp(mlp + "shared_experts.", m.shared_expert_size, "shared_expert_size", layer);
    }
    if (m.shared_expert_gate) {
      Add(&layer.shared_gate, {mlp + "shared_expert_gate.weight"}, {1}, m.hidden_size, sizes);
    }
    std::vector<std::string> gate_up, down;
    for (int64_t e = 0; e < m.num_experts; ++e) {
      const std::string expert = Concat(mlp, "experts.", e, ".");
      gate_up.push_back(expert + "gate_proj");
      gate_up.push_back(expert + "up_proj");
      down.push_back(expert + "down_proj");
    }
    const std::vector<int64_t> gate_up_rows(gate_up.size(), m.expert_intermediate_size);
    const std::vector<int64_t> down_rows(down.size(), m.hidden_size);
    AddMatrix(&layer.experts_gate_up, WithSuffix(gate_up, ".weight"), gate_up_rows, m.hidden_size,
              sizes);
    placements_.back().is_for_prompts = false;
    AddMatrix(&layer.experts_down, WithSuffix(down, ".weight"), down_rows,
              m.expert_intermediate_size, sizes);
    placements_.back().is_for_prompts = false;
    if (!m.mlp_bias) return;
    Add(&layer.router_bias, {mlp + "gate.bias"}, {m.num_experts}, 0, sizes);
    Add(&layer.experts_gate_up_bias, WithSuffix(gate_up, ".bias"), gate_up_rows, 0, sizes);
    Add(&layer.experts_down_bias, WithSuffix(down, ".bias"), down_rows, 0, sizes);
  }

  // The rows of q or k so that dim i turns with dim i + head_dim / 2, as the engine has it: a
  // checkpoint has those that turn in front, and turns dim i with dim i + rotary_dim / 2, or every
  // other dim with its neighbour. Scores are the same for any order that q and k share.
  RowRuns RotatedRows(int64_t num_heads) const {
    const int64_t dim = model_.head_dim, rotary = model_.rotary_dim(), still = (dim - rotary) / 2;
    const bool interleaved = model_.rope.interleaved;
    if (still == 0 && !interleaved) return {{0, num_heads * dim}};
    RowRuns runs;
    for (int64_t begin = 0; begin < num_heads * dim; begin += dim) {
      for (int64_t half : {0, 1}) {
        if (interleaved) {
          for (int64_t i = 0; i < rotary / 2; ++i) runs.push_back({begin + 2 * i + half, 1});
        } else {
          runs.push_back({begin + half * rotary / 2, rotary / 2});
        }
        if (still > 0) runs.push_back({begin + rotary + half * still, still});
      }
    }
    return runs;
  }

  void Add(TensorView* target, std::vector<std::string> names, std::vector<int64_t> rows,
           int64_t columns, std::string expected_from) {
    placements_.push_back(
        {target, nullptr, std::move(names), std::move(rows), columns, std::move(expected_from)});
    for (int64_t count : placements_.back().rows) placements_.back().runs.push_back({{0, count}});
  }

  void AddNorm(TensorView* target, std::string name) {
    Add(target, {std::move(name)}, {model_.hidden_size}, 0, "hidden_size");
    AddOffset(placements_.back());
  }

  void AddHeadNorm(TensorView* target, std::string name, int64_t num_heads) {
    const std::string heads = num_heads == 1 ? "" : Concat(num_heads, " heads x ");
    Add(target, {std::move(name)}, {num_heads * model_.head_dim}, 0, heads + "head_dim");
    placements_.back().runs = {RotatedRows(num_heads)};
    AddOffset(placements_.back());
  }

  void AddOffset(Placement& norm) const {
    norm.is_float32 = model_.norm_offset != 0.0;
    norm.added = static_cast<float>(model_.norm_offset);
  }

  void AddMatrix(Weight* target, std::vector<std::string> names, std::vector<int64_t> rows,
                 int64_t columns, std::string expected_from) {
    Add(&target->data, std::move(names), std::move(rows), columns, std::move(expected_from));
    placements_.back().matrix = target;
    placements_.back().is_for_prompts = true;
  }

  static std::vector<std::string> WithSuffix(std::vector<std::string> stems, const char* suffix) {
    for (std::string& stem : stems) stem += suffix;
    return stems;
  }

  const ModelConfig& model_;
  Head head_;
  std::vector<Placement> placements_;
};

}  // namespace

std::vector<int64_t> ShapeOf(const Placement& placement, size_t i) {
  if (placement.columns == 0) return {placement.rows[i]};
  return {placement.rows[i], placement.columns};
}

int64_t NumRows(const Placement& placement) {
  int64_t rows = 0;
  for (int64_t count : placement.rows) rows += count;
  return rows;
}

int64_t NumElements(const Placement& placement) {
  return NumRows(placement) * std::max<int64_t>(placement.columns, 1);
}

Head HeadOf(const ModelConfig& model) {
  return model.tie_word_embeddings ? Head::kTied : Head::kOwn;
}

Head HeadOf(const ModelConfig& model, const WeightSource& source) {
  return source.FindCodes(kLmHeadName) != nullptr ? Head::kOwn : HeadOf(model);
}

std::vector<Placement> PlanWeights(const ModelConfig& model, Head head, ModelWeights& weights) {
  return Planner(model, head, weights).Take();
}

}  // namespace tidal
