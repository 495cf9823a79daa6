// RmsNorm, RopeTable and RopeAppendKv: what happens between a projection and attention.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "core/float8.h"
#include "paged_cache.h"

namespace tidal::test {
namespace {

constexpr double kEps = 1e-5;

class OpRmsNorm : public BackendTest {};

TEST_P(OpRmsNorm, MatchesReference) {
  Random random(1);
  Ints hidden_sizes = {64, 256, 2048};
  if (GetParam().is_cpu()) hidden_sizes.insert(hidden_sizes.end(), {1, 7, 131});
  for (int32_t hidden_size : hidden_sizes) {
    SCOPED_TRACE(hidden_size);
    StepLimits limits = SmallLimits(GetParam().dtype);
    limits.model.hidden_size = hidden_size;
    Open(GetParam(), limits);
    for (int64_t num_rows : {1, 5, 200}) {
      Values x = random.Normal(num_rows * hidden_size, DType::kFloat32, 4.0);
      std::fill_n(x.begin(), hidden_size, 0.0);  // a row of zeros stays zero: eps saves it
      const Values weight = random.Normal(hidden_size, on().dtype, 0.5, 1.0);
      const TensorView out = Output(act(), {num_rows, hidden_size});
      backend().RmsNorm({.x = Put(x, DType::kFloat32, {num_rows, hidden_size}),
                         .weight = Put(weight, on().dtype, {hidden_size}),
                         .out = out,
                         .eps = static_cast<float>(kEps)});
      EXPECT_TRUE(
          Close(Get(out), reference::RmsNorm(x, weight, kEps), ToleranceFor(Op::kRmsNorm, act())));
    }
  }
}

TEST_P(OpRmsNorm, AddsToTheResidualStream) {
  Open(GetParam(), SmallLimits(GetParam().dtype));
  for (const Shape& shape : {Shape{1, 256}, Shape{7, 328}, Shape{64, 4096}}) {
    SCOPED_TRACE(shape[1]);
    Random random(8);
    const Values x = random.Normal(shape[0] * shape[1], DType::kFloat32, 2.0);
    const Values weight = random.Normal(shape[1], on().dtype, 0.3, 1.0);
    const Values stream = random.Normal(shape[0] * shape[1], DType::kFloat32, 3.0);
    const TensorView out = Put(stream, DType::kFloat32, shape);
    backend().RmsNorm({.x = Put(x, DType::kFloat32, shape),
                       .weight = Put(weight, on().dtype, {shape[1]}),
                       .out = out,
                       .eps = static_cast<float>(kEps),
                       .adds = true});
    Values want = reference::RmsNorm(x, weight, kEps);
    for (size_t i = 0; i < want.size(); ++i) want[i] += stream[i];
    EXPECT_TRUE(Close(Get(out), want, ToleranceFor(Op::kRmsNorm, DType::kFloat32)));
  }
}

// Norms whose checkpoint leaves out the 1 are kept in float32 (ModelConfig::norm_offset).
TEST_P(OpRmsNorm, WeightsMayBeFloat32) {
  Open(GetParam(), SmallLimits(GetParam().dtype));
  Random random(9);
  const Values x = random.Normal(5 * 256, DType::kFloat32, 2.0);
  const Values weight = random.Normal(256, DType::kFloat32, 1e-3, 1.0);
  const TensorView out = Output(act(), {5, 256});
  backend().RmsNorm({.x = Put(x, DType::kFloat32, {5, 256}),
                     .weight = Put(weight, DType::kFloat32, {256}),
                     .out = out,
                     .eps = static_cast<float>(kEps)});
  EXPECT_TRUE(
      Close(Get(out), reference::RmsNorm(x, weight, kEps), ToleranceFor(Op::kRmsNorm, act())));
}

TEST_P(OpRmsNorm, WithoutAWeightItRoundsOnly) {
  Open(GetParam(), SmallLimits(GetParam().dtype));
  const Values x = Random(10).Normal(3 * 100, DType::kFloat32, 2.0);
  const TensorView out = Output(act(), {3, 100});
  backend().RmsNorm(
      {.x = Put(x, DType::kFloat32, {3, 100}), .weight = {}, .out = out, .eps = 1.0f});
  EXPECT_EQ(Get(out), Rounded(x, act()));
}

TEST_P(OpRmsNorm, NanStaysInItsRow) {
  constexpr int64_t kHidden = 256;
  Open(GetParam(), SmallLimits(GetParam().dtype));
  Values x = Random(2).Normal(3 * kHidden, DType::kFloat32);
  x[kHidden + 100] = NAN;
  const Values weight(kHidden, 1.0);
  const TensorView out = Output(act(), {3, kHidden});
  backend().RmsNorm({.x = Put(x, DType::kFloat32, {3, kHidden}),
                     .weight = Put(weight, on().dtype, {kHidden}),
                     .out = out,
                     .eps = static_cast<float>(kEps)});
  EXPECT_TRUE(
      Close(Get(out), reference::RmsNorm(x, weight, kEps), ToleranceFor(Op::kRmsNorm, act())));
}

INSTANTIATE_TEST_SUITE_P(Backends, OpRmsNorm, ::testing::ValuesIn(AllBackends()),
                         CaseNameOf<BackendCase>);

class OpRopeTable : public BackendTest {};

TEST_P(OpRopeTable, MatchesReferenceUpTo128K) {
  constexpr int64_t kDim = 128, kBatch = 2;
  StepLimits limits = SmallLimits(GetParam().dtype);
  limits.model.head_dim = kDim;
  limits.max_seq_len = 131072;
  Open(GetParam(), limits);
  const Ints positions = {0, 1, 17, -1, 4095, 65537, 100003, 131071};
  const Ints seq_idx = {0, 1, 0, 1, 1, 0, 1, 0};
  const int64_t rows = static_cast<int64_t>(positions.size());
  Values inv_freq;
  for (double theta : {1e4, 5e5}) {  // each sequence has its own frequencies
    for (int64_t i = 0; i < kDim; i += 2) {
      inv_freq.push_back(std::pow(theta, -static_cast<double>(i) / kDim));
    }
  }
  inv_freq = Rounded(inv_freq, DType::kFloat32);
  const TensorView cos_sin = Output(DType::kFloat32, {rows, kDim});
  backend().RopeTable({.positions = PutInts(positions, {rows}),
                       .seq_idx = PutInts(seq_idx, {rows}),
                       .inv_freq = Put(inv_freq, DType::kFloat32, {kBatch, kDim / 2}),
                       .attention_scaling = 1.25f,
                       .cos_sin = cos_sin});
  const Values got = Get(cos_sin);
  const Values want = reference::RopeTable(positions, seq_idx, inv_freq, kDim, 1.25);
  for (int64_t row = 0; row < rows; ++row) {
    if (positions[row] < 0) continue;  // not read
    SCOPED_TRACE(positions[row]);
    const auto begin = row * kDim, end = begin + kDim;
    EXPECT_TRUE(Close(Values(got.begin() + begin, got.begin() + end),
                      Values(want.begin() + begin, want.begin() + end),
                      ToleranceFor(Op::kRopeTable, DType::kFloat32)));
  }
}

// Dims that do not turn are not scaled either, at any position.
TEST_P(OpRopeTable, AFrequencyOf0LeavesItsDims) {
  constexpr int64_t kDim = 64, kStill = 5;
  Open(GetParam(), SmallLimits(GetParam().dtype));
  const Ints positions = {0, 1, 2000};
  Values inv_freq(kDim / 2, 0.25);
  std::fill_n(inv_freq.end() - kStill, kStill, 0.0);
  const TensorView cos_sin = Output(DType::kFloat32, {3, kDim});
  backend().RopeTable({.positions = PutInts(positions, {3}),
                       .seq_idx = PutInts({0, 0, 0}, {3}),
                       .inv_freq = Put(inv_freq, DType::kFloat32, {1, kDim / 2}),
                       .attention_scaling = 1.25f,
                       .cos_sin = cos_sin});
  const Values got = Get(cos_sin);
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t i = 0; i < kDim / 2; ++i) {
      const bool is_still = i >= kDim / 2 - kStill;
      const double angle = 0.25 * positions[row];
      const double cosine = got[row * kDim + i], sine = got[row * kDim + kDim / 2 + i];
      ASSERT_NEAR(cosine, is_still ? 1.0 : 1.25 * std::cos(angle), is_still ? 0.0 : 1e-5);
      ASSERT_NEAR(sine, is_still ? 0.0 : 1.25 * std::sin(angle), is_still ? 0.0 : 1e-5);
    }
  }
}

// Ministral 3: the further a query is, the larger it is, in steps of the original length.
TEST_P(OpRopeTable, QueriesMayGrowWithTheirPosition) {
  constexpr int64_t kDim = 64;
  constexpr int32_t kOriginal = 1000;
  Open(GetParam(), SmallLimits(GetParam().dtype));
  const Ints positions = {0, 999, 1000, 1999, 131071, -1};
  const auto rows = static_cast<int64_t>(positions.size());
  const Values inv_freq = Random(12).Normal(kDim / 2, DType::kFloat32, 0.1);
  const TensorView cos_sin = Output(DType::kFloat32, {rows, kDim});
  const TensorView q_cos_sin = Output(DType::kFloat32, {rows, kDim});
  backend().RopeTable({.positions = PutInts(positions, {rows}),
                       .seq_idx = PutInts(Ints(positions.size(), 0), {rows}),
                       .inv_freq = Put(inv_freq, DType::kFloat32, {1, kDim / 2}),
                       .cos_sin = cos_sin,
                       .q_cos_sin = q_cos_sin,
                       .query_scale_beta = 0.1f,
                       .original_len = kOriginal});
  const Values plain = Get(cos_sin), of_queries = Get(q_cos_sin);
  for (int64_t row = 0; row < rows; ++row) {
    if (positions[row] < 0) continue;  // not read
    const double scale = 1.0 + 0.1 * std::log(1.0 + std::floor(positions[row] / kOriginal));
    for (int64_t i = 0; i < kDim; ++i) {
      ASSERT_NEAR(of_queries[row * kDim + i], scale * plain[row * kDim + i], 1e-6);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, OpRopeTable, ::testing::ValuesIn(EachDevice()),
                         CaseNameOf<BackendCase>);

// Appends to two sequences whose pages lie interleaved, and looks at every byte of the cache.
class OpRopeAppendKv : public AttentionTest {
 protected:
  enum class Norms { kNone, kOfEachHead, kOfAllHeads };

  struct Inputs {
    Ints positions;
    Ints seq_idx;
    Values qkv, cos_sin, q_cos_sin, q_norm, k_norm;
  };

  // Tokens across page boundaries of both rows, idle rows between them.
  Inputs MakeInputs(Norms norms) {
    Random random(4);
    const int32_t page = static_cast<int32_t>(shape().page_size);
    Inputs in;
    for (int32_t t = page - 1; t < std::min(2 * page + 2, 3 * page);
         ++t) {  // row 0: a chunk over three pages
      in.positions.push_back(t);
      in.seq_idx.push_back(0);
    }
    in.positions.insert(in.positions.end(), {-1, 0, page, -1, 3 * page - 1});
    in.seq_idx.insert(in.seq_idx.end(), {1, 1, 1, 0, 1});
    const int64_t rows = static_cast<int64_t>(in.positions.size()), dim = shape().head_dim;
    in.qkv = random.Normal(rows * QkvSize(), act(), 2.0);
    const Values inv_freq = random.Normal(2 * dim / 2, DType::kFloat32, 0.1);
    in.cos_sin = Rounded(reference::RopeTable(in.positions, in.seq_idx, inv_freq, dim, 1.0),
                         DType::kFloat32);
    if (norms != Norms::kNone) {
      const bool wide = norms == Norms::kOfAllHeads;
      in.q_norm = random.Normal((wide ? shape().num_q_heads : 1) * dim, dtype(), 0.3, 1.0);
      in.k_norm = random.Normal((wide ? shape().num_kv_heads : 1) * dim, dtype(), 0.3, 1.0);
    }
    in.q_cos_sin = in.cos_sin;
    return in;
  }

  int64_t QkvSize() const {
    return (shape().num_q_heads + 2 * shape().num_kv_heads) * shape().head_dim;
  }

  // Columns [first_head, first_head + count) x D of every row of qkv.
  Values Heads(const Values& qkv, int64_t first_head, int64_t count) const {
    Values out;
    const int64_t dim = shape().head_dim;
    for (int64_t begin = 0; begin < static_cast<int64_t>(qkv.size()); begin += QkvSize()) {
      const auto from = qkv.begin() + begin + first_head * dim;
      out.insert(out.end(), from, from + count * dim);
    }
    return out;
  }

  // Without norms, rotations of queries and a cache.
  RopeAppendKvArgs PlainArgs(const Inputs& in) {
    const auto rows = static_cast<int64_t>(in.positions.size());
    RopeAppendKvArgs args;
    args.qkv = Put(in.qkv, act(), {rows, QkvSize()});
    args.cos_sin = Put(in.cos_sin, DType::kFloat32, {rows, shape().head_dim});
    args.positions = PutInts(in.positions, {rows});
    args.seq_idx = PutInts(in.seq_idx, {rows});
    args.q = Output(act(), {rows, shape().num_q_heads, shape().head_dim});
    return args;
  }

  void OpenWithNorms() {
    StepLimits limits = Limits();
    limits.model.qk_norm = true;
    Open(GetParam().on, limits);
  }
  void RunAndCheck(const Inputs& in);
  void CheckPages(const Inputs& in, const Values& heads, const Bytes& before,
                  const TensorView& pages);
};

constexpr int64_t kMaxPages = 3, kNumPages = 7;
const Ints kPageTable = {4, 0, 2, 1, 6, 5};  // page 3 belongs to nobody

void OpRopeAppendKv::CheckPages(const Inputs& in, const Values& heads, const Bytes& before,
                                const TensorView& pages) {
  const int64_t dim = shape().head_dim, num_heads = shape().num_kv_heads;
  const int64_t page_size = shape().page_size;
  Bytes after = GetBytes(pages);
  const Values stored = Decode(after, dtype());
  Values got, want;
  for (size_t row = 0; row < in.positions.size(); ++row) {
    if (in.positions[row] < 0) continue;
    const int32_t page = kPageTable[in.seq_idx[row] * kMaxPages + in.positions[row] / page_size];
    for (int64_t h = 0; h < num_heads; ++h) {
      const int64_t to = ((page * num_heads + h) * page_size + in.positions[row] % page_size) * dim;
      const int64_t from = (static_cast<int64_t>(row) * num_heads + h) * dim;
      got.insert(got.end(), stored.begin() + to, stored.begin() + to + dim);
      want.insert(want.end(), heads.begin() + from, heads.begin() + from + dim);
      const int64_t width = dim * DTypeBytes(dtype()), begin = to * DTypeBytes(dtype());
      std::copy_n(before.begin() + begin, width, after.begin() + begin);
    }
  }
  EXPECT_TRUE(Close(got, want, ToleranceFor(Op::kRope, dtype())));
  // With the appended slots put back, nothing has changed.
  EXPECT_TRUE(SameBits(after, before, DTypeBytes(dtype())));
}

void OpRopeAppendKv::RunAndCheck(const Inputs& in) {
  const auto [name, num_q_heads, num_kv_heads, dim, page_size] = shape();
  const int64_t rows = static_cast<int64_t>(in.positions.size());
  const Shape pages_shape = {kNumPages, num_kv_heads, page_size, dim};
  const int64_t pages_size = kNumPages * num_kv_heads * page_size * dim;
  const Bytes k_before = Encode(Random(5).Normal(pages_size, dtype()), dtype());
  const Bytes v_before = Encode(Random(6).Normal(pages_size, dtype()), dtype());
  RopeAppendKvArgs args = PlainArgs(in);
  if (!in.q_norm.empty()) {
    args.q_norm = Put(in.q_norm, dtype(), {static_cast<int64_t>(in.q_norm.size())});
    args.k_norm = Put(in.k_norm, dtype(), {static_cast<int64_t>(in.k_norm.size())});
  }
  if (in.q_cos_sin != in.cos_sin) {
    args.q_cos_sin = Put(in.q_cos_sin, DType::kFloat32, {rows, dim});
  }
  args.norm_eps = static_cast<float>(kEps);
  args.kv = {.k_pages = PutBytes(k_before, dtype(), pages_shape),
             .v_pages = PutBytes(v_before, dtype(), pages_shape),
             .page_table = PutInts(kPageTable, {2, kMaxPages}),
             .seq_lens = PutInts(
                 {static_cast<int32_t>(3 * page_size), static_cast<int32_t>(3 * page_size)}, {2})};
  backend().RopeAppendKv(args);

  Values q = Heads(in.qkv, 0, num_q_heads), k = Heads(in.qkv, num_q_heads, num_kv_heads);
  if (!in.q_norm.empty()) {
    q = reference::RmsNorm(q, in.q_norm, kEps);
    k = reference::RmsNorm(k, in.k_norm, kEps);
  }
  q = reference::Rotate(q, in.q_cos_sin, dim);
  k = reference::Rotate(k, in.cos_sin, dim);
  Values got_q = Get(args.q);
  for (int64_t row = 0; row < rows; ++row) {  // idle rows are not read
    if (in.positions[row] >= 0) continue;
    const int64_t begin = row * num_q_heads * dim;
    std::copy_n(q.begin() + begin, num_q_heads * dim, got_q.begin() + begin);
  }
  EXPECT_TRUE(Close(got_q, q, ToleranceFor(Op::kRope, act())));
  CheckPages(in, k, k_before, args.kv.k_pages);
  CheckPages(in, Heads(in.qkv, num_q_heads + num_kv_heads, num_kv_heads), v_before,
             args.kv.v_pages);
}

TEST_P(OpRopeAppendKv, RotatesAppendsAndTouchesNothingElse) {
  Open(GetParam().on, Limits());
  RunAndCheck(MakeInputs(Norms::kNone));
}

TEST_P(OpRopeAppendKv, NormalisesHeadsFirst) {
  OpenWithNorms();
  RunAndCheck(MakeInputs(Norms::kOfEachHead));
}

TEST_P(OpRopeAppendKv, NormalisesAllHeadsTogetherFirst) {
  OpenWithNorms();
  RunAndCheck(MakeInputs(Norms::kOfAllHeads));
}

TEST_P(OpRopeAppendKv, QueriesMayHaveARotationOfTheirOwn) {
  Open(GetParam().on, Limits());
  Inputs in = MakeInputs(Norms::kNone);
  for (double& value : in.q_cos_sin) value *= 2.0;
  RunAndCheck(in);
}

// What a cache of float32 is given is in one of int8 as codes, to half a scale.
TEST_P(OpRopeAppendKv, Int8RowsAreTheNearest) {
  if (!GetParam().on.is_cpu()) GTEST_SKIP() << "CUDA has no cache of int8";
  Open(GetParam().on, Limits());
  const Inputs in = MakeInputs(Norms::kNone);
  const auto [name, num_q_heads, num_kv_heads, dim, page_size] = shape();
  const Shape pages_shape = {kNumPages, num_kv_heads, page_size, dim};
  const Shape scales_shape = {kNumPages, num_kv_heads, page_size};
  RopeAppendKvArgs args = PlainArgs(in);
  const Values zeros(kNumPages * num_kv_heads * page_size * dim, 0.0);
  args.kv.k_pages = Put(zeros, DType::kFloat32, pages_shape);
  args.kv.v_pages = Put(zeros, DType::kFloat32, pages_shape);
  args.kv.page_table = PutInts(kPageTable, {2, kMaxPages});
  args.kv.seq_lens = PutInts({1, 1}, {2});
  backend().RopeAppendKv(args);
  const Values want[] = {Get(args.kv.k_pages), Get(args.kv.v_pages)};

  const Bytes no_codes(zeros.size(), 0);
  args.kv.k_pages = PutBytes(no_codes, DType::kInt8, pages_shape);
  args.kv.v_pages = PutBytes(no_codes, DType::kInt8, pages_shape);
  const Values no_scales(zeros.size() / dim, 0.0);
  args.kv.k_scales = Put(no_scales, DType::kFloat32, scales_shape);
  args.kv.v_scales = Put(no_scales, DType::kFloat32, scales_shape);
  backend().RopeAppendKv(args);
  const Bytes codes[] = {GetBytes(args.kv.k_pages), GetBytes(args.kv.v_pages)};
  const Values scales[] = {Get(args.kv.k_scales), Get(args.kv.v_scales)};
  for (int part : {0, 1}) {
    for (size_t row = 0; row < scales[part].size(); ++row) {
      double largest = 0.0;
      for (int64_t d = 0; d < dim; ++d) {
        largest = std::max(largest, std::fabs(want[part][row * dim + d]));
      }
      const double scale = scales[part][row];
      ASSERT_NEAR(scale, largest / 127.0, largest * 1e-7);
      for (int64_t d = 0; d < dim; ++d) {
        const auto code = static_cast<int8_t>(codes[part][row * dim + d]);
        ASSERT_NEAR(code * scale, want[part][row * dim + d], 0.5001 * scale) << row << ", " << d;
      }
    }
  }
}

// Half the distance between the numbers of fp8 around x.
double HalfStepOfFp8(double x) {
  return std::ldexp(1.0, std::max(std::ilogb(x), -6) - 4);
}

TEST_P(OpRopeAppendKv, Fp8CodesAreTheNearest) {
  StepLimits limits = Limits();
  limits.kv_dtype = DType::kFloat8;
  Open(GetParam().on, limits);
  Inputs in = MakeInputs(Norms::kNone);
  const auto [name, num_q_heads, num_kv_heads, dim, page_size] = shape();
  const int64_t rows = static_cast<int64_t>(in.positions.size());
  in.qkv[QkvSize() - 1] = std::nan("");  // of the first token's last value
  in.qkv[2 * QkvSize() - 1] = -5000.0;   // of the second's
  RopeAppendKvArgs args = PlainArgs(in);
  args.kv.k_pages = Output(DType::kFloat8, {kNumPages, num_kv_heads, page_size, dim});
  args.kv.v_pages = Output(DType::kFloat8, {kNumPages, num_kv_heads, page_size, dim});
  args.kv.page_table = PutInts(kPageTable, {2, kMaxPages});
  args.kv.seq_lens = PutInts({1, 1}, {2});
  // Some keys are beyond the largest number, and some values below the least normal one.
  args.kv.k_scale = 1.0f / 128;
  args.kv.v_scale = 3.0f;
  backend().RopeAppendKv(args);
  auto check = [&](const TensorView& pages, const Values& heads, double scale) {
    Bytes codes = GetBytes(pages);
    for (int64_t row = 0; row < rows; ++row) {
      if (in.positions[row] < 0) continue;
      const int32_t page = kPageTable[in.seq_idx[row] * kMaxPages + in.positions[row] / page_size];
      for (int64_t h = 0; h < num_kv_heads; ++h) {
        const double* head = &heads[(row * num_kv_heads + h) * dim];
        const int64_t slot = (page * num_kv_heads + h) * page_size + in.positions[row] % page_size;
        const bool is_nan = std::any_of(head, head + dim, [](double x) { return std::isnan(x); });
        for (int64_t d = 0; d < dim; ++d) {
          uint8_t& code = codes[slot * dim + d];
          const double want = std::clamp(head[d] / scale, -448.0, 448.0);
          ASSERT_EQ(std::isnan(Float8ToFloat(code)), is_nan) << row << ", " << h << ", " << d;
          if (!is_nan) {
            ASSERT_NEAR(Float8ToFloat(code), want, HalfStepOfFp8(want) + 1e-5 * std::fabs(want));
          }
          code = 0xff;
        }
      }
    }
    EXPECT_EQ(codes, Bytes(codes.size(), 0xff)) << "wrote elsewhere";
  };
  check(args.kv.k_pages,
        reference::Rotate(Heads(in.qkv, num_q_heads, num_kv_heads), in.cos_sin, dim),
        args.kv.k_scale);
  check(args.kv.v_pages, Heads(in.qkv, num_q_heads + num_kv_heads, num_kv_heads), args.kv.v_scale);
}

INSTANTIATE_TEST_SUITE_P(Backends, OpRopeAppendKv,
                         ::testing::ValuesIn(HeadCases(AllBackends(), FewHeadShapes())),
                         CaseNameOf<OpCase<HeadShape>>);

}  // namespace
}  // namespace tidal::test
