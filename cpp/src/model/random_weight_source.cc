// RandomWeightSource: the shapes come from the table that loads real weights (weights.cc), the
// values from one repeated block of noise.
#include <algorithm>

#include "core/noise.h"
#include "core/parallel.h"
#include "core/shape.h"
#include "model/model_config.h"
#include "model/weights.h"
#include "tidal/error.h"
#include "tidal/weights.h"

namespace tidal {
namespace {

// As transformers' initializer_range: activations keep a size that every dtype holds, through
// any number of layers.
constexpr double kStddev = 0.02;

bool IsNorm(const std::string& name) {
  return name.ends_with("norm.weight");
}

}  // namespace

RandomWeightSource::RandomWeightSource(const ModelConfig& model, DType dtype, uint64_t seed)
    : threads_(std::make_unique<CopyThreads>()) {
  ValidateModelConfig(model);
  noise_ = std::make_unique<Noise>(dtype, Normal{0.0, kStddev}, seed);
  norms_ = std::make_unique<Noise>(dtype, Normal{1.0, kStddev}, seed,
                                   std::max(model.hidden_size, model.head_dim));
  int64_t offset = 0;  // of the next tensor: each begins where the one before it ended
  for (WeightShape& weight : ExpectedWeights(model)) {
    const int64_t bytes = NumElements(weight.shape) * DTypeBytes(dtype);
    const Noise* values = IsNorm(weight.name) ? norms_.get() : noise_.get();
    tensors_[std::move(weight.name)] = {{dtype, std::move(weight.shape)}, values, offset};
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
  threads_->ForPieces(bytes, int64_t{1} << 20, [&](int64_t begin, int64_t end) {
    tensor.values->Read(tensor.offset + offset + begin, end - begin,
                        static_cast<char*>(dst) + begin);
  });
}

}  // namespace tidal
