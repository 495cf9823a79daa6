// The op tests' fixture (backend_test.h).
#include "backend_test.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace tidal::test {
namespace {

template <typename T>
void EncodeAs(const Values& values, Bytes& bytes) {
  for (size_t i = 0; i < values.size(); ++i) {
    const T element = FromFloat<T>(static_cast<float>(values[i]));
    std::memcpy(&bytes[i * sizeof(T)], &element, sizeof(T));
  }
}

template <typename T>
void DecodeAs(const Bytes& bytes, Values& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    T element;
    std::memcpy(&element, &bytes[i * sizeof(T)], sizeof(T));
    values[i] = ToFloat(element);
  }
}

}  // namespace

std::string CaseName(const BackendCase& on) {
  std::string name = std::string(on.is_cpu() ? "cpu_" : "cuda_") + DTypeName(on.dtype);
  if (on.other_kv_dtype) name += std::string("_") + DTypeName(*on.other_kv_dtype);
  return name;
}

std::vector<BackendCase> AllBackends() {
  return {{DeviceType::kCpu, DType::kFloat32},
          {DeviceType::kCpu, DType::kBFloat16},
          {DeviceType::kCpu, DType::kFloat16},
          {DeviceType::kCuda, DType::kBFloat16},
          {DeviceType::kCuda, DType::kFloat16}};
}

std::vector<BackendCase> AllCaches() {
  std::vector<BackendCase> caches = AllBackends();
  caches.insert(caches.end(), {{DeviceType::kCpu, DType::kFloat32, DType::kInt8},
                               {DeviceType::kCpu, DType::kFloat32, DType::kFloat8},
                               {DeviceType::kCuda, DType::kBFloat16, DType::kFloat8},
                               {DeviceType::kCuda, DType::kFloat16, DType::kFloat8}});
  return caches;
}

std::vector<BackendCase> CudaCaches() {
  return {{DeviceType::kCuda, DType::kBFloat16},
          {DeviceType::kCuda, DType::kFloat16},
          {DeviceType::kCuda, DType::kBFloat16, DType::kFloat8},
          {DeviceType::kCuda, DType::kFloat16, DType::kFloat8}};
}

std::vector<BackendCase> CudaBackendsAndCpu() {
  return {{DeviceType::kCpu, DType::kFloat32},
          {DeviceType::kCuda, DType::kBFloat16},
          {DeviceType::kCuda, DType::kFloat16}};
}

std::vector<BackendCase> EachDevice() {
  return {{DeviceType::kCpu, DType::kFloat32}, {DeviceType::kCuda, DType::kBFloat16}};
}

std::string WhyUnavailable(DeviceType device) {
  if (device == DeviceType::kCpu) return "";
  std::string reason = "no CUDA device listed";
  for (const DeviceStatus& status : ListDevices()) {
    if (status.name.rfind("cuda", 0) != 0) continue;
    if (status.available) return "";
    reason = status.reason;
  }
  return "needs a CUDA device: " + reason;
}

Values Rounded(Values values, DType dtype) {
  return Decode(Encode(values, dtype), dtype);
}

Bytes Encode(const Values& values, DType dtype) {
  Bytes bytes(values.size() * DTypeBytes(dtype));
  switch (dtype) {
    case DType::kFloat32:
      EncodeAs<float>(values, bytes);
      break;
    case DType::kBFloat16:
      EncodeAs<BFloat16>(values, bytes);
      break;
    case DType::kFloat16:
      EncodeAs<Float16>(values, bytes);
      break;
    default:
      ADD_FAILURE() << "Encode: " << DTypeName(dtype) << " is no float type";
  }
  return bytes;
}

Values Decode(const Bytes& bytes, DType dtype) {
  Values values(bytes.size() / DTypeBytes(dtype));
  switch (dtype) {
    case DType::kFloat32:
      DecodeAs<float>(bytes, values);
      break;
    case DType::kBFloat16:
      DecodeAs<BFloat16>(bytes, values);
      break;
    case DType::kFloat16:
      DecodeAs<Float16>(bytes, values);
      break;
    default:
      ADD_FAILURE() << "Decode: " << DTypeName(dtype) << " is no float type";
  }
  return values;
}

Values Random::Normal(int64_t count, DType dtype, double stddev, double mean) {
  std::normal_distribution<double> distribution(mean, stddev);
  Values values(count);
  for (double& value : values) value = distribution(engine_);
  return Rounded(std::move(values), dtype);
}

Ints Random::Below(int64_t count, int32_t limit) {
  std::uniform_int_distribution<int32_t> distribution(0, limit - 1);
  Ints values(count);
  for (int32_t& value : values) value = distribution(engine_);
  return values;
}

Ints Random::Permutation(int64_t count) {
  Ints values(count);
  std::iota(values.begin(), values.end(), 0);
  std::shuffle(values.begin(), values.end(), engine_);
  return values;
}

Ints Random::Subset(int64_t count, int64_t limit) {
  Ints values = Permutation(limit);
  values.resize(count);
  std::sort(values.begin(), values.end());
  return values;
}

StepLimits BackendFixture::SmallLimits(DType dtype) {
  StepLimits limits;
  limits.model.vocab_size = 1000;
  limits.model.hidden_size = 256;
  limits.model.intermediate_size = 512;
  limits.model.num_layers = 2;
  limits.model.num_q_heads = 4;
  limits.model.num_kv_heads = 2;
  limits.model.head_dim = 64;
  limits.model.max_position_embeddings = 2048;
  limits.dtype = limits.kv_dtype = dtype;
  limits.max_batch_size = 8;
  limits.max_seq_len = 2048;
  limits.prefill_chunk = 256;
  limits.page_size = 16;
  limits.token_budget = 64;
  return limits;
}

void BackendFixture::Open(const BackendCase& on, const StepLimits& limits, BackendOptions options) {
  buffers_.clear();
  on_ = on;
  options.device = {on.device, 0};
  options.num_threads = 2;
  backend_ = MakeBackend(options);
  backend_->Reserve(limits);
  act_ = backend_->activation_dtype(on.dtype);
}

TensorView BackendFixture::PutBytes(const Bytes& bytes, DType dtype, const Shape& shape) {
  TensorView tensor;
  tensor.dtype = dtype;
  tensor.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), tensor.shape.begin());
  EXPECT_EQ(tensor.bytes(), static_cast<int64_t>(bytes.size())) << "shape and data disagree";
  // An absent tensor has no memory; an empty one still needs an address.
  buffers_.push_back(backend_->Allocate(std::max<int64_t>(tensor.bytes(), 1), "a test tensor"));
  tensor.ptr = buffers_.back().data();
  backend_->Upload(tensor, bytes.data());
  return tensor;
}

TensorView BackendFixture::Put(const Values& values, DType dtype, const Shape& shape) {
  return PutBytes(Encode(values, dtype), dtype, shape);
}

TensorView BackendFixture::PutInts(const Ints& values, const Shape& shape) {
  Bytes bytes(values.size() * sizeof(int32_t));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return PutBytes(bytes, DType::kInt32, shape);
}

TensorView BackendFixture::Output(DType dtype, const Shape& shape) {
  int64_t bytes = DTypeBytes(dtype);
  for (int64_t dim : shape) bytes *= dim;
  return PutBytes(Bytes(bytes, 0xff), dtype, shape);
}

Bytes BackendFixture::GetBytes(const TensorView& tensor) {
  Bytes bytes(tensor.bytes());
  backend_->Download(bytes.data(), tensor);
  return bytes;
}

Values BackendFixture::Get(const TensorView& tensor) {
  return Decode(GetBytes(tensor), tensor.dtype);
}

Ints BackendFixture::GetInts(const TensorView& tensor) {
  const Bytes bytes = GetBytes(tensor);
  Ints values(bytes.size() / sizeof(int32_t));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

void BackendTest::SetUp() {
  const std::string reason = WhyUnavailable(GetParam().device);
  if (!reason.empty()) GTEST_SKIP() << reason;
}

}  // namespace tidal::test
