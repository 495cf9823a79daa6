// Offsets past 2^31 and 2^32 elements: the same tokens in a pool of so many elements and in a small
// one give the same bits. On the CPU the large pool is address space, of which only the pages in
// use are ever touched; on a GPU it is memory.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>

#include "paged_cache.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

constexpr int64_t kPast31 = int64_t{1} << 31, kPast32 = int64_t{1} << 32;  // elements

// One shape: what differs between shapes does not depend on where a page lies.
HeadShape OneShape() {
  return {"group2_d128_page64", 4, 2, 128, 64};
}

class LargeMemory : public AttentionTest {
 protected:
  void SetUp() override {
    AttentionTest::SetUp();
    if (!IsSkipped()) Open(GetParam().on, Limits());
  }

  // Memory of which little will be touched; null and a reason in `refused` if there is none.
  void* Reserve(int64_t bytes) {
    if (on().is_cpu()) {
      const auto size = static_cast<size_t>(bytes);
      void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (data == MAP_FAILED) {
        refused_ = Concat("the system refuses ", bytes >> 30, " GiB of address space");
        return nullptr;
      }
      memory_.emplace_back(data, bytes, [size](void* pointer) { munmap(pointer, size); });
    } else {
      constexpr int64_t kRoom = int64_t{1} << 30;
      if (backend().info().free_bytes < bytes + kRoom) {
        refused_ = Concat("needs ", bytes >> 30, " GiB of free memory on the GPU");
        return nullptr;
      }
      memory_.push_back(backend().Allocate(bytes, "a large tensor"));
    }
    return memory_.back().data();
  }

  std::string refused_;

 private:
  std::vector<Buffer> memory_;  // before the fixture's backend goes
};

class LargePool : public LargeMemory {
 protected:
  int64_t page_elements() const {
    return shape().num_kv_heads * shape().page_size * shape().head_dim;
  }

  // The pages that the rows use, in the order of their tokens: on both sides of 2^31 and of 2^32
  // elements, at both ends of the pool, and without order.
  Ints LargePages() const {
    const auto past31 = static_cast<int32_t>(kPast31 / page_elements());
    const auto past32 = static_cast<int32_t>(kPast32 / page_elements());
    return {past32, 3,          past31 - 1, past32 + 63, past31,     past32 - 1, 0,
            7,      past31 + 5, past31 + 1, past32 + 7,  past31 - 2, 1,          past32 + 1};
  }
  static constexpr int64_t kPagesOfRow = 7;  // of each of the two rows

  // A pool that holds `k` and `v`, [pages in use, Hkv, page_size, D], in the given pages.
  PagedKv Fill(void* k_memory, void* v_memory, int64_t num_pages, const Ints& pages, const Bytes& k,
               const Bytes& v, const Ints& seq_lens) {
    auto view = [&](void* memory) {
      return TensorView(memory, dtype(),
                        {num_pages, shape().num_kv_heads, shape().page_size, shape().head_dim});
    };
    PagedKv kv = {.k_pages = view(k_memory),
                  .v_pages = view(v_memory),
                  .page_table = PutInts(pages, {2, kPagesOfRow}),
                  .seq_lens = PutInts(seq_lens, {2})};
    const int64_t page_bytes = page_elements() * DTypeBytes(dtype());
    for (size_t i = 0; i < pages.size(); ++i) {
      const auto from = static_cast<int64_t>(i) * page_bytes;
      backend().Upload(kv.k_pages.Rows(pages[i], 1), k.data() + from);
      backend().Upload(kv.v_pages.Rows(pages[i], 1), v.data() + from);
    }
    return kv;
  }

  // Everything that the ops write, one after the other.
  std::vector<Bytes> RunOps(const PagedKv& kv, const Ints& pages, const Ints& seq_lens) {
    Random random(5);
    const int64_t heads = shape().num_q_heads, dim = shape().head_dim;
    const auto scale = static_cast<float>(sm_scale());
    std::vector<Bytes> results;

    const TensorView q = Output(act(), {2, heads, dim});
    backend().RopeAppendKv(RandomNewest(random, kv, seq_lens, q));
    results.push_back(GetBytes(q));
    for (int32_t page : pages) {
      results.push_back(GetBytes(kv.k_pages.Rows(page, 1)));
      results.push_back(GetBytes(kv.v_pages.Rows(page, 1)));
    }

    const TensorView out = Output(act(), {2, heads, dim});
    const AttentionArgs attention = {.q = q, .kv = kv, .rule = {.sm_scale = scale}, .out = out};
    backend().AttentionFull(attention);
    results.push_back(GetBytes(out));
    const TensorView scores = Output(DType::kFloat32, {2, heads, 512});
    const TensorView lse = Output(DType::kFloat32, {2, heads});
    backend().AttentionSelect({.attention = attention, .scores = scores, .lse = lse});
    results.push_back(GetBytes(scores));
    results.push_back(GetBytes(lse));

    // Every fifth token, so that each page has some.
    Ints list;
    for (int32_t seq_len : seq_lens) {
      for (int32_t i = 0; i < 64; ++i) list.push_back(std::min(5 * i, seq_len - 1));
    }
    backend().AttentionSparse({.attention = attention,
                               .token_idx = PutInts(list, {2, 1, 64}),
                               .num_selected = PutInts({64, 64}, {2, 1})});
    results.push_back(GetBytes(out));

    // A chunk of many queries, and one of a few.
    for (int32_t queries : {100, 3}) {
      const int64_t tokens = 2 * queries;
      const TensorView chunk =
          Put(random.Normal(tokens * heads * dim, act()), act(), {tokens, heads, dim});
      const TensorView chunk_out = Output(act(), {tokens, heads, dim});
      backend().AttentionPrefill({.q = chunk,
                                  .q_starts = PutInts({0, queries, 2 * queries}, {3}),
                                  .kv = kv,
                                  .rule = {.sm_scale = scale},
                                  .out = chunk_out,
                                  .max_q_len = queries,
                                  .max_seq_len = 512});
      results.push_back(GetBytes(chunk_out));
    }
    return results;
  }
};

TEST_P(LargePool, HoldsWhatASmallOneHolds) {
  const Ints large_pages = LargePages(), seq_lens = {437, 401};  // both end in their 7th page
  const auto used = static_cast<int64_t>(large_pages.size());
  const int64_t large_num_pages = kPast32 / page_elements() + 64;
  const int64_t page_bytes = page_elements() * DTypeBytes(dtype());
  void* k_memory = Reserve(large_num_pages * page_bytes);
  void* v_memory = k_memory == nullptr ? nullptr : Reserve(large_num_pages * page_bytes);
  if (v_memory == nullptr) GTEST_SKIP() << refused_;

  Random random(4);
  const Bytes k = Encode(random.Normal(used * page_elements(), dtype()), dtype());
  const Bytes v = Encode(random.Normal(used * page_elements(), dtype()), dtype());
  const PagedKv large = Fill(k_memory, v_memory, large_num_pages, large_pages, k, v, seq_lens);
  const std::vector<Bytes> got = RunOps(large, large_pages, seq_lens);

  const Ints small_pages = Random(6).Permutation(used);
  const Shape small_shape = {used, shape().num_kv_heads, shape().page_size, shape().head_dim};
  const TensorView small_k = Output(dtype(), small_shape), small_v = Output(dtype(), small_shape);
  const PagedKv small = Fill(small_k.ptr, small_v.ptr, used, small_pages, k, v, seq_lens);
  const std::vector<Bytes> want = RunOps(small, small_pages, seq_lens);

  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(got[i] == want[i]) << "result " << i;
}

INSTANTIATE_TEST_SUITE_P(Backends, LargePool,
                         ::testing::ValuesIn(Cases<HeadShape>(AllBackends(), {OneShape()})),
                         CaseNameOf<OpCase<HeadShape>>);

class LargeScores : public LargeMemory {
 protected:
  // What a select layer writes and chooses with rows of max_len scores at `memory`: the scores of
  // the first 512 positions of every row and head, lse and sets.
  std::vector<Bytes> Select(const AttentionArgs& attention, void* memory, int64_t max_len) {
    const int64_t rows = attention.q.dim(0), heads = shape().num_q_heads;
    const TensorView scores(memory, DType::kFloat32, {rows, heads, max_len});
    const TensorView lse = Output(DType::kFloat32, {rows, heads});
    backend().AttentionSelect({.attention = attention, .scores = scores, .lse = lse});
    const TensorView token_idx = Output(DType::kInt32, {rows, 1, 64});
    const TensorView num_selected = Output(DType::kInt32, {rows, 1});
    backend().SelectTopK({.scores = scores,
                          .lse = lse,
                          .seq_lens = attention.kv.seq_lens,
                          .num_kv_heads = shape().num_kv_heads,
                          .granularity = Granularity::kLayer,
                          .pooling = Pooling::kSum,
                          .sink_tokens = 1,
                          .recent_tokens = 1,
                          .token_idx = token_idx,
                          .num_selected = num_selected});
    std::vector<Bytes> results = {GetBytes(attention.out), GetBytes(lse), GetBytes(token_idx),
                                  GetBytes(num_selected)};
    for (int64_t row = 0; row < rows * heads; ++row) {
      float* first = static_cast<float*>(memory) + row * max_len;
      results.push_back(GetBytes(TensorView(first, DType::kFloat32, {400})));
    }
    return results;
  }
};

TEST_P(LargeScores, AreFoundWhereTheyWereWritten) {
  const Ints seq_lens = {437, 400, 512};
  constexpr int64_t kMaxLen = int64_t{1} << 28;  // row 2 begins at 2^31 elements
  const int64_t rows = 3, heads = shape().num_q_heads, dim = shape().head_dim;
  void* memory = Reserve(rows * heads * kMaxLen * static_cast<int64_t>(sizeof(float)));
  if (memory == nullptr) GTEST_SKIP() << refused_;
  Random random(8);
  const PagedKv kv = PutCache(RandomSequences(random, shape(), seq_lens, dtype()), 64);
  const TensorView q = Put(random.Normal(rows * heads * dim, act()), act(), {rows, heads, dim});
  const AttentionArgs attention = {.q = q,
                                   .kv = kv,
                                   .rule = {.sm_scale = static_cast<float>(sm_scale())},
                                   .out = Output(act(), {rows, heads, dim})};
  std::vector<Bytes> got;
  try {
    got = Select(attention, memory, kMaxLen);
  } catch (const OutOfMemoryError& error) {
    GTEST_SKIP() << "the selection's own scratch: " << error.what();
  }
  const TensorView small = Output(DType::kFloat32, {rows, heads, 512});
  const std::vector<Bytes> want = Select(attention, small.ptr, 512);
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(got[i] == want[i]) << "result " << i;
}

INSTANTIATE_TEST_SUITE_P(Backends, LargeScores,
                         ::testing::ValuesIn(Cases<HeadShape>(EachDevice(), {OneShape()})),
                         CaseNameOf<OpCase<HeadShape>>);

}  // namespace
}  // namespace tidal::test
