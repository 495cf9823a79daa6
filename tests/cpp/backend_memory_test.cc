// The Backend seam without its ops: memory, copies, recorded steps, and the list of devices.
#include <gtest/gtest.h>

#include <cstring>

#include "backend_test.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

class BackendMemory : public BackendTest {
 protected:
  void SetUp() override {
    BackendTest::SetUp();
    if (!IsSkipped()) Open(GetParam(), SmallLimits(GetParam().dtype));
  }
};

TEST_P(BackendMemory, SaysWhatItIs) {
  const BackendInfo info = backend().info();
  EXPECT_EQ(info.name, on().is_cpu() ? "cpu" : "cuda:0");
  EXPECT_EQ(info.device.type, on().device);
  EXPECT_GT(info.free_bytes, 0);
  EXPECT_GT(info.prefill_chunk, 0);
  EXPECT_EQ(act(), on().is_cpu() ? DType::kFloat32 : on().dtype);
}

TEST_P(BackendMemory, AllocatesZeros) {
  for (int64_t bytes : {1, 63, 100000}) {
    // Once more after it was used: fresh memory is zero, memory given back must be again.
    for (int round = 0; round < 2; ++round) {
      const Buffer buffer = backend().Allocate(bytes, "test");
      ASSERT_NE(buffer.data(), nullptr);
      EXPECT_GE(buffer.bytes(), bytes);
      const TensorView view(buffer.data(), DType::kUInt8, {bytes});
      EXPECT_EQ(GetBytes(view), Bytes(static_cast<size_t>(bytes), 0));
      backend().Upload(view, Bytes(static_cast<size_t>(bytes), 0xab).data());
    }
  }
}

TEST_P(BackendMemory, TooMuchIsAnOutOfMemoryErrorThatNamesThePurpose) {
  EXPECT_TRUE(Throws<OutOfMemoryError>([&] { backend().Allocate(int64_t{1} << 60, "the purpose"); },
                                       {"the purpose"}));
  EXPECT_NE(backend().Allocate(64, "still works").data(), nullptr);
}

TEST_P(BackendMemory, UploadsOfWeightsInPiecesArrive) {
  constexpr int64_t kBytes = 3 << 20, kPiece = 1 << 20;
  const Buffer buffer = backend().Allocate(kBytes, "test");
  Bytes want(kBytes);
  for (int64_t i = 0; i < kBytes; ++i) want[i] = static_cast<uint8_t>(i * 2654435761u >> 24);
  for (int64_t begin = 0; begin < kBytes; begin += kPiece) {
    char* dst = static_cast<char*>(buffer.data()) + begin;
    void* host = backend().BeginUpload(dst, kPiece);
    std::memcpy(host, want.data() + begin, kPiece);
    backend().CommitUpload(dst, kPiece);
  }
  EXPECT_TRUE(SameBits(GetBytes(TensorView(buffer.data(), DType::kUInt8, {kBytes})), want, 1));
}

TEST_P(BackendMemory, UploadMayReuseItsHostMemoryAtOnce) {
  const TensorView tensor = Output(DType::kInt32, {1000});
  Ints values(1000, 7);
  backend().Upload(tensor, values.data());
  std::fill(values.begin(), values.end(), 8);
  EXPECT_EQ(GetInts(tensor), Ints(1000, 7));
}

TEST_P(BackendMemory, CopiesComeInOrderWithTheOps) {
  constexpr int64_t kRows = 3, kWidth = 1000;
  const TensorView tensor = Output(DType::kInt32, {kRows, kWidth});
  for (int32_t value : {5, 6}) {
    backend().Upload(tensor.Rows(1, 1), Ints(kWidth, value).data());
    backend().Copy(tensor.Rows(value == 5 ? 0 : 2, 1), tensor.Rows(1, 1));
  }
  EXPECT_EQ(GetInts(tensor.Rows(0, 1)), Ints(kWidth, 5));
  EXPECT_EQ(GetInts(tensor.Rows(1, 1)), Ints(kWidth, 6));
  EXPECT_EQ(GetInts(tensor.Rows(2, 1)), Ints(kWidth, 6));
}

// A recorded step reads its inputs anew each time; results equal those of plain calls bit for bit.
TEST_P(BackendMemory, RunStepIsAFunctionOfItsBuffers) {
  constexpr int64_t kRows = 4, kWidth = 256;
  Random random(1);
  const TensorView x = Output(DType::kFloat32, {kRows, kWidth});
  const TensorView weight = Put(random.Normal(kWidth, on().dtype), on().dtype, {kWidth});
  const TensorView normed = Output(act(), {kRows, kWidth}), plain = Output(act(), {kRows, kWidth});
  for (int round = 0; round < 6; ++round) {
    SCOPED_TRACE(round);
    const Bytes bytes = Encode(random.Normal(kRows * kWidth, DType::kFloat32), DType::kFloat32);
    backend().Upload(x, bytes.data());
    backend().RunStep({.batch_size = kRows}, [&] {
      backend().RmsNorm({.x = x, .weight = weight, .out = normed, .eps = 1e-5f});
    });
    backend().RmsNorm({.x = x, .weight = weight, .out = plain, .eps = 1e-5f});
    EXPECT_TRUE(SameBits(GetBytes(normed), GetBytes(plain), DTypeBytes(act())));
  }
}

// A step is known by its plan too, and a plan that has gone leaves none behind.
TEST_P(BackendMemory, StepsOfOnePlanAreNotThoseOfAnother) {
  constexpr int64_t kSize = 64;
  const TensorView ones = Put(Values(kSize, 1.0), DType::kFloat32, {kSize});
  const TensorView twos = Put(Values(kSize, 2.0), DType::kFloat32, {kSize});
  const TensorView out = Output(DType::kFloat32, {1, kSize});
  const TensorView row = PutInts({0}, {1});
  const auto run = [&](PlanId plan, const TensorView& source) {
    const TensorView table(source.ptr, DType::kFloat32, {1, kSize});
    backend().RunStep({.batch_size = 1, .plan = plan},
                      [&] { backend().GatherRows({.x = table, .rows = row, .out = out}); });
    return GetBytes(out) == GetBytes(source);
  };
  for (int round = 0; round < 4; ++round) {  // called, recorded, replayed
    EXPECT_TRUE(run(PlanId{2}, ones)) << round;
    EXPECT_TRUE(run(PlanId{3}, twos)) << round;
  }
  backend().ForgetSteps(PlanId{2});
  for (int round = 0; round < 4; ++round) {
    EXPECT_TRUE(run(PlanId{2}, twos)) << round;
    EXPECT_TRUE(run(PlanId{3}, twos)) << round;
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, BackendMemory, ::testing::ValuesIn(AllBackends()),
                         CaseNameOf<BackendCase>);

TEST(ListDevices, NamesTheCpuFirstAndExplainsWhatIsMissing) {
  const auto devices = ListDevices();
  ASSERT_GE(devices.size(), 2u);
  EXPECT_EQ(devices[0].name, "cpu");
  EXPECT_TRUE(devices[0].available);
  EXPECT_FALSE(devices[0].hardware.empty());
  EXPECT_GT(devices[0].memory_bytes, 0);
  for (const DeviceStatus& device : devices) {
    EXPECT_EQ(device.available, device.reason.empty()) << device.name << ": " << device.reason;
  }
}

TEST(ListLibraries, NamesTheBlasInUse) {
  const auto libraries = ListLibraries();
  ASSERT_FALSE(libraries.empty());
  EXPECT_NE(libraries[0].first.find("BLAS"), std::string::npos);
  EXPECT_FALSE(libraries[0].second.empty());
}

TEST(MakeBackend, ADeviceThatIsNotThereIsABackendErrorWithARemedy) {
  EXPECT_TRUE(Throws<BackendError>(
      [] {
        MakeBackend({.device = {DeviceType::kCuda, 99}});
      },
      {"cuda:99", "cpu"}));
}

}  // namespace
}  // namespace tidal::test
