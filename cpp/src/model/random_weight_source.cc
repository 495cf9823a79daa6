// RandomWeightSource: the shapes come from the table that loads real weights (weights.cc), the
// values from one repeated block of noise.
#include <algorithm>
#include <random>

#include "core/noise.h"
#include "core/parallel.h"
#include "core/shape.h"
#include "model/model_config.h"
#include "model/weight_format.h"
#include "model/weights.h"
#include "tidal/error.h"
#include "tidal/weights.h"

namespace tidal {
namespace {

// As transformers' initializer_range: activations keep a size that every dtype holds, through
// any number of layers.
constexpr double kStddev = 0.02;

// Scales of random codes, exact in every type. All finite ones are as often: their root mean square
// is 107 of float8, 4.6 of int4 less 8 and 2.9 of float4.
constexpr float ScaleOf(WeightCodes codes) {
  if (codes == WeightCodes::kFloat8) return 0x1.8p-13f;
  return codes == WeightCodes::kInt4 ? 0x1.2p-8f : 0x1p-7f;
}
constexpr size_t kRandomCodes = size_t{4} << 20;

std::vector<uint8_t> MakeCodes(WeightCodes codes, uint64_t seed) {
  if (codes == WeightCodes::kNone) return {};
  std::mt19937_64 random(seed);
  std::vector<uint8_t> made(kRandomCodes);
  for (uint8_t& code : made) {
    code = static_cast<uint8_t>(random() >> 56);
    if (codes == WeightCodes::kFloat8 && (code & 0x7f) == 0x7f) code ^= 1;  // no NaN
  }
  return made;
}

bool IsNorm(const std::string& name) {
  return name.ends_with("norm.weight");
}

}  // namespace

RandomWeightSource::RandomWeightSource(const ModelConfig& model, DType dtype, uint64_t seed,
                                       WeightCodes codes)
    : dtype_(dtype),
      seed_(seed),
      codes_(codes),
      norm_elements_(std::max(model.hidden_size, model.q_size())),
      threads_(std::make_unique<CopyThreads>()) {
  ValidateModelConfig(model);
  TIDAL_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16,
              InvalidArgument, "dtype of random weights: got ", DTypeName(dtype),
              ", expected float32, bfloat16 or float16");
  int64_t offset = 0;  // of the next tensor: each begins where the one before it ended
  for (WeightShape& weight : ExpectedWeights(model)) {
    const int64_t bytes = NumElements(weight.shape) * DTypeBytes(dtype);
    const bool is_norm = IsNorm(weight.name);
    WeightInfo info{dtype, std::move(weight.shape)};
    const CodedInfo coded =
        CodesOf(weight.name, info, {CodedPart::kLayers, codes, DType::kBFloat16});
    tensors_[std::move(weight.name)] = {std::move(info), is_norm, offset, coded};
    offset += bytes;
  }
}

RandomWeightSource::~RandomWeightSource() = default;

const WeightInfo* RandomWeightSource::Find(const std::string& name) const {
  auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second.info;
}

void RandomWeightSource::Read(const std::string& name, int64_t offset, int64_t bytes,
                              void* dst) const {
  auto found = tensors_.find(name);
  TIDAL_CHECK(found != tensors_.end(), WeightsError, name, ": no such tensor");
  const Tensor& tensor = found->second;
  const Noise& values = NoiseOf(tensor);
  threads_->ForPieces(bytes, int64_t{1} << 20, [&](int64_t begin, int64_t end) {
    values.Read(tensor.offset + offset + begin, end - begin, static_cast<char*>(dst) + begin);
  });
}

const Noise& RandomWeightSource::NoiseOf(const Tensor& tensor) const {
  std::unique_ptr<Noise>& noise = tensor.is_norm ? norms_ : noise_;
  if (!noise) {
    const Normal normal{tensor.is_norm ? 1.0 : 0.0, kStddev};
    const int64_t count =
        tensor.is_norm ? std::min(norm_elements_, Noise::kBlockElements) : Noise::kBlockElements;
    noise = std::make_unique<Noise>(dtype_, normal, seed_, count);
  }
  return *noise;
}

const CodedInfo* RandomWeightSource::FindCodes(const std::string& name) const {
  auto found = tensors_.find(name);
  if (found == tensors_.end() || found->second.coded.codes == WeightCodes::kNone) return nullptr;
  return &found->second.coded;
}

void RandomWeightSource::ReadCodes(const std::string& name, int64_t begin, int64_t end,
                                   const CodedRows& rows) const {
  TIDAL_CHECK(FindCodes(name) != nullptr, InvalidArgument, name, ": it has no codes to read");
  const Tensor& tensor = tensors_.at(name);
  if (random_codes_.empty()) random_codes_ = MakeCodes(codes_, seed_);
  const int64_t in = tensor.info.shape[1], row_bytes = tensor.coded.row_bytes(in);
  const auto period = static_cast<int64_t>(random_codes_.size());
  const int64_t from = (tensor.offset + begin * row_bytes) % period;
  threads_->ForPieces(
      (end - begin) * row_bytes, int64_t{1} << 20, [&](int64_t first, int64_t last) {
        auto* to = static_cast<uint8_t*>(rows.codes);
        for (int64_t i = first; i < last;) {
          const int64_t place = (from + i) % period, count = std::min(last - i, period - place);
          std::copy_n(random_codes_.data() + place, count, to + i);
          i += count;
        }
      });
  const int64_t groups = tensor.coded.num_groups(in);
  std::fill_n(rows.scales, (end - begin) * groups, ScaleOf(codes_));
}

}  // namespace tidal
