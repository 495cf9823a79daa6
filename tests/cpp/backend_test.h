// The fixture of all op tests: one backend per test, chosen by the test's parameter, and tensors
// that go up from and come down to plain vectors. Tests of a device that is not there are skipped
// with the reason.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "compare.h"
#include "reference.h"

namespace tidal::test {

using Shape = std::vector<int64_t>;
using Bytes = std::vector<uint8_t>;

// A device, and the dtype of weights and cache on it.
struct BackendCase {
  DeviceType device = DeviceType::kCpu;
  DType dtype = DType::kFloat32;
  std::optional<DType> other_kv_dtype = {};  // of a cache that has not that of the weights

  DType kv_dtype() const { return other_kv_dtype.value_or(dtype); }
  bool is_cpu() const { return device == DeviceType::kCpu; }
  // Whether there are heads of 80, 96 and 256.
  bool has_all_head_dims() const { return is_cpu() || dtype != DType::kFloat16; }
};

std::string CaseName(const BackendCase& on);  // "cpu_bfloat16", "cpu_float32_int8"

// Every backend with every dtype it runs: CPU float32, bfloat16, float16; CUDA bfloat16, float16.
std::vector<BackendCase> AllBackends();
// AllBackends with the CPU once, for settings that it has no other way to follow.
std::vector<BackendCase> CudaBackendsAndCpu();
// AllBackends, and those with a cache of codes, for ops that read a cache.
std::vector<BackendCase> AllCaches();
// CUDA's backends, with a cache of their dtype and with one of fp8.
std::vector<BackendCase> CudaCaches();
// Every device once, for ops that meet no weights.
std::vector<BackendCase> EachDevice();

// Why the device cannot be used; empty if it can.
std::string WhyUnavailable(DeviceType device);

// `values` after a round trip through dtype: what both the backend and the reference are given.
Values Rounded(Values values, DType dtype);
Bytes Encode(const Values& values, DType dtype);
Values Decode(const Bytes& bytes, DType dtype);

// Random test data; the same seed gives the same data.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  Values Normal(int64_t count, DType dtype, double stddev = 1.0, double mean = 0.0);
  Ints Below(int64_t count, int32_t limit);   // uniform in [0, limit)
  Ints Permutation(int64_t count);            // of 0 .. count - 1
  Ints Subset(int64_t count, int64_t limit);  // ascending, distinct, of 0 .. limit - 1

 private:
  std::mt19937_64 engine_;
};

class BackendFixture : public ::testing::Test {
 protected:
  // Limits that every op test fits in unless it says otherwise.
  static StepLimits SmallLimits(DType dtype);

  // Makes the backend of `on`, with these options else, and reserves it for `limits`.
  void Open(const BackendCase& on, const StepLimits& limits, BackendOptions options = {});

  Backend& backend() { return *backend_; }
  // Known once a backend is open.
  DType act() const { return backend_ ? act_ : throw std::logic_error("act: nothing is open"); }
  const BackendCase& on() const { return on_; }
  // A step that was never recorded.
  StepKey NewStep() { return {.batch_size = ++num_steps_}; }

  // Device tensors; they live until the test ends.
  TensorView Put(const Values& values, DType dtype, const Shape& shape);
  TensorView PutInts(const Ints& values, const Shape& shape);
  TensorView PutBytes(const Bytes& bytes, DType dtype, const Shape& shape);
  // All bytes 0xff: NaN, or -1, wherever an op forgets to write.
  TensorView Output(DType dtype, const Shape& shape);

  Values Get(const TensorView& tensor);
  Ints GetInts(const TensorView& tensor);
  Bytes GetBytes(const TensorView& tensor);

 private:
  BackendCase on_;
  DType act_ = DType::kFloat32;
  int64_t num_steps_ = 0;
  std::unique_ptr<Backend> backend_;
  std::vector<Buffer> buffers_;  // of the backend, so after it: freed first
};

// A test of one op: the parameter is a backend and the op's own shape. Shape types have a `name`.
template <typename OpShape>
struct OpCase {
  BackendCase on;
  OpShape shape;
};

template <typename OpShape>
std::string CaseName(const OpCase<OpShape>& op_case) {
  return CaseName(op_case.on) + "_" + op_case.shape.name;
}

template <typename Case>
std::string CaseNameOf(const ::testing::TestParamInfo<Case>& info) {
  return CaseName(info.param);
}

template <typename OpShape>
void PrintTo(const OpCase<OpShape>& op_case, std::ostream* out) {
  *out << CaseName(op_case);
}
inline void PrintTo(const BackendCase& on, std::ostream* out) {
  *out << CaseName(on);
}

// `everywhere` on all given backends, `cpu_only` on the CPU's. What the CPU only converts while it
// loads meets every third shape there: its code for each is the same.
template <typename OpShape>
std::vector<OpCase<OpShape>> Cases(const std::vector<BackendCase>& backends,
                                   const std::vector<OpShape>& everywhere,
                                   const std::vector<OpShape>& cpu_only = {}) {
  std::vector<OpCase<OpShape>> cases;
  for (const BackendCase& on : backends) {
    const bool converts = on.is_cpu() && (on.other_kv_dtype || on.dtype == DType::kFloat16);
    for (size_t i = 0; i < everywhere.size(); i += converts ? 3 : 1) {
      cases.push_back({on, everywhere[i]});
    }
    if (!on.is_cpu()) continue;
    for (const OpShape& shape : cpu_only) cases.push_back({on, shape});
  }
  return cases;
}

class BackendTest : public BackendFixture, public ::testing::WithParamInterface<BackendCase> {
 protected:
  void SetUp() override;
};

template <typename OpShape>
class OpTest : public BackendFixture, public ::testing::WithParamInterface<OpCase<OpShape>> {
 protected:
  void SetUp() override {
    const std::string reason = WhyUnavailable(this->GetParam().on.device);
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
  const OpShape& shape() const { return this->GetParam().shape; }
  DType dtype() const { return this->GetParam().on.dtype; }
};

}  // namespace tidal::test
