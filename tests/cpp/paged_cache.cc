// Sequences in a paged cache (paged_cache.h).
#include "paged_cache.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/float8.h"
#include "core/int8_row.h"

namespace tidal::test {

namespace {

// What a cache of codes holds of rows [row_size].
struct CodedRows {
  Bytes codes;
  Values scales;  // [rows] of int8
};

CodedRows EncodeRows(const Values& values, int64_t row_size, DType dtype, float scale) {
  const std::vector<float> numbers(values.begin(), values.end());
  CodedRows rows{Bytes(values.size()), {}};
  for (size_t begin = 0; begin < numbers.size(); begin += row_size) {
    const float* row = &numbers[begin];
    uint8_t* codes = &rows.codes[begin];
    if (dtype == DType::kFloat8) {
      EncodeFloat8Row(row, row_size, scale, reinterpret_cast<Float8*>(codes));
    } else {
      rows.scales.push_back(EncodeInt8Row(row, row_size, reinterpret_cast<int8_t*>(codes)));
    }
  }
  return rows;
}

Values Stored(const Values& values, int64_t row_size, DType dtype, float scale) {
  if (DTypeBytes(dtype) > 1) return Rounded(values, dtype);
  const CodedRows rows = EncodeRows(values, row_size, dtype, scale);
  Values stored(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    stored[i] = dtype == DType::kFloat8 ? Float8ToFloat(rows.codes[i]) * scale
                                        : static_cast<float>(static_cast<int8_t>(rows.codes[i])) *
                                              static_cast<float>(rows.scales[i / row_size]);
  }
  return stored;
}

}  // namespace

Values StoredKeys(const Values& rows, int64_t row_size, DType dtype) {
  return Stored(rows, row_size, dtype, kKeyScale);
}

Values StoredValues(const Values& rows, int64_t row_size, DType dtype) {
  return Stored(rows, row_size, dtype, kValueScale);
}

std::vector<HeadShape> CommonHeadShapes() {
  return {{"mha_d64_page16", 4, 4, 64, 16},       {"group2_d128_page8", 4, 2, 128, 8},
          {"group3_d64_page32", 6, 2, 64, 32},    {"group4_d128_page64", 8, 2, 128, 64},
          {"group5_d64_page128", 5, 1, 64, 128},  {"group7_d128_page256", 14, 2, 128, 256},
          {"group8_d64_page64", 8, 1, 64, 64},    {"group11_d64_page16", 11, 1, 64, 16},
          {"group16_d128_page32", 32, 2, 128, 32}};
}

std::vector<HeadShape> FewHeadShapes() {
  return {{"mha_d64_page16", 4, 4, 64, 16}, {"group4_d128_page8", 8, 2, 128, 8}};
}

std::vector<OpCase<HeadShape>> HeadCases(const std::vector<BackendCase>& backends,
                                         const std::vector<HeadShape>& everywhere) {
  std::vector<OpCase<HeadShape>> cases = Cases<HeadShape>(
      backends, everywhere, {{"group3_d20_page7", 6, 2, 20, 7}, {"group1_d12_page1", 3, 3, 12, 1}});
  for (const BackendCase& on : backends) {
    if (!on.has_all_head_dims()) continue;
    cases.push_back({on, {"group3_d80_page16", 6, 2, 80, 16}});
    cases.push_back({on, {"group2_d96_page32", 4, 2, 96, 32}});
    cases.push_back({on, {"group4_d256_page16", 4, 1, 256, 16}});
    cases.push_back({on, {"group11_d256_page64", 11, 1, 256, 64}});
  }
  return cases;
}

std::vector<reference::Sequence> RandomSequences(Random& random, const HeadShape& shape,
                                                 const Ints& seq_lens, DType dtype) {
  std::vector<reference::Sequence> sequences;
  for (int32_t seq_len : seq_lens) {
    const int64_t count = seq_len * shape.num_kv_heads * shape.head_dim;
    const Values k = random.Normal(count, DType::kFloat32);
    const Values v = random.Normal(count, DType::kFloat32);
    sequences.push_back({shape.num_kv_heads, shape.head_dim, StoredKeys(k, shape.head_dim, dtype),
                         StoredValues(v, shape.head_dim, dtype)});
  }
  return sequences;
}

StepLimits AttentionTest::Limits() const {
  StepLimits limits = SmallLimits(dtype());
  limits.kv_dtype = kv_dtype();
  limits.model.num_q_heads = shape().num_q_heads;
  limits.model.num_kv_heads = shape().num_kv_heads;
  limits.model.head_dim = shape().head_dim;
  limits.page_size = shape().page_size;
  return limits;
}

double AttentionTest::sm_scale() const {
  return 1.0 / std::sqrt(shape().head_dim);
}

PagedKv AttentionTest::PutCache(const std::vector<reference::Sequence>& sequences,
                                int64_t page_size, double unused) {
  const int64_t heads = shape().num_kv_heads, dim = shape().head_dim;
  const int64_t batch_size = static_cast<int64_t>(sequences.size());
  Ints seq_lens, pages_of_row;
  int64_t used_pages = 0, max_pages = 1;
  for (const reference::Sequence& sequence : sequences) {
    const int64_t pages = (sequence.seq_len() + page_size - 1) / page_size;
    seq_lens.push_back(static_cast<int32_t>(sequence.seq_len()));
    used_pages += pages;
    max_pages = std::max(max_pages, pages);
  }
  const int64_t num_pages = used_pages + 2;  // two stay unused
  const Ints order = Random(99).Permutation(num_pages);
  Values k(num_pages * heads * page_size * dim, unused), v = k;
  Ints page_table(batch_size * max_pages, order.back());
  int64_t next_page = 0;
  for (int64_t b = 0; b < batch_size; ++b) {
    for (int64_t t = 0; t < seq_lens[b]; ++t) {
      int32_t& page = page_table[b * max_pages + t / page_size];
      if (t % page_size == 0) page = order[next_page++];
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t from = (t * heads + h) * dim;
        const int64_t to = ((page * heads + h) * page_size + t % page_size) * dim;
        std::copy_n(&sequences[b].k[from], dim, &k[to]);
        std::copy_n(&sequences[b].v[from], dim, &v[to]);
      }
    }
  }
  PagedKv kv;
  const Shape pages_shape = {num_pages, heads, page_size, dim};
  auto put = [&](const Values& values, float scale, TensorView& pages, TensorView& scales) {
    if (DTypeBytes(kv_dtype()) > 1) {
      pages = Put(values, kv_dtype(), pages_shape);
      return;
    }
    const CodedRows rows = EncodeRows(values, dim, kv_dtype(), scale);
    pages = PutBytes(rows.codes, kv_dtype(), pages_shape);
    if (rows.scales.empty()) return;
    scales = Put(rows.scales, DType::kFloat32, {num_pages, heads, page_size});
  };
  put(k, kKeyScale, kv.k_pages, kv.k_scales);
  put(v, kValueScale, kv.v_pages, kv.v_scales);
  if (kv_dtype() == DType::kFloat8) {
    kv.k_scale = kKeyScale;
    kv.v_scale = kValueScale;
  }
  kv.page_table = PutInts(page_table, {batch_size, max_pages});
  kv.seq_lens = PutInts(seq_lens, {batch_size});
  return kv;
}

RopeAppendKvArgs AttentionTest::RandomNewest(Random& random, const PagedKv& kv,
                                             const Ints& seq_lens, const TensorView& q) {
  const int64_t rows = static_cast<int64_t>(seq_lens.size()), dim = shape().head_dim;
  const int64_t width = (shape().num_q_heads + 2 * shape().num_kv_heads) * dim;
  Ints positions, seq_idx;
  for (int32_t seq_len : seq_lens) {
    positions.push_back(seq_len - 1);  // of an idle row: -1
    seq_idx.push_back(static_cast<int32_t>(seq_idx.size()));
  }
  return {.qkv = Put(random.Normal(rows * width, act()), act(), {rows, width}),
          .cos_sin = Put(random.Normal(rows * dim, DType::kFloat32), DType::kFloat32, {rows, dim}),
          .q_norm = {},
          .k_norm = {},
          .positions = PutInts(positions, {rows}),
          .seq_idx = PutInts(seq_idx, {rows}),
          .q = q,
          .kv = kv,
          .appended = Appended::kNewestOfEachRow};
}

void AttentionTest::ExpectStepEqualsOps(const std::function<void()>& ops,
                                        const std::vector<TensorView>& changed) {
  std::vector<Bytes> before, want;
  for (const TensorView& tensor : changed) before.push_back(GetBytes(tensor));
  ops();
  for (const TensorView& tensor : changed) want.push_back(GetBytes(tensor));
  const StepKey key = NewStep();
  const int rounds = on().is_cpu() ? 1 : 5;  // called; elsewhere recorded and replayed too
  for (int round = 0; round < rounds; ++round) {
    SCOPED_TRACE(round);
    for (size_t i = 0; i < changed.size(); ++i) backend().Upload(changed[i], before[i].data());
    backend().RunStep(key, ops);
    for (size_t i = 0; i < changed.size(); ++i) {
      SCOPED_TRACE(i);
      EXPECT_TRUE(SameBits(GetBytes(changed[i]), want[i], DTypeBytes(changed[i].dtype)));
    }
  }
}

}  // namespace tidal::test
