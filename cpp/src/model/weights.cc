// From named tensors to LayerWeights: one table says which tensor goes where, one loop loads it.
#include "model/weights.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "core/convert.h"
#include "core/mxfp4.h"
#include "core/parallel.h"
#include "core/shape.h"
#include "model/weight_format.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// Big enough to keep a disk and a bus busy and to be read by several threads, small enough to stay
// out of the way: two or four are in memory at a time.
constexpr int64_t kPieceBytes = int64_t{16} << 20;

struct RowRun {
  int64_t begin, count;
};
using RowRuns = std::vector<RowRun>;

// Tensors that are stacked, in order, into one device tensor.
struct Placement {
  TensorView* target;
  Weight* matrix;  // whose data the target is, if it may be in codes; else nullptr
  std::vector<std::string> names;
  std::vector<int64_t> rows;       // of each name
  int64_t columns;                 // 0: vectors
  std::string expected_from;       // how the shape follows from the config, for the error
  std::vector<RowRuns> runs = {};  // of each name's rows, in the order in which they are stacked
  bool is_float32 = false;         // whatever the dtype of the others is
  float added = 0.0f;              // to each number; with is_float32

  DType dtype(DType others) const { return is_float32 ? DType::kFloat32 : others; }
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
    AddNorm(&weights.final_norm, "model.norm.weight");
    if (!m.tie_word_embeddings) {
      AddMatrix(&weights.lm_head, {"lm_head.weight"}, {m.vocab_size}, m.hidden_size,
                "vocab_size x hidden_size");
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
      PlanMlp(mlp, layer);
    }
    if (m.branch_norms) {
      AddNorm(&layer.o_norm, prefix + "post_self_attn_layernorm.weight");
      AddNorm(&layer.down_norm, prefix + "post_mlp_layernorm.weight");
    }
  }

  void PlanMlp(const std::string& mlp, LayerWeights& layer) {
    const ModelConfig& m = model_;
    const std::string sizes =
        Concat("hidden_size ", m.hidden_size, ", intermediate_size ", m.intermediate_size);
    const std::vector<std::string> gate_up = {mlp + "gate_proj", mlp + "up_proj"};
    const std::vector<int64_t> rows = {m.intermediate_size, m.intermediate_size};
    AddMatrix(&layer.gate_up, WithSuffix(gate_up, ".weight"), rows, m.hidden_size, sizes);
    AddMatrix(&layer.down, {mlp + "down_proj.weight"}, {m.hidden_size}, m.intermediate_size, sizes);
    if (!m.mlp_bias) return;
    Add(&layer.gate_up_bias, WithSuffix(gate_up, ".bias"), rows, 0, sizes);
    Add(&layer.down_bias, {mlp + "down_proj.bias"}, {m.hidden_size}, 0, "hidden_size");
  }

  void PlanExperts(const std::string& mlp, LayerWeights& layer) {
    const ModelConfig& m = model_;
    const std::string sizes = Concat("num_experts ", m.num_experts, ", hidden_size ", m.hidden_size,
                                     ", expert_intermediate_size ", m.expert_intermediate_size);
    Add(&layer.router, {mlp + "gate.weight"}, {m.num_experts}, m.hidden_size, sizes);
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
    AddMatrix(&layer.experts_down, WithSuffix(down, ".weight"), down_rows,
              m.expert_intermediate_size, sizes);
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
  }

  static std::vector<std::string> WithSuffix(std::vector<std::string> stems, const char* suffix) {
    for (std::string& stem : stems) stem += suffix;
    return stems;
  }

  const ModelConfig& model_;
  std::vector<Placement> placements_;
};

int64_t NumRows(const Placement& placement) {
  int64_t rows = 0;
  for (int64_t count : placement.rows) rows += count;
  return rows;
}

int64_t NumElements(const Placement& placement) {
  return NumRows(placement) * std::max<int64_t>(placement.columns, 1);
}

// The matrix in codes, without memory yet, if all that is stacked in it can be had in the same
// codes and the backend's products read them; else none.
Weight InCodes(const Backend& backend, const Placement& placement, const WeightSource& source) {
  if (placement.matrix == nullptr) return {};
  const CodedInfo* coded = source.FindCodes(placement.names[0]);
  if (coded == nullptr) return {};
  for (const std::string& name : placement.names) {
    const CodedInfo* other = source.FindCodes(name);
    if (other == nullptr || *other != *coded) return {};
  }
  // Codes of several rows may share a word.
  for (const RowRuns& runs : placement.runs) {
    for (const RowRun& run : runs) {
      if (runs.size() > 1 && (run.begin % 8 != 0 || run.count % 8 != 0)) return {};
    }
  }
  const int64_t rows = NumRows(placement), columns = placement.columns;
  const int64_t groups = coded->num_groups(columns);
  Weight weight(TensorView(nullptr, DType::kUInt8, {rows, coded->row_bytes(columns)}));
  weight.codes = coded->codes;
  weight.group_size = coded->group_size;
  weight.scales = TensorView(nullptr, coded->scale_dtype, {groups, rows});
  if (coded->has_zeros) weight.zeros = TensorView(nullptr, DType::kUInt8, {groups, rows});
  const bool reads = IsOfExpert(placement.names[0]) ? backend.ReadsCodesOfExperts(weight)
                                                    : backend.ReadsCodes(weight);
  return reads ? weight : Weight();
}

// Counts the bytes of all tensors of a matrix in codes.
int64_t BytesOf(const Weight& weight) {
  return weight.data.bytes() + weight.scales.bytes() +
         (weight.zeros.rank > 0 ? weight.zeros.bytes() : 0);
}

class Loader {
 public:
  Loader(Backend& backend, const ModelConfig& model, DType dtype, const WeightSource& source)
      : backend_(backend), model_(model), dtype_(dtype), source_(source) {}

  ModelWeights Load(const LoadProgress& progress) {
    ModelWeights weights;
    std::vector<Placement> placements = Planner(model_, weights).Take();
    for (const Placement& placement : placements) CheckShapes(placement);
    // All of the memory first: an allocation would hold up the copies under way.
    for (const Placement& placement : placements) Allocate(placement, weights);
    for (const Placement& placement : placements) {
      if (placement.matrix != nullptr && placement.matrix->is_coded()) {
        LoadCodes(placement, progress);
      } else {
        LoadOne(placement, progress);
      }
    }
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

  void Allocate(const Placement& placement, ModelWeights& weights) {
    const Weight coded = InCodes(backend_, placement, source_);
    if (coded.is_coded()) {
      *placement.matrix = coded;
      AllocateTensor(placement.matrix->data, weights);
      AllocateTensor(placement.matrix->scales, weights);
      if (coded.zeros.rank > 0) AllocateTensor(placement.matrix->zeros, weights);
      return;
    }
    const int64_t rows = NumRows(placement);
    const DType dtype = placement.dtype(dtype_);
    *placement.target = placement.columns == 0
                            ? TensorView(nullptr, dtype, {rows})
                            : TensorView(nullptr, dtype, {rows, placement.columns});
    AllocateTensor(*placement.target, weights);
  }

  void AllocateTensor(TensorView& tensor, ModelWeights& weights) {
    weights.buffers.push_back(backend_.Allocate(tensor.bytes(), "the model's weights"));
    tensor.ptr = weights.buffers.back().data();
    total_ += tensor.bytes();
  }

  void LoadOne(const Placement& placement, const LoadProgress& progress) {
    int64_t columns = std::max<int64_t>(placement.columns, 1);
    const NumbersAs as = {placement.dtype(dtype_), placement.added};
    char* target = static_cast<char*>(placement.target->ptr);
    for (size_t i = 0; i < placement.names.size(); ++i) {
      for (const RowRun& run : placement.runs[i]) {
        LoadElements(placement.names[i], {run.begin * columns, run.count * columns}, as, target,
                     progress);
        target += run.count * columns * DTypeBytes(as.dtype);
      }
    }
  }

  // Codes go to the device as they come; scales and zeros are turned to lie by groups.
  void LoadCodes(const Placement& placement, const LoadProgress& progress) {
    const Weight& weight = *placement.matrix;
    const int64_t rows = NumRows(placement), groups = weight.scales.dim(0);
    const int64_t row_bytes = weight.data.dim(1);
    const int64_t piece = std::max<int64_t>(8, kPieceBytes / row_bytes / 8 * 8);
    std::vector<float> scales(static_cast<size_t>(groups * rows));
    std::vector<uint8_t> zeros(weight.zeros ? scales.size() : 0);
    std::vector<float> piece_scales(static_cast<size_t>(groups * piece));
    std::vector<uint8_t> piece_zeros(weight.zeros ? piece_scales.size() : 0);
    char* target = static_cast<char*>(weight.data.ptr);
    int64_t row = 0;  // of the stack
    auto load = [&](const std::string& name, int64_t begin, int64_t end) {
      const int64_t bytes = (end - begin) * row_bytes;
      void* host = backend_.BeginUpload(target, bytes);
      source_.ReadCodes(name, begin, end,
                        {host, piece_scales.data(), weight.zeros ? piece_zeros.data() : nullptr});
      backend_.CommitUpload(target, bytes);
      Turn(piece_scales, {end - begin, groups}, scales.data() + row, rows);
      if (weight.zeros) Turn(piece_zeros, {end - begin, groups}, zeros.data() + row, rows);
      target += bytes;
      row += end - begin;
      Report(bytes, progress);
    };
    for (size_t i = 0; i < placement.names.size(); ++i) {
      for (const RowRun& run : placement.runs[i]) {
        const int64_t end = run.begin + run.count;
        for (int64_t begin = run.begin; begin < end; begin += piece) {
          load(placement.names[i], begin, std::min(begin + piece, end));
        }
      }
    }
    UploadScales(scales, weight.scales, progress);
    if (weight.zeros) UploadBytes(zeros.data(), weight.zeros, progress);
  }

  struct Table {
    int64_t rows, columns;
  };

  // Writes `from` [rows, columns] to columns of `to`, whose rows are `stride` apart.
  template <typename T>
  static void Turn(const std::vector<T>& from, const Table& table, T* to, int64_t stride) {
    for (int64_t i = 0; i < table.rows; ++i) {
      for (int64_t k = 0; k < table.columns; ++k) {
        to[k * stride + i] = from[static_cast<size_t>(i * table.columns + k)];
      }
    }
  }

  void UploadScales(const std::vector<float>& scales, const TensorView& target,
                    const LoadProgress& progress) {
    scratch_.resize(static_cast<size_t>(target.bytes()));
    if (target.dtype == DType::kUInt8) {
      auto* powers = reinterpret_cast<uint8_t*>(scratch_.data());
      std::transform(scales.begin(), scales.end(), powers, FloatToE8m0);
    } else {
      const auto count = static_cast<int64_t>(scales.size());
      Convert({scales.data(), DType::kFloat32}, {scratch_.data(), target.dtype}, count);
    }
    UploadBytes(scratch_.data(), target, progress);
  }

  void UploadBytes(const void* from, const TensorView& target, const LoadProgress& progress) {
    for (int64_t begin = 0; begin < target.bytes(); begin += kPieceBytes) {
      const int64_t bytes = std::min(kPieceBytes, target.bytes() - begin);
      char* dst = static_cast<char*>(target.ptr) + begin;
      std::memcpy(backend_.BeginUpload(dst, bytes), static_cast<const char*>(from) + begin,
                  static_cast<size_t>(bytes));
      backend_.CommitUpload(dst, bytes);
      Report(bytes, progress);
    }
  }

  void Report(int64_t bytes, const LoadProgress& progress) {
    done_ += bytes;
    if (progress) progress(done_, total_);
  }

  struct NumbersAs {
    DType dtype;
    float added;  // 0 but for float32
  };

  // `run`: elements of the tensor.
  void LoadElements(const std::string& name, const RowRun& run, const NumbersAs& as, char* target,
                    const LoadProgress& progress) {
    DType from = source_.Find(name)->dtype;
    int64_t piece = kPieceBytes / std::max(DTypeBytes(from), DTypeBytes(as.dtype));  // elements
    for (int64_t done = 0; done < run.count; done += piece) {
      int64_t n = std::min(piece, run.count - done), begin = run.begin + done;
      int64_t bytes = n * DTypeBytes(as.dtype);
      char* dst = target + done * DTypeBytes(as.dtype);
      void* host = backend_.BeginUpload(dst, bytes);
      if (from == as.dtype) {
        source_.Read(name, begin * DTypeBytes(from), bytes, host);
      } else {
        scratch_.resize(static_cast<size_t>(n * DTypeBytes(from)));
        source_.Read(name, begin * DTypeBytes(from), n * DTypeBytes(from), scratch_.data());
        Convert({scratch_.data(), from}, {host, as.dtype}, n);
      }
      if (as.added != 0.0f) {
        for (int64_t i = 0; i < n; ++i) static_cast<float*>(host)[i] += as.added;
      }
      backend_.CommitUpload(dst, bytes);
      Report(bytes, progress);
    }
  }

  void Convert(const NumbersFrom& from, const NumbersTo& to, int64_t count) {
    constexpr int64_t kGrain = 1 << 18;
    threads_.ForPieces(count, kGrain, [&](int64_t begin, int64_t end) {
      ConvertNumbers(
          {static_cast<const char*>(from.data) + begin * DTypeBytes(from.dtype), from.dtype},
          {static_cast<char*>(to.data) + begin * DTypeBytes(to.dtype), to.dtype}, end - begin);
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

void WeightSource::ReadCodes(const std::string& name, int64_t, int64_t, const CodedRows&) const {
  throw InvalidArgument(Concat(name, ": it has no codes to read"));
}

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

WeightMemory MeasureWeights(const Backend& backend, const ModelConfig& model, DType dtype,
                            const WeightSource& source) {
  ModelWeights weights;
  WeightMemory memory;
  for (const Placement& placement : Planner(model, weights).Take()) {
    const int64_t bytes = NumElements(placement) * DTypeBytes(placement.dtype(dtype));
    const Weight coded = InCodes(backend, placement, source);
    memory.bytes += coded.is_coded() ? BytesOf(coded) : bytes;
    // The output matrix has few tokens in a prompt too, and those of experts work as they are kept.
    if (coded.is_coded() && placement.matrix != &weights.lm_head &&
        !IsOfExpert(placement.names[0])) {
      memory.decoded_bytes = std::max(memory.decoded_bytes, bytes);
    }
  }
  return memory;
}

ModelWeights LoadWeights(Backend& backend, const ModelConfig& model, DType dtype,
                         const WeightSource& source, const LoadProgress& progress) {
  return Loader(backend, model, dtype, source).Load(progress);
}

}  // namespace tidal
