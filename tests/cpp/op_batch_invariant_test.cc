// With BackendOptions::batch_invariant a token's results are the same bits whatever else is in the
// call: products, and what stands before and behind them. Attention:
// op_batch_invariant_attention_test.cc.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "backend_test.h"
#include "layer_sizes.h"

namespace tidal::test {
namespace {

struct LayerShape {
  std::string name;
  int64_t hidden_size = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t intermediate_size = 0;
};

// Decode batches, and checks of drafts.
std::vector<int64_t> StepTokens(bool is_cpu) {
  std::vector<int64_t> counts;
  for (int64_t tokens = 1; tokens <= 17; ++tokens) counts.push_back(tokens);
  for (int64_t tokens : {24, 31, 32, 33, 49, 64}) counts.push_back(tokens);
  if (!is_cpu) counts.push_back(136);
  return counts;
}

class OpBatchInvariant : public OpTest<LayerShape> {
 protected:
  static constexpr int64_t kMostTokens = 136, kPageSize = 16;
  static constexpr float kEps = 1e-5f;

  void SetUp() override {
    OpTest::SetUp();
    if (IsSkipped()) return;
    StepLimits limits = SmallLimits(dtype());
    SetLayerSizes(shape(), limits.model);
    limits.max_batch_size = kMostTokens;
    Open(GetParam().on, limits, {.device = {}, .batch_invariant = true});
    const int64_t hidden = shape().hidden_size;
    norm_ = {.x = Put(random_.Normal(kMostTokens * hidden, DType::kFloat32, 3.0), DType::kFloat32,
                      {kMostTokens, hidden}),
             .weight = Put(random_.Normal(hidden, dtype(), 0.3, 1.0), dtype(), {hidden}),
             .out = Output(act(), {kMostTokens, hidden}),
             .eps = kEps};
  }

  TensorView Weight(int64_t num_outputs, int64_t num_inputs) {
    const double stddev = 1.0 / std::sqrt(static_cast<double>(num_inputs));
    return Put(random_.Normal(num_outputs * num_inputs, dtype(), stddev), dtype(),
               {num_outputs, num_inputs});
  }

  RmsNormArgs NormOf(int64_t first, int64_t count) const {
    RmsNormArgs norm = norm_;
    norm.x = norm.x.Rows(first, count);
    norm.out = norm.out.Rows(first, count);
    return norm;
  }

  // `run(first, count)` is the op for so many tokens; `out` what it writes, a row for each.
  void ExpectSame(const std::function<void(int64_t, int64_t)>& run, const TensorView& out) {
    std::vector<Bytes> alone;
    for (int64_t token = 0; token < kMostTokens; ++token) {
      backend().RunStep(NewStep(), [&] { run(token, 1); });
      alone.push_back(GetBytes(out.Rows(token, 1)));
    }
    for (int64_t count : StepTokens(on().is_cpu())) {
      SCOPED_TRACE(count);
      backend().RunStep(NewStep(), [&] { run(0, count); });
      for (int64_t token = 0; token < count; ++token) {
        ASSERT_TRUE(SameBits(GetBytes(out.Rows(token, 1)), alone[token], DTypeBytes(out.dtype)))
            << "token " << token;
      }
    }
  }

  Random random_{7};
  RmsNormArgs norm_;
};

TEST_P(OpBatchInvariant, NormLinear) {
  const int64_t size = shape().intermediate_size;
  const TensorView weight = Weight(size, shape().hidden_size);
  const TensorView bias = Put(random_.Normal(size, dtype()), dtype(), {size});
  for (DType dtype : {act(), DType::kFloat32}) {
    const TensorView out = Output(dtype, {kMostTokens, size});
    ExpectSame(
        [&](int64_t first, int64_t count) {
          const RmsNormArgs norm = NormOf(first, count);
          backend().NormLinear({norm, {norm.out, weight, bias, out.Rows(first, count)}});
        },
        out);
  }
}

TEST_P(OpBatchInvariant, LinearIntoTheResidualStream) {
  const int64_t hidden = shape().hidden_size, size = shape().intermediate_size;
  const TensorView weight = Weight(hidden, size);
  const TensorView x = Put(random_.Normal(kMostTokens * size, act()), act(), {kMostTokens, size});
  const TensorView residual = norm_.x, out = Output(DType::kFloat32, {kMostTokens, hidden});
  ExpectSame(
      [&](int64_t first, int64_t count) {
        backend().Copy(out.Rows(first, count), residual.Rows(first, count));
        backend().Linear({.x = x.Rows(first, count),
                          .weight = weight,
                          .bias = {},
                          .out = out.Rows(first, count),
                          .output = LinearOutput::kAccumulate});
      },
      out);
}

TEST_P(OpBatchInvariant, GateUpMul) {
  const int64_t size = shape().intermediate_size;
  const TensorView weight = Weight(2 * size, shape().hidden_size);
  const TensorView gate_up = Output(act(), {kMostTokens, 2 * size});
  const TensorView out = Output(act(), {kMostTokens, size});
  ExpectSame(
      [&](int64_t first, int64_t count) {
        const RmsNormArgs norm = NormOf(first, count);
        const TensorView between = gate_up.Rows(first, count);
        backend().GateUpMul(
            {norm, {norm.out, weight, {}, between}, {between, out.Rows(first, count)}});
      },
      out);
}

// Tokens of one sequence: a step of one alone, or a check of several.
TEST_P(OpBatchInvariant, QkvRopeAppend) {
  const auto [name, hidden, num_q_heads, num_kv_heads, dim, size] = shape();
  const int64_t width = (num_q_heads + 2 * num_kv_heads) * dim;
  const int64_t num_pages = (kMostTokens + kPageSize - 1) / kPageSize;
  Ints positions, pages;
  for (int32_t token = 0; token < kMostTokens; ++token) positions.push_back(token);
  for (int32_t page = 0; page < num_pages; ++page) pages.push_back(page);
  const TensorView weight = Weight(width, hidden), qkv = Output(act(), {kMostTokens, width});
  RopeAppendKvArgs append;
  append.cos_sin = Put(random_.Normal(kMostTokens * dim, DType::kFloat32, 0.7), DType::kFloat32,
                       {kMostTokens, dim});
  append.norm_eps = kEps;
  append.positions = PutInts(positions, {kMostTokens});
  append.seq_idx = PutInts(Ints(kMostTokens, 0), {kMostTokens});
  append.q = Output(act(), {kMostTokens, num_q_heads, dim});
  append.kv = {.k_pages = Output(dtype(), {num_pages, num_kv_heads, kPageSize, dim}),
               .v_pages = Output(dtype(), {num_pages, num_kv_heads, kPageSize, dim}),
               .page_table = PutInts(pages, {1, num_pages}),
               .seq_lens = PutInts({static_cast<int32_t>(kMostTokens)}, {1})};
  auto run = [&](int64_t first, int64_t count) {
    const RmsNormArgs norm = NormOf(first, count);
    RopeAppendKvArgs part = append;
    part.qkv = qkv.Rows(first, count);
    for (TensorView* view : {&part.cos_sin, &part.positions, &part.seq_idx, &part.q}) {
      *view = view->Rows(first, count);
    }
    backend().QkvRopeAppend({norm, {norm.out, weight, {}, part.qkv}, part});
  };
  ExpectSame(run, append.q);
  backend().RunStep(NewStep(), [&] { run(0, kMostTokens); });
  const Bytes k = GetBytes(append.kv.k_pages), v = GetBytes(append.kv.v_pages);
  for (int64_t token = 0; token < kMostTokens; ++token) {
    backend().RunStep(NewStep(), [&] { run(token, 1); });
  }
  if (on().is_cpu()) return;  // there passes of up to 64 tokens are as steps
  EXPECT_TRUE(SameBits(GetBytes(append.kv.k_pages), k, DTypeBytes(dtype())));
  EXPECT_TRUE(SameBits(GetBytes(append.kv.v_pages), v, DTypeBytes(dtype())));
}

// Outside steps, where prompts are read: chunks of any length.
TEST_P(OpBatchInvariant, PromptsInAnyChunks) {
  if (on().is_cpu()) GTEST_SKIP() << "on the CPU to rounding";
  constexpr int64_t kTokens = 700;
  const int64_t hidden = shape().hidden_size, size = shape().intermediate_size;
  const TensorView weight = Weight(size, hidden);
  const TensorView x = Put(random_.Normal(kTokens * hidden, act()), act(), {kTokens, hidden});
  const TensorView out = Output(act(), {kTokens, size});
  backend().Linear({x, weight, {}, out});
  const Bytes want = GetBytes(out);
  for (int64_t chunk : {1, 7, 16, 33, 64, 129, 256, 500}) {
    SCOPED_TRACE(chunk);
    const TensorView part = Output(act(), {kTokens, size});
    for (int64_t first = 0; first < kTokens; first += chunk) {
      const int64_t count = std::min(chunk, kTokens - first);
      backend().Linear({x.Rows(first, count), weight, {}, part.Rows(first, count)});
    }
    EXPECT_TRUE(SameBits(GetBytes(part), want, DTypeBytes(act())));
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, OpBatchInvariant,
                         ::testing::ValuesIn(Cases<LayerShape>(
                             CudaBackendsAndCpu(), {{"folded_norm", 1024, 8, 2, 128, 1536},
                                                    {"few_parts", 512, 4, 4, 64, 896},
                                                    {"ragged_chunks", 1056, 4, 2, 64, 1440},
                                                    {"long_rows", 2048, 4, 1, 128, 4096}})),
                         CaseNameOf<OpCase<LayerShape>>);

}  // namespace
}  // namespace tidal::test
