// Logprobs: log-probabilities of a row's token and of its most likely ones, against the reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "backend_test.h"

namespace tidal::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Outcome {
  Values logprobs;  // [R, 1 + K]
  Ints ids;         // [R, 1 + K]
};

class OpLogprobs : public BackendTest {
 protected:
  void OpenOn(int64_t vocab_size) {
    StepLimits limits = SmallLimits(GetParam().dtype);
    limits.model.vocab_size = vocab_size;
    Open(GetParam(), limits);
    vocab_size_ = vocab_size;
  }

  // `token_ids`: one for each of `rows`.
  Outcome Run(const Values& logits, const Ints& rows, const Ints& token_ids, int64_t num_top) {
    const auto num_rows = static_cast<int64_t>(rows.size());
    const int64_t batch_size = static_cast<int64_t>(logits.size()) / vocab_size_;
    const LogprobsArgs args = {.logits = Put(logits, DType::kFloat32, {batch_size, vocab_size_}),
                               .rows = PutInts(rows, {num_rows}),
                               .token_ids = PutInts(token_ids, {num_rows}),
                               .logprobs = Output(DType::kFloat32, {num_rows, 1 + num_top}),
                               .ids = Output(DType::kInt32, {num_rows, 1 + num_top})};
    backend().Logprobs(args);
    return {Get(args.logprobs), GetInts(args.ids)};
  }

 private:
  int64_t vocab_size_ = 0;
};

TEST_P(OpLogprobs, EqualTheReferenceForAnyRowAndCount) {
  for (int64_t vocab_size : {7, 1000, 32003}) {
    OpenOn(vocab_size);
    Random random(31);
    const Ints token_ids = random.Below(3, static_cast<int32_t>(vocab_size));
    const Values logits = random.Normal(5 * vocab_size, DType::kFloat32, 4.0);
    for (int64_t num_top : {0, 1, 5, 20}) {
      SCOPED_TRACE(::testing::Message() << vocab_size << " tokens, top " << num_top);
      const Ints rows = {3, 0, 4};
      const Outcome got = Run(logits, rows, token_ids, num_top);
      for (size_t r = 0; r < rows.size(); ++r) {
        const auto first = logits.begin() + rows[r] * vocab_size;
        const Values want = reference::LogSoftmax({first, first + vocab_size});
        Ints order(static_cast<size_t>(vocab_size));
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return want[a] > want[b]; });
        const size_t at = r * static_cast<size_t>(1 + num_top);
        const int32_t token_id = token_ids[r];
        EXPECT_NEAR(got.logprobs[at], want[token_id], 2e-5);
        EXPECT_EQ(order[static_cast<size_t>(got.ids[at] - 1)], token_id) << "by its rank";
        for (int64_t k = 1; k <= num_top; ++k) {
          const bool is_there = k <= vocab_size;
          EXPECT_EQ(got.ids[at + k], is_there ? order[k - 1] : -1);
          if (is_there) {
            EXPECT_NEAR(got.logprobs[at + k], want[order[k - 1]], 2e-5);
          } else {
            EXPECT_EQ(got.logprobs[at + k], -kInf);
          }
        }
      }
    }
  }
}

TEST_P(OpLogprobs, OfEqualsTheLowerIdComesFirst) {
  constexpr int64_t kVocab = 5000;
  OpenOn(kVocab);
  Values logits(kVocab, 1.0);
  logits[4000] = logits[123] = 2.0;
  const Outcome got = Run(logits, {0}, {700}, 4);
  EXPECT_EQ(got.ids, (Ints{702, 123, 4000, 0, 1}));  // 699 lower ids, two better ones
}

TEST_P(OpLogprobs, ImpossibleTokensAndRowsWithoutATokenHaveNone) {
  OpenOn(40);
  Values logits(2 * 40, -kInf);
  logits[5] = 0.0;
  logits[9] = logits[40] = std::log(3.0);
  const Outcome got = Run(logits, {0, 1}, {5, -1}, 3);
  EXPECT_EQ(got.ids, (Ints{2, 9, 5, -1, 0, 0, -1, -1}));
  const Values want = {std::log(0.25), std::log(0.75), std::log(0.25), -kInf, -kInf, 0.0,
                       -kInf,          -kInf};
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::isinf(want[i])) {
      EXPECT_EQ(got.logprobs[i], want[i]) << i;
    } else {
      EXPECT_NEAR(got.logprobs[i], want[i], 1e-6) << i;
    }
  }
}

// What a row of unusable logits gives nobody reads; its neighbours are as without it.
TEST_P(OpLogprobs, ARowOfNansChangesNoOther) {
  constexpr int64_t kVocab = 3000;
  OpenOn(kVocab);
  Values logits = Random(33).Normal(2 * kVocab, DType::kFloat32);
  const Outcome want = Run(logits, {1}, {2}, 5);
  std::fill_n(logits.begin(), kVocab, std::numeric_limits<double>::quiet_NaN());
  const Outcome got = Run(logits, {0, 1}, {-1, 2}, 5);
  EXPECT_EQ(Ints(got.ids.begin() + 6, got.ids.end()), want.ids);
  EXPECT_EQ(Values(got.logprobs.begin() + 6, got.logprobs.end()), want.logprobs);
}

INSTANTIATE_TEST_SUITE_P(Backends, OpLogprobs, ::testing::ValuesIn(EachDevice()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
