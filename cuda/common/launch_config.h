// How attention is cut into CUDA blocks: pure host arithmetic, the same on every machine.
//
// Grid sizes depend on shapes and the device's SM count only, never on lengths, so that an eager
// launch and the replay of a graph are the same work, bit for bit.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tidal {

// Elements from one row of a head to the next where rows lie in shared memory or in scratch: a
// power of two, of which heads of 80 and 96 leave the last ones unused.
constexpr int64_t PaddedHeadDim(int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}
template <int kHeadDim>
inline constexpr int kPaddedDim = static_cast<int>(PaddedHeadDim(kHeadDim));

inline constexpr int kMaxGroupSize = 16;  // query heads of one KV head
// Query heads of a block of a decode kernel, all of one KV head: the N of one mma.m16n8k16.
inline constexpr int kBlockHeads = 8;

// How a KV head's query heads are dealt to blocks: as evenly as may be to the fewest that have
// room. Where these are several, they find the same lines of the cache in the L2.
struct HeadParts {
  int group_size;
  int count;  // blocks
  int heads;  // of each block, but of the last maybe fewer
};

inline HeadParts PartsOfGroup(int64_t num_q_heads, int64_t num_kv_heads) {
  int group_size = static_cast<int>(num_q_heads / num_kv_heads);
  int count = (group_size + kBlockHeads - 1) / kBlockHeads;
  return {.group_size = group_size, .count = count, .heads = (group_size + count - 1) / count};
}

// attention_few_queries: queries of a row, query heads of a block, and blocks that a row's queries
// take for one KV head and split (at a group of 8, two queries each). Larger groups take up to
// twice as many, but where there are splits they are half as many (ChooseSplits).
inline constexpr int kMaxFewQueries = 32;
inline constexpr int kFewQueriesColumns = 16;
// Two more than the queries fill: those of two lengths of split do not share a block, nor those
// whose windows begin in different places.
inline constexpr int kMaxBlocksOfRow = kMaxFewQueries * kBlockHeads / kFewQueriesColumns + 2;

inline constexpr int kDecodeWarps = 4;      // of a block of a decode kernel
inline constexpr int kDecodeWarpTile = 16;  // tokens one warp takes at a time: the M of one mma
inline constexpr int kDecodeTile = kDecodeWarps * kDecodeWarpTile;
inline constexpr int kDecodeBlocksPerSm = 2;  // what their shared memory allows (96 KB each)

inline constexpr int kMaxAttendedTokens = 1 << 30;  // by one row

// One block merges all splits of a row, and each costs it 4 KB of reads at a group of 8, some 40 ns
// (estimated). With few KV heads that soon outweighs what more splits gain.
inline constexpr int kMaxSplits = 64;
// Splits that are a cluster of blocks: the largest that every device with clusters has.
inline constexpr int kMaxClusterSplits = 8;
// Tokens of a block up to which a cluster is worth it: the blocks of one must all find room at the
// same time, which costs more than it saves when blocks are busy for long.
inline constexpr int kMaxClusterSpan = 128;

// Into how many spans the tokens of each of `num_rows` (batch row, head) pairs are split, so that
// all blocks of the grid run at once. `max_tokens`: what one row can attend to at most; no split
// gets less than one tile then.
inline int ChooseNumSplits(int64_t num_rows, int num_sms, int64_t max_tokens) {
  int64_t fill_device = int64_t{kDecodeBlocksPerSm} * num_sms / std::max<int64_t>(num_rows, 1);
  int64_t max_tiles = (max_tokens + kDecodeTile - 1) / kDecodeTile;
  int64_t num_splits = std::min({fill_device, max_tiles, int64_t{kMaxSplits}});
  return static_cast<int>(std::max<int64_t>(num_splits, 1));
}

// How a row's tokens are cut into splits (SpanLength): at most num_splits of whole units, none but
// the last shorter than `least`.
struct SplitRule {
  int num_splits;
  int unit;
  int least;
};

// Cuts as evenly as whole tiles of a warp allow.
inline SplitRule EvenSplits(int num_splits) {
  return {.num_splits = num_splits, .unit = kDecodeWarpTile, .least = kDecodeTile};
}

// What decides how rows are split: all of a call, so that their blocks fill the device; or each row
// alone, so that its results do not depend on the others.
enum class Splitting { kByBatch, kByRow };

// Tokens of a split that is worth its merge even where other rows fill the device.
inline constexpr int kRowSpan = 4 * kDecodeTile;

// For attention to all tokens of a row, by `num_blocks` blocks for each split. kByRow: the lengths
// of splits are whole tiles of a block, so that rows whose lengths differ little have the same, and
// few queries of a row can share one.
inline SplitRule ChooseSplits(Splitting splitting, int64_t batch_size, int64_t num_blocks,
                              int num_sms) {
  // Not bounded by the table's capacity, which page_size rounds: it must not change results.
  constexpr int64_t kAnyLength = INT32_MAX;
  if (splitting == Splitting::kByRow) {
    return {.num_splits = ChooseNumSplits(num_blocks, num_sms, kAnyLength),
            .unit = kDecodeTile,
            .least = kRowSpan};
  }
  return EvenSplits(ChooseNumSplits(batch_size * num_blocks, num_sms, kAnyLength));
}

// Blocks for the splits of each of num_rows (batch row, head) pairs. kByRow, where there may be
// many times more than run at once, mostly for tokens that are not there, a block has several
// splits.
inline constexpr int kRowOversubscription = 8;
inline int NumSplitBlocks(Splitting splitting, int num_splits, int64_t num_rows, int num_sms) {
  if (splitting == Splitting::kByBatch) return num_splits;
  int64_t at_once = int64_t{kDecodeBlocksPerSm} * num_sms;
  int64_t most = std::max<int64_t>(kRowOversubscription * at_once / num_rows, 1);
  int64_t of_block = (num_splits + most - 1) / most;
  return static_cast<int>((num_splits + of_block - 1) / of_block);
}

// ChooseNumSplits for rows of very different lengths: shorter spans, more of them than run at once,
// so that the long rows' are dealt out to the processors as the short ones' end. Spans that a row
// does not need cost next to nothing.
inline constexpr int kRaggedOversubscription = 8;  // at most kMaxBlocksOfRow: the scratch is enough
inline constexpr int kRaggedSpan = 4 * kDecodeTile;
inline int ChooseNumRaggedSplits(int64_t num_rows, int num_sms, int64_t max_tokens) {
  int64_t most = kRaggedOversubscription * int64_t{kDecodeBlocksPerSm} * num_sms /
                 std::max<int64_t>(num_rows, 1);
  int64_t wanted = (max_tokens + kRaggedSpan - 1) / kRaggedSpan;
  int64_t num_splits = std::min({wanted, most, int64_t{kMaxSplits}});
  return std::max(ChooseNumSplits(num_rows, num_sms, max_tokens), static_cast<int>(num_splits));
}

// attention_prefill_hopper: a block takes a tile of kPromptRows (query, head) pairs against tiles
// of kPromptTokens tokens, and fills an SM.
inline constexpr int kPromptRows = 128;
inline constexpr int kPromptTokens = 128;
// What it is compiled for.
constexpr bool IsPromptHeadDim(int64_t head_dim) {
  return head_dim == 64 || head_dim == 128;
}
// What starting and ending a block takes, and adding what one split has found, in the time of a
// tile of tokens (1.7 us on an H200; estimated).
inline constexpr int kPromptBlockTiles = 3;
inline constexpr int kPromptMergeTiles = 1;
inline constexpr int kLeastPromptSpan = 4;  // tiles of tokens of a split
inline constexpr int kMaxPromptSplits = 64;
// Waves of blocks whose results are merged: what the scratch has room for.
inline constexpr int kMaxPromptWaves = 6;

// How tiles of queries are dealt to blocks: the first num_whole are one block each, over all
// tokens, and each other is num_splits blocks of `span` tiles of tokens.
struct PromptSplits {
  int num_whole;
  int num_splits;
  int span;
};

// For num_tiles tiles of queries, of which none sees more than num_token_tiles tiles of tokens:
// what ends soonest if all see as many. Blocks run in waves of one for each SM, and a last wave of
// few costs as much as a full one, so whole waves of tiles stay whole and the others are split.
// kByRow nothing is split: how would depend on the chunk that a query is read in.
inline PromptSplits ChoosePromptSplits(Splitting splitting, int64_t num_tiles,
                                       int64_t num_token_tiles, int num_sms) {
  PromptSplits best = {.num_whole = static_cast<int>(num_tiles), .num_splits = 1, .span = 1};
  int64_t num_split = num_tiles % num_sms;
  if (splitting == Splitting::kByRow || num_split == 0) return best;
  int64_t most = std::min({kMaxPromptWaves * int64_t{num_sms} / num_split,
                           num_token_tiles / kLeastPromptSpan, int64_t{kMaxPromptSplits}});
  int64_t least = num_token_tiles + kPromptBlockTiles;  // the time of the last wave, unsplit
  for (int64_t num_splits = 2; num_splits <= most; ++num_splits) {
    int64_t waves = (num_split * num_splits + num_sms - 1) / num_sms;
    int64_t span = (num_token_tiles + num_splits - 1) / num_splits;
    int64_t time = waves * (span + kPromptBlockTiles) + num_splits * kPromptMergeTiles;
    if (time >= least) continue;
    least = time;
    best = {.num_whole = static_cast<int>(num_tiles - num_split),
            .num_splits = static_cast<int>(num_splits),
            .span = static_cast<int>(span)};
  }
  return best;
}

}  // namespace tidal
