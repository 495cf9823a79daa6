// Batch: what a pass may be asked for.
#include "decode/batch.h"

#include <gtest/gtest.h>

#include "kv/page_pool.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

class BatchTest : public ::testing::Test {
 protected:
  Sequence Make(uint64_t id, int64_t num_tokens, int64_t cached) {
    return {.id = id,
            .tokens = std::vector<int32_t>(static_cast<size_t>(num_tokens), 7),
            .cached = cached,
            .pages = SequencePages(pool_, num_tokens),
            .inv_freq = {},
            .sampling = {}};
  }

  PagePool pool_{16, 4};
  Sequence decoding_ = Make(5, 18, 17);
  Sequence prompt_ = Make(6, 9, 0);
};

TEST_F(BatchTest, RowsOfOneTokenAndOneDrawAreAStep) {
  const Batch step = {{{&decoding_}}, PlanId::kDecoder};
  EXPECT_TRUE(step.is_step());
  EXPECT_NO_THROW(CheckBatch(step));
  EXPECT_FALSE((Batch{{{&decoding_}, {&prompt_, 9, 1}}}.is_step()));
  // The last token of a correction: nothing is drawn.
  EXPECT_FALSE((Batch{{{&decoding_, 1, 0}}}.is_step()));
}

TEST_F(BatchTest, OnlyAStepGoesThroughAPlan) {
  EXPECT_NO_THROW(CheckBatch({{{&prompt_, 9, 1}, {&decoding_, 1, 0}}}));
  EXPECT_TRUE(Throws<InvalidArgument>(
      [&] {
        CheckBatch({{{&prompt_, 9, 1}}, PlanId::kDecoder});
      },
      {"plan 1", "dense"}));
}

TEST_F(BatchTest, WhatARowCannotGiveIsRefusedByItsNumber) {
  const auto refuses = [](std::vector<BatchRow> rows, std::initializer_list<std::string> parts) {
    return Throws<InvalidArgument>([&] { CheckBatch({.rows = std::move(rows)}); }, parts);
  };
  EXPECT_TRUE(refuses({}, {"no rows"}));
  EXPECT_TRUE(refuses({{&prompt_}, {}}, {"row 1", "no sequence"}));
  EXPECT_TRUE(refuses({{&prompt_, 10}}, {"row 0", "num_tokens 10", "1 to 9"}));
  EXPECT_TRUE(refuses({{&prompt_, 0, 0}}, {"num_tokens 0"}));
  EXPECT_TRUE(refuses({{&prompt_, 4, 5}}, {"num_draws 5", "0 to 4"}));
  EXPECT_TRUE(refuses({{&prompt_, 4, -1}}, {"num_draws -1"}));
  EXPECT_TRUE(refuses({{&prompt_, 4, 1, 5}}, {"num_logits 5", "0 to 4"}));
  EXPECT_TRUE(refuses({{&prompt_, 4, 1, 4}}, {"row 0", "no place for its 4 logits"}));
  float place = 0.0f;
  EXPECT_NO_THROW(CheckBatch({{{.sequence = &prompt_, .num_logits = 1, .logits = &place}}}));
  EXPECT_TRUE(refuses({{&prompt_, 4, 1, 0, 21}}, {"num_logprobs 21", "0 to 20"}));
  EXPECT_TRUE(refuses({{&prompt_, 4, 1, 0, -1}}, {"num_logprobs -1"}));
  EXPECT_TRUE(refuses({{&prompt_, 9, 1, 0, 0, 9}}, {"num_scored 9", "0 to 8"}));
  EXPECT_TRUE(refuses({{&prompt_, 4, 1, 0, {}, 1}}, {"num_scored 1", "0 to 0"}));
  EXPECT_NO_THROW(CheckBatch({{{&prompt_, 4, 1, 0, 5, 4}}}));
  EXPECT_TRUE(refuses({{&decoding_}, {&prompt_}, {&decoding_}}, {"sequence 5", "two rows"}));
}

TEST_F(BatchTest, IsPrintable) {
  EXPECT_EQ(ToString({{{&decoding_}, {&prompt_, 8, 0}, {&prompt_, 9, 1, 9}}, PlanId::kDecoder}),
            "plan 1: 17 +1 draw 1, 0 +8, 0 +9 draw 1 logits 9");
  EXPECT_EQ(ToString({{{&prompt_, 9, 1, 0, 5, 8}}, PlanId::kDense}),
            "plan 0: 0 +9 draw 1 logprobs 5 scored 8");
}

}  // namespace
}  // namespace tidal::test
