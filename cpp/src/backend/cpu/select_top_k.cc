// From scores to the chosen positions: exact, O(tokens), and the same for every number of threads.
//
// Ranking keys (order-preserving uint32) and the largest key of every 64 positions are made in
// parallel. The k-th largest of these block maxima is a lower bound of the k-th largest key, so
// that mostly a few blocks remain; a radix select over them (12, 12 and 8 bits) finds the exact
// threshold. With top_p_mass a radix search by weight first says how many are wanted.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "backend/cpu/ops.h"
#include "backend/cpu/select_top_k.h"
#include "core/checked.h"
#include "core/mass.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// Positions of one task of the first phase.
constexpr int64_t kKeyChunk = 4096;
static_assert(kKeyChunk % kRankBlock == 0);
constexpr int64_t kMaxBins = 4096;

// The digits of a key, from the top.
struct Digit {
  int shift;
  uint32_t mask;
};
constexpr Digit kDigits[] = {{20, 0xfffu}, {8, 0xfffu}, {0, 0xffu}};

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
  uint64_t* mass_bins;  // [kMaxBins]
};

int64_t NumBlocks(int64_t count) {
  return (count + kRankBlock - 1) / kRankBlock;
}

int64_t SetWorkWords(int64_t max_len) {
  // Whole blocks, so that the sets of two threads share no cache line.
  return NumBlocks(max_len) * kRankBlock + 2 * NumBlocks(NumBlocks(max_len)) * kRankBlock +
         3 * kMaxBins;
}

SetWork Carve(uint32_t* memory, int64_t max_len) {
  SetWork work;
  work.keys = memory;
  work.block_max = work.keys + NumBlocks(max_len) * kRankBlock;
  work.order = work.block_max + NumBlocks(NumBlocks(max_len)) * kRankBlock;
  work.bins = work.order + NumBlocks(NumBlocks(max_len)) * kRankBlock;
  work.mass_bins = reinterpret_cast<uint64_t*>(work.bins + kMaxBins);
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
  uint32_t prefix = 0;
  uint32_t prefix_mask = 0;
  for (const auto [shift, mask] : kDigits) {
    std::fill_n(work.bins, mask + 1u, 0u);
    ForKeys(work, range, bound, [&, shift = shift, mask = mask](int64_t, uint32_t key) {
      if ((key & prefix_mask) == prefix) ++work.bins[(key >> shift) & mask];
    });
    uint32_t digit = mask;
    while (work.bins[digit] < wanted) wanted -= work.bins[digit--];
    prefix |= digit << shift;
    prefix_mask |= mask << shift;
  }
  return {prefix, wanted};
}

// How much of the set's softmax a position holds, by its key.
class KeyWeight {
 public:
  KeyWeight(const SelectTopKArgs& args, int64_t row, int64_t set)
      : is_score_(args.granularity == Granularity::kHead),
        lse_(is_score_ ? args.lse.data<float>()[row * args.lse.dim(1) + set] : 0.0f) {}

  uint64_t Mass(uint32_t key) const {
    if (key == 0) return 0;  // NaN
    const uint32_t bits = (key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return ToMass(is_score_ ? std::exp(value - lse_) : value);
  }

 private:
  bool is_score_;
  float lse_;
};

// The smallest number of the range's best keys whose weights reach `target`, if it is below `most`,
// else `most`; as many keys are at least `bound`.
int64_t NumForMass(const SetWork& work, Range range, uint32_t bound, const KeyWeight& weight,
                   uint64_t target, int64_t most) {
  if (target == 0) return 0;
  uint32_t prefix = 0, prefix_mask = 0;
  int64_t num_above = 0;
  uint64_t mass_above = 0;
  for (const auto [shift, mask] : kDigits) {
    std::fill_n(work.bins, mask + 1u, 0u);
    std::fill_n(work.mass_bins, mask + 1u, uint64_t{0});
    ForKeys(work, range, bound, [&, shift = shift, mask = mask](int64_t, uint32_t key) {
      if ((key & prefix_mask) != prefix) return;
      ++work.bins[(key >> shift) & mask];
      work.mass_bins[(key >> shift) & mask] += weight.Mass(key);
    });
    int64_t digit = mask;
    while (digit >= 0 && mass_above + work.mass_bins[digit] < target) {
      num_above += work.bins[digit];
      mass_above += work.mass_bins[digit--];
    }
    if (digit < 0 || num_above >= most) return most;
    prefix |= static_cast<uint32_t>(digit) << shift;
    prefix_mask |= mask << shift;
  }
  const uint64_t each = weight.Mass(prefix);  // not 0: the target lies in this bin
  const auto num_ties = static_cast<int64_t>((target - mass_above + each - 1) / each);
  return std::min(num_above + num_ties, most);
}

// How many of the range's best positions a set takes.
int64_t NumWanted(const SelectTopKArgs& args, int64_t row, int64_t set, const SetWork& work,
                  Range range) {
  const int64_t num_tokens = args.seq_lens.data<int32_t>()[row];
  const int64_t num_forced = args.sink_tokens + args.recent_tokens;
  const int64_t most = std::min(args.token_idx.dim(2), num_tokens) - num_forced;
  if (args.top_p_mass >= 1.0f) return most;
  const KeyWeight weight(args, row, set);
  uint64_t forced_mass = 0;
  for (int64_t i = 0; i < range.begin; ++i) forced_mass += weight.Mass(work.keys[i]);
  for (int64_t i = range.end; i < num_tokens; ++i) forced_mass += weight.Mass(work.keys[i]);
  uint64_t target = TargetMass(args.top_p_mass, SetsOf(args).heads);
  target -= std::min(target, forced_mass);
  const int64_t least = std::min(args.min_tokens, num_tokens) - num_forced;
  const uint32_t bound = most > 0 ? LowerBound(work, range, most) : 0;
  return std::max(least, NumForMass(work, range, bound, weight, target, most));
}

// Rows of at most as many tokens are taken whole, whatever their scores.
int64_t NumAlwaysTaken(const SelectTopKArgs& args) {
  return args.top_p_mass < 1.0f ? args.min_tokens : args.token_idx.dim(2);
}

// Returns how many.
int64_t ChoosePositions(const SelectTopKArgs& args, int64_t row, int64_t set, const SetWork& work) {
  const int64_t num_tokens = args.seq_lens.data<int32_t>()[row];
  const int64_t budget = args.token_idx.dim(2);
  int32_t* const first =
      args.token_idx.data<int32_t>() + (row * args.token_idx.dim(1) + set) * budget;
  int32_t* out = first;
  auto take = [&](int64_t position) { *out++ = static_cast<int32_t>(position); };
  if (num_tokens <= NumAlwaysTaken(args)) {
    for (int64_t i = 0; i < num_tokens; ++i) take(i);
    std::fill(out, first + budget, -1);
    return num_tokens;
  }
  const Range range = {args.sink_tokens, num_tokens - args.recent_tokens};
  const int64_t wanted = NumWanted(args, row, set, work, range);
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
  std::fill(out, first + budget, -1);
  return out - first;
}

}  // namespace

int64_t SelectScratchWords(int64_t num_sets, int64_t max_len) {
  return Product({num_sets, SetWorkWords(max_len)});
}

void CpuSelectTopK(CpuContext& context, const SelectTopKArgs& args) {
  TIDAL_CHECK(args.scores.dtype == DType::kFloat32, UnsupportedError, "SelectTopK: scores: got ",
              DTypeName(args.scores.dtype), " on the CPU, expected float32");
  const int64_t num_rows = args.scores.dim(0);
  const int64_t max_len = args.scores.dim(2);
  const int64_t always_taken = NumAlwaysTaken(args);
  const int64_t sets = SetsOf(args).count;
  const int32_t* seq_lens = args.seq_lens.data<int32_t>();
  uint32_t* memory =
      context.scratch.Take<uint32_t>(Scratch::kKeys, SelectScratchWords(num_rows * sets, max_len));
  auto work_of = [&](int64_t row, int64_t set) {
    return Carve(memory + (row * sets + set) * SetWorkWords(max_len), max_len);
  };
  int64_t longest = 0;
  for (int64_t b = 0; b < num_rows; ++b) longest = std::max<int64_t>(longest, seq_lens[b]);
  const int threads = context.ThreadsFor(num_rows * args.scores.dim(1) * longest);
  if (longest > always_taken) {
    const int64_t chunks = (longest + kKeyChunk - 1) / kKeyChunk;
    context.ParallelFor(threads, num_rows * sets * chunks, [&](int64_t task) {
      const int64_t chunk = task % chunks, set = task / chunks % sets, row = task / chunks / sets;
      const int64_t begin = chunk * kKeyChunk;
      const int64_t end = std::min<int64_t>(seq_lens[row], begin + kKeyChunk);
      if (seq_lens[row] <= always_taken || begin >= end) return;
      MakeKeys(context, args, row, set, begin, end, work_of(row, set));
    });
  }
  context.ParallelFor(threads, num_rows * sets, [&](int64_t task) {
    const int64_t row = task / sets, set = task % sets;
    args.num_selected.data<int32_t>()[task] =
        static_cast<int32_t>(ChoosePositions(args, row, set, work_of(row, set)));
  });
}

}  // namespace tidal
