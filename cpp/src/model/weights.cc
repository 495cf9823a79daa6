// From named tensors to LayerWeights: one table says which tensor goes where, one loop loads it.
#include "model/weights.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/float16.h"
#include "core/parallel.h"
#include "core/shape.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// Big enough to keep a disk and a bus busy and to be read by several threads, small enough to stay
// out of the way: two or four are in memory at a time.
constexpr int64_t kPieceBytes = int64_t{16} << 20;

// Tensors that are stacked, in order, into one device tensor.
struct Placement {
  TensorView* target;
  std::vector<std::string> names;
  std::vector<int64_t> rows;  // of each name
  int64_t columns;            // 0: vectors
  std::string expected_from;  // how the shape follows from the config, for the error
};

// Shape of the i-th name.
std::vector<int64_t> ShapeOf(const Placement& placement, size_t i) {
  if (placement.columns == 0) return {placement.rows[i]};
  return {placement.rows[i], placement.columns};
}

// Fills the table for one model; the targets are the tensors of `weights`.
class Planner {
 public:
  Planner(const ModelConfig& model, ModelWeights& weights) : model_(model) {
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
    Add(&weights.final_norm, {"model.norm.weight"}, {m.hidden_size}, 0, "hidden_size");
    if (!m.tie_word_embeddings) {
      Add(&weights.lm_head, {"lm_head.weight"}, {m.vocab_size}, m.hidden_size,
          "vocab_size x hidden_size");
    }
  }

  void PlanLayer(int64_t index, LayerWeights& layer) {
    const ModelConfig& m = model_;
    std::string prefix = "model.layers." + std::to_string(index) + ".";
    std::string attn = prefix + "self_attn.", mlp = prefix + "mlp.";
    std::vector<std::string> qkv = {attn + "q_proj", attn + "k_proj", attn + "v_proj"};
    std::vector<int64_t> qkv_rows = {m.q_size(), m.kv_size(), m.kv_size()};
    std::string heads = Concat("num_q_heads ", m.num_q_heads, ", num_kv_heads ", m.num_kv_heads,
                               ", head_dim ", m.head_dim, ", hidden_size ", m.hidden_size);
    std::string sizes =
        Concat("hidden_size ", m.hidden_size, ", intermediate_size ", m.intermediate_size);

    Add(&layer.input_norm, {prefix + "input_layernorm.weight"}, {m.hidden_size}, 0, "hidden_size");
    AddAll(&layer.qkv, qkv, ".weight", qkv_rows, m.hidden_size, heads);
    if (m.qkv_bias) AddAll(&layer.qkv_bias, qkv, ".bias", qkv_rows, 0, heads);
    if (m.qk_norm) {
      Add(&layer.q_norm, {attn + "q_norm.weight"}, {m.head_dim}, 0, "head_dim");
      Add(&layer.k_norm, {attn + "k_norm.weight"}, {m.head_dim}, 0, "head_dim");
    }
    Add(&layer.o, {attn + "o_proj.weight"}, {m.hidden_size}, m.q_size(), heads);
    if (m.o_bias) Add(&layer.o_bias, {attn + "o_proj.bias"}, {m.hidden_size}, 0, "hidden_size");

    std::vector<std::string> gate_up = {mlp + "gate_proj", mlp + "up_proj"};
    std::vector<int64_t> gate_up_rows = {m.intermediate_size, m.intermediate_size};
    Add(&layer.post_norm, {prefix + "post_attention_layernorm.weight"}, {m.hidden_size}, 0,
        "hidden_size");
    AddAll(&layer.gate_up, gate_up, ".weight", gate_up_rows, m.hidden_size, sizes);
    Add(&layer.down, {mlp + "down_proj.weight"}, {m.hidden_size}, m.intermediate_size, sizes);
    if (m.mlp_bias) {
      AddAll(&layer.gate_up_bias, gate_up, ".bias", gate_up_rows, 0, sizes);
      Add(&layer.down_bias, {mlp + "down_proj.bias"}, {m.hidden_size}, 0, "hidden_size");
    }
  }

  void Add(TensorView* target, std::vector<std::string> names, std::vector<int64_t> rows,
           int64_t columns, std::string expected_from) {
    placements_.push_back(
        {target, std::move(names), std::move(rows), columns, std::move(expected_from)});
  }

  void AddAll(TensorView* target, std::vector<std::string> stems, const std::string& suffix,
              std::vector<int64_t> rows, int64_t columns, std::string expected_from) {
    for (std::string& stem : stems) stem += suffix;
    Add(target, std::move(stems), std::move(rows), columns, std::move(expected_from));
  }

  const ModelConfig& model_;
  std::vector<Placement> placements_;
};

class Loader {
 public:
  Loader(Backend& backend, const ModelConfig& model, DType dtype, const WeightSource& source)
      : backend_(backend), model_(model), dtype_(dtype), source_(source) {}

  ModelWeights Load(const LoadProgress& progress) {
    ModelWeights weights;
    std::vector<Placement> placements = Planner(model_, weights).Take();
    for (const Placement& placement : placements) CheckShapes(placement);
    for (const Placement& placement : placements) total_ += Elements(placement);
    total_ *= DTypeBytes(dtype_);
    // All of the memory first: an allocation would hold up the copies under way.
    for (const Placement& placement : placements) Allocate(placement, weights);
    for (const Placement& placement : placements) LoadOne(placement, progress);
    source_.CheckUnchanged();
    if (model_.tie_word_embeddings) weights.lm_head = weights.embedding;
    weights.bytes = total_;
    return weights;
  }

 private:
  void CheckShapes(const Placement& placement) const {
    for (size_t i = 0; i < placement.names.size(); ++i) {
      const std::string& name = placement.names[i];
      const WeightInfo* info = source_.Find(name);
      TIDAL_CHECK(info != nullptr, WeightsError, name,
                  ": missing from the checkpoint, expected by ", "config.json (",
                  placement.expected_from, ")");
      std::vector<int64_t> expected = ShapeOf(placement, i);
      TIDAL_CHECK(info->shape == expected, WeightsError, name, ": shape ", ShapeString(info->shape),
                  ", expected ", ShapeString(expected), " (", placement.expected_from,
                  "); config.json and the weights do not belong together");
      TIDAL_CHECK(info->dtype == DType::kFloat32 || info->dtype == DType::kBFloat16 ||
                      info->dtype == DType::kFloat16,
                  WeightsError, name, ": dtype ", DTypeName(info->dtype),
                  ", expected float32, bfloat16 or float16");
    }
  }

  static int64_t Elements(const Placement& placement) {
    int64_t rows = 0;
    for (int64_t count : placement.rows) rows += count;
    return rows * std::max<int64_t>(placement.columns, 1);
  }

  void Allocate(const Placement& placement, ModelWeights& weights) {
    int64_t elements = Elements(placement);
    int64_t columns = std::max<int64_t>(placement.columns, 1);
    weights.buffers.push_back(
        backend_.Allocate(elements * DTypeBytes(dtype_), "the model's weights"));
    void* target = weights.buffers.back().data();
    *placement.target = placement.columns == 0
                            ? TensorView(target, dtype_, {elements})
                            : TensorView(target, dtype_, {elements / columns, columns});
  }

  void LoadOne(const Placement& placement, const LoadProgress& progress) {
    int64_t columns = std::max<int64_t>(placement.columns, 1);
    char* target = static_cast<char*>(placement.target->ptr);
    for (size_t i = 0; i < placement.names.size(); ++i) {
      int64_t count = placement.rows[i] * columns;
      LoadTensor(placement.names[i], count, target, progress);
      target += count * DTypeBytes(dtype_);
    }
  }

  void LoadTensor(const std::string& name, int64_t count, char* target,
                  const LoadProgress& progress) {
    DType from = source_.Find(name)->dtype;
    int64_t piece = kPieceBytes / std::max(DTypeBytes(from), DTypeBytes(dtype_));  // elements
    for (int64_t begin = 0; begin < count; begin += piece) {
      int64_t n = std::min(piece, count - begin);
      int64_t bytes = n * DTypeBytes(dtype_);
      char* dst = target + begin * DTypeBytes(dtype_);
      void* host = backend_.BeginUpload(dst, bytes);
      if (from == dtype_) {
        source_.Read(name, begin * DTypeBytes(from), bytes, host);
      } else {
        scratch_.resize(static_cast<size_t>(n * DTypeBytes(from)));
        source_.Read(name, begin * DTypeBytes(from), n * DTypeBytes(from), scratch_.data());
        Convert(scratch_.data(), from, host, n);
      }
      backend_.CommitUpload(dst, bytes);
      done_ += bytes;
      if (progress) progress(done_, total_);
    }
  }

  void Convert(const void* from, DType from_dtype, void* to, int64_t count) {
    switch (from_dtype) {
      case DType::kFloat32:
        return ConvertFrom(static_cast<const float*>(from), to, count);
      case DType::kBFloat16:
        return ConvertFrom(static_cast<const BFloat16*>(from), to, count);
      default:
        return ConvertFrom(static_cast<const Float16*>(from), to, count);
    }
  }

  template <typename From>
  void ConvertFrom(const From* from, void* to, int64_t count) {
    switch (dtype_) {
      case DType::kFloat32:
        return ConvertElements(from, static_cast<float*>(to), count);
      case DType::kBFloat16:
        return ConvertElements(from, static_cast<BFloat16*>(to), count);
      default:
        return ConvertElements(from, static_cast<Float16*>(to), count);
    }
  }

  template <typename From, typename To>
  void ConvertElements(const From* from, To* to, int64_t count) {
    constexpr int64_t kGrain = 1 << 18;
    threads_.ForPieces(count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = FromFloat<To>(ToFloat(from[i]));
    });
  }

  Backend& backend_;
  const ModelConfig& model_;
  DType dtype_;
  const WeightSource& source_;
  std::vector<char> scratch_;
  CopyThreads threads_;
  int64_t total_ = 0;
  int64_t done_ = 0;
};

}  // namespace

std::vector<WeightShape> ExpectedWeights(const ModelConfig& model) {
  ModelWeights weights;
  std::vector<WeightShape> expected;
  for (const Placement& placement : Planner(model, weights).Take()) {
    for (size_t i = 0; i < placement.names.size(); ++i) {
      expected.push_back({placement.names[i], ShapeOf(placement, i)});
    }
  }
  return expected;
}

int64_t WeightBytes(const ModelConfig& model, DType dtype) {
  int64_t bytes = 0;
  for (const WeightShape& weight : ExpectedWeights(model)) {
    bytes += NumElements(weight.shape) * DTypeBytes(dtype);
  }
  return bytes;
}

ModelWeights LoadWeights(Backend& backend, const ModelConfig& model, DType dtype,
                         const WeightSource& source, const LoadProgress& progress) {
  return Loader(backend, model, dtype, source).Load(progress);
}

}  // namespace tidal
