// From named tensors to LayerWeights: the table of weight_placement.h, in one loop.
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
#include "model/weight_placement.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// Big enough to keep a disk and a bus busy and to be read by several threads, small enough to stay
// out of the way: two or four are in memory at a time.
constexpr int64_t kPieceBytes = int64_t{16} << 20;

// The matrix in codes, without memory yet, if all that is stacked in it can be had in the same
// codes and the backend's products read them; else none.
Weight InCodes(const Backend& backend, const Placement& placement, const WeightSource& source) {
  if (placement.matrix == nullptr) return {};
  const CodedInfo* coded = source.FindCodes(placement.names[0]);
  if (coded == nullptr) return {};
  bool quantizes_inputs = placement.is_for_prompts;  // which the stack shares
  for (const std::string& name : placement.names) {
    const CodedInfo* other = source.FindCodes(name);
    if (other == nullptr || !other->HasSameCodes(*coded)) return {};
    quantizes_inputs = quantizes_inputs && other->quantizes_inputs;
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
  weight.quantizes_inputs = quantizes_inputs;
  // Products of codes take scales of float32 only.
  const DType scale_dtype = weight.quantizes_inputs ? DType::kFloat32 : coded->scale_dtype;
  weight.scales = TensorView(nullptr, scale_dtype, {groups, rows});
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

void CheckIsNumbers(const WeightInfo& info, const std::string& name) {
  TIDAL_CHECK(info.dtype == DType::kFloat32 || info.dtype == DType::kBFloat16 ||
                  info.dtype == DType::kFloat16,
              WeightsError, info.NameToShow(name), ": dtype ", DTypeName(info.dtype),
              ", expected float32, bfloat16 or float16");
}

// All tensors of a model as this backend has them.
std::vector<Placement> PlanFor(const Backend& backend, const ModelConfig& model, DType dtype,
                               const WeightSource& source, ModelWeights& weights) {
  std::vector<Placement> placements = PlanWeights(model, HeadOf(model, source), weights);
  if (backend.activation_dtype(dtype) != DType::kFloat32) return placements;
  for (Placement& placement : placements) {
    if (!placement.may_be_float32) continue;
    const WeightInfo* info = source.Find(placement.names[0]);
    placement.is_float32 = info != nullptr && info->dtype == DType::kFloat32;
  }
  return placements;
}

class Loader {
 public:
  Loader(Backend& backend, const ModelConfig& model, DType dtype, const WeightSource& source)
      : backend_(backend), model_(model), dtype_(dtype), source_(source) {}

  ModelWeights Load(const LoadProgress& progress) {
    ModelWeights weights;
    std::vector<Placement> placements = PlanFor(backend_, model_, dtype_, source_, weights);
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
    if (HeadOf(model_, source_) == Head::kTied) weights.lm_head = weights.embedding;
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
      TIDAL_CHECK(info->shape == expected, WeightsError, info->NameToShow(name), ": shape ",
                  ShapeString(info->shape), ", expected ", ShapeString(expected), " (",
                  placement.expected_from, "); config.json and the weights do not belong together");
      CheckIsNumbers(*info, name);
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
    if (weight.quantizes_inputs) placement.matrix->input_scale = InputScale(placement);
    UploadScales(scales, weight.scales, progress);
    if (weight.zeros) UploadBytes(zeros.data(), weight.zeros, progress);
  }

  // The largest of those that are stacked: they share their inputs.
  float InputScale(const Placement& placement) const {
    float largest = 0.0f;
    for (const std::string& name : placement.names) {
      const float scale = source_.ReadInputScale(name);
      if (scale == 0.0f) return scale;
      largest = std::max(largest, scale);
    }
    return largest;
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

void ReadNumbers(const WeightSource& source, const std::string& name, float* numbers) {
  const WeightInfo* info = source.Find(name);
  TIDAL_CHECK(info != nullptr, WeightsError, name, ": no such tensor");
  CheckIsNumbers(*info, name);
  const int64_t count = NumElements(info->shape);
  std::vector<char> stored(static_cast<size_t>(count * DTypeBytes(info->dtype)));
  source.Read(name, 0, static_cast<int64_t>(stored.size()), stored.data());
  ConvertNumbers({stored.data(), info->dtype}, {numbers, DType::kFloat32}, count);
}

std::string WeightInfo::NameToShow(const std::string& name) const {
  if (stored_name.empty() || stored_name == name) return name;
  return Concat(stored_name, " (read as ", name, ")");
}

void WeightSource::ReadCodes(const std::string& name, int64_t, int64_t, const CodedRows&) const {
  throw InvalidArgument(Concat(name, ": it has no codes to read"));
}

std::vector<WeightShape> ExpectedWeights(const ModelConfig& model) {
  ModelWeights weights;
  std::vector<WeightShape> expected;
  for (const Placement& placement : PlanWeights(model, HeadOf(model), weights)) {
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
  for (const Placement& placement : PlanFor(backend, model, dtype, source, weights)) {
    const int64_t bytes = NumElements(placement) * DTypeBytes(placement.dtype(dtype));
    const Weight coded = InCodes(backend, placement, source);
    memory.bytes += coded.is_coded() ? BytesOf(coded) : bytes;
    if (coded.is_coded() && placement.is_for_prompts) {
      memory.decoded_bytes = std::max(memory.decoded_bytes, bytes);
    }
    if (coded.quantizes_inputs) {
      memory.quantized_inputs = std::max(memory.quantized_inputs, placement.columns);
    }
  }
  return memory;
}

ModelWeights LoadWeights(Backend& backend, const ModelConfig& model, DType dtype,
                         const WeightSource& source, const LoadProgress& progress) {
  return Loader(backend, model, dtype, source).Load(progress);
}

}  // namespace tidal
