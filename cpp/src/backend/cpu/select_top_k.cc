// From scores to the chosen positions: exact, O(tokens), and the same for every number of threads.
//
// Ranking keys (order-preserving uint32) and the largest key of every 64 positions are made in
// parallel. The k-th largest of these block maxima is a lower bound of the k-th largest key, so
// that mostly a few blocks remain; a radix select over them (12, 12 and 8 bits) finds the exact
// threshold.
#include <algorithm>
#include <functional>

#include "backend/cpu/ops.h"
#include "backend/cpu/select_top_k.h"

namespace tidal {
namespace {

// Positions of one task of the first phase.
constexpr int64_t kKeyChunk = 4096;
static_assert(kKeyChunk % kRankBlock == 0);
constexpr int64_t kMaxBins = 4096;

struct Sets {
  int64_t count;  // per row
  int64_t heads;  // query heads pooled in one set
};

Sets SetsOf(const SelectTopKArgs& args) {
  const int64_t num_q_heads = args.scores.dim(1);
  const int64_t count = NumSets(args.granularity, num_q_heads, args.num_kv_heads);
  return {count, num_q_heads / count};
}

// Scratch of one set.
struct SetWork {
  uint32_t* keys;       // [max_len]
  uint32_t* block_max;  // [max_blocks]
  uint32_t* order;      // [max_blocks]
  uint32_t* bins;       // [kMaxBins]
};

int64_t NumBlocks(int64_t count) {
  return (count + kRankBlock - 1) / kRankBlock;
}

int64_t SetWorkWords(int64_t max_len) {
  // Whole blocks, so that the sets of two threads share no cache line.
  return NumBlocks(max_len) * kRankBlock + 2 * NumBlocks(NumBlocks(max_len)) * kRankBlock +
         kMaxBins;
}

SetWork Carve(uint32_t* memory, int64_t max_len) {
  SetWork work;
  work.keys = memory;
  work.block_max = work.keys + NumBlocks(max_len) * kRankBlock;
  work.order = work.block_max + NumBlocks(NumBlocks(max_len)) * kRankBlock;
  work.bins = work.order + NumBlocks(NumBlocks(max_len)) * kRankBlock;
  return work;
}

void MakeKeys(const CpuContext& context, const SelectTopKArgs& args, int64_t row, int64_t set,
              int64_t begin, int64_t end, const SetWork& work) {
  const int64_t num_q_heads = args.scores.dim(1), max_len = args.scores.dim(2);
  const int64_t head = row * num_q_heads + set * SetsOf(args).heads;
  RankKeys rank;
  rank.scores = args.scores.data<float>() + head * max_len + begin;
  rank.scores_stride = max_len;
  // A query head alone is ranked by its raw scores.
  rank.lse = args.granularity == Granularity::kHead ? nullptr : args.lse.data<float>() + head;
  rank.num_heads = SetsOf(args).heads;
  rank.count = end - begin;
  rank.pool_max = args.pooling == Pooling::kMax;
  rank.keys = work.keys + begin;
  rank.block_max = work.block_max + begin / kRankBlock;
  context.kernels->rank_keys(rank);
}

// The positions that compete: those neither sink nor recent.
struct Range {
  int64_t begin, end;
};

// Calls visit(position, key) in ascending order for all of `range` in blocks whose largest key is
// at least `bound`.
template <typename Visit>
void ForKeys(const SetWork& work, Range range, uint32_t bound, const Visit& visit) {
  for (int64_t block = range.begin / kRankBlock; block * kRankBlock < range.end; ++block) {
    if (work.block_max[block] < bound) continue;
    const int64_t end = std::min(range.end, (block + 1) * kRankBlock);
    for (int64_t i = std::max(range.begin, block * kRankBlock); i < end; ++i) {
      visit(i, work.keys[i]);
    }
  }
}

// A key that at least `wanted` keys of the range reach. Blocks that hold sinks or recents are left
// out: their maximum may not compete.
uint32_t LowerBound(const SetWork& work, Range range, int64_t wanted) {
  const int64_t first = (range.begin + kRankBlock - 1) / kRankBlock;
  const int64_t last = range.end / kRankBlock;
  if (last - first < wanted) return 0;
  uint32_t* end = std::copy(work.block_max + first, work.block_max + last, work.order);
  std::nth_element(work.order, work.order + wanted - 1, end, std::greater<uint32_t>());
  return work.order[wanted - 1];
}

struct Threshold {
  uint32_t key;      // keys above are chosen
  int64_t num_ties;  // and the first so many that equal it
};

// The `wanted`-th largest key of the range, digit by digit from the top.
Threshold FindThreshold(const SetWork& work, Range range, uint32_t bound, int64_t wanted) {
  static constexpr int kShifts[] = {20, 8, 0};
  static constexpr int kBits[] = {12, 12, 8};
  uint32_t prefix = 0;
  uint32_t prefix_mask = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = kShifts[pass];
    const uint32_t digit_mask = (1u << kBits[pass]) - 1u;
    std::fill_n(work.bins, digit_mask + 1u, 0u);
    ForKeys(work, range, bound, [&](int64_t, uint32_t key) {
      if ((key & prefix_mask) == prefix) ++work.bins[(key >> shift) & digit_mask];
    });
    uint32_t digit = digit_mask;
    while (work.bins[digit] < wanted) wanted -= work.bins[digit--];
    prefix |= digit << shift;
    prefix_mask |= digit_mask << shift;
  }
  return {prefix, wanted};
}

void ChoosePositions(const SelectTopKArgs& args, int64_t row, int64_t set, const SetWork& work) {
  const int64_t num_tokens = args.seq_lens.data<int32_t>()[row];
  const int64_t budget = args.token_idx.dim(2);
  int32_t* out = args.token_idx.data<int32_t>() + (row * args.token_idx.dim(1) + set) * budget;
  int32_t* const out_end = out + budget;
  auto take = [&](int64_t position) { *out++ = static_cast<int32_t>(position); };
  if (num_tokens <= budget) {
    for (int64_t i = 0; i < num_tokens; ++i) take(i);
    std::fill(out, out_end, -1);
    return;
  }
  const Range range = {args.sink_tokens, num_tokens - args.recent_tokens};
  const int64_t wanted = budget - args.sink_tokens - args.recent_tokens;
  for (int64_t i = 0; i < range.begin; ++i) take(i);
  if (wanted > 0) {
    const uint32_t bound = LowerBound(work, range, wanted);
    Threshold threshold = FindThreshold(work, range, bound, wanted);
    ForKeys(work, range, threshold.key, [&](int64_t position, uint32_t key) {
      if (key > threshold.key) {
        take(position);
      } else if (key == threshold.key && threshold.num_ties > 0) {
        --threshold.num_ties;
        take(position);
      }
    });
  }
  for (int64_t i = range.end; i < num_tokens; ++i) take(i);
}

}  // namespace

int64_t SelectScratchWords(int64_t num_sets, int64_t max_len) {
  return num_sets * SetWorkWords(max_len);
}

void CpuSelectTopK(CpuContext& context, const SelectTopKArgs& args) {
  const int64_t num_rows = args.scores.dim(0);
  const int64_t max_len = args.scores.dim(2);
  const int64_t budget = args.token_idx.dim(2);
  const int64_t sets = SetsOf(args).count;
  const int32_t* seq_lens = args.seq_lens.data<int32_t>();
  uint32_t* memory =
      context.scratch.Take<uint32_t>(Scratch::kKeys, SelectScratchWords(num_rows * sets, max_len));
  auto work_of = [&](int64_t row, int64_t set) {
    return Carve(memory + (row * sets + set) * SetWorkWords(max_len), max_len);
  };
  int64_t longest = 0;
  for (int64_t b = 0; b < num_rows; ++b) {
    longest = std::max<int64_t>(longest, seq_lens[b]);
    args.num_selected.data<int32_t>()[b] =
        static_cast<int32_t>(std::min<int64_t>(budget, seq_lens[b]));
  }
  const int threads = context.ThreadsFor(num_rows * args.scores.dim(1) * longest);
  if (longest > budget) {
    const int64_t chunks = (longest + kKeyChunk - 1) / kKeyChunk;
    context.ParallelFor(threads, num_rows * sets * chunks, [&](int64_t task) {
      const int64_t chunk = task % chunks, set = task / chunks % sets, row = task / chunks / sets;
      const int64_t begin = chunk * kKeyChunk;
      const int64_t end = std::min<int64_t>(seq_lens[row], begin + kKeyChunk);
      if (seq_lens[row] <= budget || begin >= end) return;
      MakeKeys(context, args, row, set, begin, end, work_of(row, set));
    });
  }
  context.ParallelFor(threads, num_rows * sets, [&](int64_t task) {
    ChoosePositions(args, task / sets, task % sets, work_of(task / sets, task % sets));
  });
}

}  // namespace tidal
