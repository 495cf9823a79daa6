// How attention is dealt to CUDA blocks: host arithmetic, which needs no device.
#include "common/launch_config.h"

#include <gtest/gtest.h>

#include "common/attention_scratch.h"

namespace tidal::test {
namespace {

constexpr int kSms = 132;  // an H200

PromptSplits Choose(int64_t num_tiles, int64_t num_token_tiles) {
  return ChoosePromptSplits(Splitting::kByBatch, num_tiles, num_token_tiles, kSms);
}

// Waves of blocks times what each takes, in tiles of tokens.
double Time(int64_t num_tiles, int64_t num_token_tiles) {
  const PromptSplits splits = Choose(num_tiles, num_token_tiles);
  const int64_t num_split = num_tiles - splits.num_whole;
  const int64_t whole_waves = (splits.num_whole + kSms - 1) / kSms;
  const int64_t split_waves = (num_split * splits.num_splits + kSms - 1) / kSms;
  return static_cast<double>(whole_waves * num_token_tiles + split_waves * splits.span);
}

TEST(PromptSplits, EveryTileIsReadWholeAndFitsTheScratch) {
  const AttentionScratchSize scratch =
      SizeOfAttentionScratch(Splitting::kByBatch, 1, 32, 128, kSms);
  for (int64_t num_token_tiles : {1, 4, 7, 8, 25, 40, 160, 1024, 4097}) {
    for (int64_t num_tiles = 1; num_tiles < 700; ++num_tiles) {
      SCOPED_TRACE(::testing::Message() << num_tiles << " tiles, " << num_token_tiles);
      const PromptSplits splits = Choose(num_tiles, num_token_tiles);
      const int64_t num_split = num_tiles - splits.num_whole;
      ASSERT_GE(num_split, 0);
      ASSERT_LT(num_split, kSms);
      if (num_split == 0) continue;
      ASSERT_EQ(splits.num_whole % kSms, 0);
      ASSERT_GE(splits.num_splits, 2);
      ASSERT_GE(splits.span, kLeastPromptSpan);
      ASSERT_GE(int64_t{splits.num_splits} * splits.span, num_token_tiles);
      ASSERT_LE(PromptPartBytes(num_split * splits.num_splits, 128), scratch.partial_bytes);
      ASSERT_LE(num_split * int64_t{sizeof(uint32_t)}, scratch.counter_bytes);
    }
  }
}

TEST(PromptSplits, ShortContextsAndFullWavesStayWhole) {
  for (int64_t num_tiles : {1, 40, 131, 133, 300}) {
    for (int64_t num_token_tiles : {1, 4, 7}) {
      EXPECT_EQ(Choose(num_tiles, num_token_tiles).num_whole, num_tiles);
    }
  }
  for (int64_t num_tiles : {kSms, 2 * kSms, 7 * kSms}) {
    EXPECT_EQ(Choose(num_tiles, 1024).num_whole, num_tiles);
  }
}

// Or a query's value would depend on the chunk that it is read in.
TEST(PromptSplits, ByRowNothingIsSplit) {
  const PromptSplits splits = ChoosePromptSplits(Splitting::kByRow, 16, 1024, kSms);
  EXPECT_EQ(splits.num_whole, 16);
}

// Unsplit, 16 tiles take 8 times their share of the device, and 136 nearly twice.
TEST(PromptSplits, FewTilesBehindALongContextFillTheDevice) {
  constexpr int64_t kTokenTiles = 1024;
  for (int64_t num_tiles = 8; num_tiles < 500; num_tiles += 8) {
    const double share = static_cast<double>(num_tiles * kTokenTiles) / kSms;
    EXPECT_LE(Time(num_tiles, kTokenTiles), share * 1.11) << num_tiles;
  }
}

TEST(HeadParts, EachHeadOfAGroupHasABlockWithRoom) {
  for (int64_t group_size = 1; group_size <= kMaxGroupSize; ++group_size) {
    const HeadParts parts = PartsOfGroup(3 * group_size, 3);
    EXPECT_EQ(parts.group_size, group_size);
    EXPECT_LE(parts.heads, kBlockHeads);
    EXPECT_GE(parts.count * parts.heads, group_size);
    EXPECT_LT((parts.count - 1) * parts.heads, group_size) << "a block without heads";
    EXPECT_EQ(parts.count == 1, group_size <= kBlockHeads);
  }
}

// As many blocks as kernels/attention_few_queries.cuh makes of a call's rows, or by row of one.
void ExpectRoomForFewQueries(Splitting splitting, int64_t num_kv_heads, int64_t group_size,
                             int64_t batch_size, int64_t head_dim) {
  const int64_t num_q_heads = num_kv_heads * group_size;
  const int64_t head_blocks = num_kv_heads * PartsOfGroup(num_q_heads, num_kv_heads).count;
  const bool by_row = splitting == Splitting::kByRow;
  const AttentionScratchSize scratch =
      SizeOfAttentionScratch(splitting, batch_size, num_q_heads, head_dim, kSms);
  const int num_splits = ChooseSplits(splitting, batch_size, head_blocks, kSms).num_splits;
  if (num_splits == 1) return;  // nothing to merge
  const int64_t per_block = kFewQueriesColumns / group_size;
  const int64_t blocks = (kMaxFewQueries + per_block - 1) / per_block + (by_row ? 2 : 0);
  const int64_t counters = (by_row ? 1 : batch_size) * num_kv_heads * blocks;
  ASSERT_LE(PartialBytes(counters * kFewQueriesColumns * num_splits, head_dim),
            scratch.partial_bytes);
  ASSERT_LE(counters * int64_t{sizeof(uint32_t)}, scratch.counter_bytes);
}

TEST(AttentionScratchSize, HoldsAFewQueriesOfAnyGroup) {
  for (Splitting splitting : {Splitting::kByBatch, Splitting::kByRow}) {
    for (int64_t num_kv_heads : {1, 2, 3, 8, 40}) {
      for (int64_t group_size = 1; group_size <= kMaxGroupSize; ++group_size) {
        for (int64_t batch_size : {1, 2, 7, 64}) {
          for (int64_t head_dim : {64, 80, 96, 128, 256}) {
            ExpectRoomForFewQueries(splitting, num_kv_heads, group_size, batch_size, head_dim);
          }
        }
      }
    }
  }
}

// Their kernel splits no prompts: decode steps ask for all, of as many heads whatever their size.
TEST(AttentionScratchSize, HoldsNoPartsOfPromptsWithOtherHeads) {
  const auto parts = [](int64_t head_dim) {
    const AttentionScratchSize scratch =
        SizeOfAttentionScratch(Splitting::kByBatch, 1, 32, head_dim, kSms);
    return scratch.partial_bytes / PartialBytes(1, head_dim);
  };
  EXPECT_EQ(parts(80), parts(96));
  EXPECT_EQ(parts(96), parts(256));
  EXPECT_LT(PartialBytes(parts(256), 256), PromptPartBytes(kMaxPromptWaves * kSms, 256));
}

}  // namespace
}  // namespace tidal::test
