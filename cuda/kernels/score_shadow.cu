// ScoreKeys from the shadow (core/shadow_code.h): one query a row, all query heads of a KV head
// together, whose codes of 8 bits are multiplied with keys of 4 bits by the tensor cores. Products
// are integers, so the scores are the CPU's bits.
//
// The tensor cores see keys as the 16 rows of an mma.m16n8k32 and heads as its 8 columns. Which
// dims and which tokens an mma's columns and rows are is free, so all is laid out for the lanes:
// lane (g, t) = (lane / 4, lane % 4) has the t-th part of the codes of tokens 4 g to 4 g + 3 of 32,
// which lie in one page (of heads of 256 the t-th part of either half), a word of it for each mma:
// the low halves of its bytes are four dims of the first 16 columns of A, the high halves four of
// the others. It receives the scores of these four tokens for heads 2 t and 2 t + 1, which is a
// store of 8 bytes each.
#include "kernels/score_shadow.h"

#include "common/attention_dispatch.h"
#include "common/decode_split.cuh"
#include "common/dependent_launch.cuh"
#include "common/merge_splits.cuh"
#include "common/mma.cuh"
#include "common/paged_kv.cuh"
#include "common/score_rule.cuh"
#include "common/shadow_code.cuh"
#include "common/split_tokens.cuh"

namespace tidal {
namespace {

constexpr int kShadowWarps = 8;
constexpr int kShadowThreads = kShadowWarps * kWarpSize;
constexpr int kQuad = 4;                            // adjacent tokens of a lane
constexpr int kShadowTile = kWarpSize / 4 * kQuad;  // tokens that a warp takes at a time
constexpr int kShadowBlockTile = kShadowWarps * kShadowTile;
static_assert(kDecodeWarpTile % kQuad == 0, "splits begin where a quad does");

// Where scores go.
struct HalfRows {
  __half* first;  // [B, Hq, row_length]
  int64_t row_length;
  bool are_aligned;  // four scores of a quad in one store
};

template <typename T, typename Stored>
struct ScoreShadowParams {
  const T* q;              // [B, Hq, D]
  PagedKvView<Stored> kv;  // K of the newest tokens is read if their shadows are to be written
  float k_scale;           // of an fp8 cache
  uint8_t* codes;          // [num_pages * Hkv * page_size, D / 2]
  __half* scales;          // [num_pages * Hkv * page_size]
  const float* balance;    // [Hkv, D]
  float sm_scale;
  SoftCap cap;
  HeadParts parts;
  NewestShadow newest;
  SplitRule splits;
  CacheReads reads;
  PartialResults partials;
  HalfRows scores;
  LseOutput output;
};

template <int kHeadDim>
struct ScoreShadowShared {
  SplitPages pages;
  ShadowQueryCodes<kHeadDim> queries[kBlockHeads];
  float2 states[kShadowWarps][kBlockHeads];  // of each warp: maximum and sum
};

// Loads what is read once a step: from L2, which nothing stale is in.
template <int kWords>
__device__ __forceinline__ Vec<uint32_t, kWords> LoadCodes(const uint8_t* source, uint64_t policy) {
  Vec<uint32_t, kWords> words;
  if constexpr (kWords == 4) {
    asm volatile("ld.global.cg.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;\n"
                 : "=r"(words.elements[0]), "=r"(words.elements[1]), "=r"(words.elements[2]),
                   "=r"(words.elements[3])
                 : "l"(source), "l"(policy));
  } else if constexpr (kWords == 1) {
    asm volatile("ld.global.cg.L2::cache_hint.u32 %0, [%1], %2;\n"
                 : "=r"(words.elements[0])
                 : "l"(source), "l"(policy));
  } else {
    static_assert(kWords == 2);
    asm volatile("ld.global.cg.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;\n"
                 : "=r"(words.elements[0]), "=r"(words.elements[1])
                 : "l"(source), "l"(policy));
  }
  return words;
}

// One warp's share of a split: every kShadowWarps-th tile.
template <typename T, typename Stored, int kHeadDim>
class ShadowWarp {
 public:
  __device__ __forceinline__ ShadowWarp(const ScoreShadowParams<T, Stored>& params,
                                        ScoreShadowShared<kHeadDim>& shared, int batch,
                                        const BlockHeads& heads, int64_t first_row)
      : params_(params),
        shared_(shared),
        batch_(batch),
        kv_head_(heads.kv_head),
        num_heads_(heads.count),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize),
        scores_(params.scores.first + first_row * params.scores.row_length) {}

  // Scores the keys [span.begin, span.end). prepare(): what comes between the first loads and the
  // first products; it fills shared.queries.
  template <typename Prepare>
  __device__ __forceinline__ void Score(SplitSpan span, const Prepare& prepare) {
    SplitTokens<Stored> tokens(params_.kv, batch_, kv_head_, span, shared_.pages);
    end_ = span.end;
    first_ = span.begin + warp_ * kShadowTile + lane_ / 4 * kQuad;
    int begin = span.begin + warp_ * kShadowTile;
    int num_tiles = begin < end_ ? (end_ - begin - 1) / kShadowBlockTile + 1 : 0;
    Tile tiles[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (i < num_tiles) Load(tiles[i], tokens.Row(FirstToken(i)));
    }
    prepare();
    LoadQueries();
    for (int tile = 0; tile < num_tiles; tile += kDepth) {
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        if (tile + i >= num_tiles) break;
        Consume(tiles[i], first_ + (tile + i) * kShadowBlockTile,
                begin + (tile + i) * kShadowBlockTile + kShadowTile <= end_);
        int next = tile + i + kDepth;
        if (next < num_tiles) Load(tiles[i], tokens.Row(FirstToken(next)));
      }
    }
  }

  // Writes the shadow of the token at `position`, scores it, and counts it in. By one whole warp.
  __device__ __forceinline__ void AppendAndScore(int position) {
    int row = params_.kv.Row(batch_, kv_head_, position);
    ShadowKey<kHeadDim> key(params_.kv.k + int64_t{row} * kHeadDim, params_.k_scale,
                            params_.balance + kv_head_ * kHeadDim);
    key.Store(params_.codes, params_.scales, row);
    int dim = ShadowDims<kHeadDim>::FirstDim();
    for (int head = 0; head < num_heads_; ++head) {
      const ShadowQueryCodes<kHeadDim>& query = shared_.queries[head];
      int product = 0;
#pragma unroll
      for (int i = 0; i < ShadowDims<kHeadDim>::kDims && ShadowDims<kHeadDim>::IsInRow(); ++i) {
        int code = static_cast<int>(key.codes >> (4 * i) & 0xfu);
        product += query.codes[i % 2 * (kHeadDim / 2) + (dim + i) / 2] * code;
      }
      product = __reduce_add_sync(kFullWarp, product) - kShadowCodeBias * query.sum;
      float score[1] = {ScoreOf(product, __half2float(key.scale), query.factor)};
      params_.cap.CapAll(score);
      if (lane_ == 0) {
        scores_[head * params_.scores.row_length + position] = __float2half_rn(score[0]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (lane_ * 2 + i == head) CountIn(i, score);
      }
    }
  }

  // Makes the warps' results known to each other. By all threads of the block.
  __device__ __forceinline__ void FinishBlock() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float max = max_[i];
#pragma unroll
      for (int mask = 4; mask < kWarpSize; mask *= 2) {
        max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, mask));
      }
      float sum = __fmul_rn(sum_[i], SoftmaxWeight(max_[i], FiniteMax(max)));
#pragma unroll
      for (int mask = 4; mask < kWarpSize; mask *= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, mask));
      }
      if (lane_ < 4) shared_.states[warp_][lane_ * 2 + i] = make_float2(max, sum);
    }
    __syncthreads();
  }

  // After FinishBlock, by a whole warp.
  __device__ __forceinline__ HeadState BlockState(int head) const {
    return MergeStates<kShadowWarps>(kShadowWarps,
                                     [&](int warp) { return shared_.states[warp][head]; });
  }

 private:
  static constexpr int kWords = (kHeadDim + 31) / 32;  // of a key in a lane: an mma each
  static constexpr int kLoadWords = kWords == 3 ? 1 : kWords < 4 ? kWords : 4;
  static constexpr int kLoads = kWords / kLoadWords;
  static constexpr int kLoadBytes = 4 * kLoadWords;
  static constexpr int kDepth = 3 * 128 / kPaddedDim<kHeadDim>;  // tiles whose loads are under way

  // A lane's share: of each token of its quad a part of the codes, and all scales.
  struct Tile {
    Vec<uint32_t, kLoadWords> codes[kQuad][kLoads];
    uint2 scales;  // four float16
  };

  // Byte of a row of codes from which on this lane has those of its load-th load: loads of the
  // lanes of a row lie side by side. Of heads of 80 half of the last one is none, and reads others.
  __device__ __forceinline__ int FirstByte(int load) const {
    return HasCodes(load) ? (load * 4 + lane_ % 4) * kLoadBytes : 0;
  }
  __device__ __forceinline__ bool HasCodes(int load) const {
    return kHeadDim % 32 == 0 || (load * 4 + lane_ % 4) * kLoadBytes < kHeadDim / 2;
  }

  // The first token of this lane's quad; past the end that of the last quad, of which nothing is
  // kept.
  __device__ __forceinline__ int FirstToken(int tile) const {
    return min(first_ + tile * kShadowBlockTile, (end_ - 1) / kQuad * kQuad);
  }

  // `row`: of the first token.
  __device__ __forceinline__ void Load(Tile& tile, int row) const {
    const uint8_t* source = params_.codes + int64_t{row} * (kHeadDim / 2);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        tile.codes[j][i] =
            LoadCodes<kLoadWords>(source + FirstByte(i) + j * (kHeadDim / 2), policy_);
      }
    }
    tile.scales = __ldcg(reinterpret_cast<const uint2*>(params_.scales + row));
  }

  __device__ __forceinline__ void LoadQueries() {
    const int8_t* codes = shared_.queries[lane_ / 4].codes;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      int byte = FirstByte(w / kLoadWords) + w % kLoadWords * 4;
      query_[w][0] = *reinterpret_cast<const uint32_t*>(codes + byte);
      query_[w][1] = *reinterpret_cast<const uint32_t*>(codes + kHeadDim / 2 + byte);
      if (!HasCodes(w / kLoadWords)) query_[w][0] = query_[w][1] = 0;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const ShadowQueryCodes<kHeadDim>& query = shared_.queries[lane_ % 4 * 2 + i];
      bias_[i] = -kShadowCodeBias * query.sum;
      factor_[i] = query.factor;
    }
  }

  // In the order of the CPU's roundings; before a soft cap.
  __device__ __forceinline__ static float ScoreOf(int product, float scale, float factor) {
    return __fmul_rn(static_cast<float>(product), __fmul_rn(scale, factor));
  }

  // `token`: this lane's first; is_whole: none of the warp's lies past the end.
  __device__ __forceinline__ void Consume(const Tile& tile, int token, bool is_whole) {
    float scores[2][kQuad];  // by head and token
    float2 scales[2] = {__half22float2(*reinterpret_cast<const __half2*>(&tile.scales.x)),
                        __half22float2(*reinterpret_cast<const __half2*>(&tile.scales.y))};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      // Tokens 2 pair and 2 pair + 1 of the quad are rows g and g + 8.
      int products[4] = {bias_[0], bias_[1], bias_[0], bias_[1]};
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        int load = w / kLoadWords, word = w % kLoadWords;
        uint32_t upper = tile.codes[2 * pair][load].elements[word];
        uint32_t lower = tile.codes[2 * pair + 1][load].elements[word];
        const uint32_t a[4] = {upper & 0x0f0f0f0fu, lower & 0x0f0f0f0fu, upper >> 4 & 0x0f0f0f0fu,
                               lower >> 4 & 0x0f0f0f0fu};
        MultiplyAddCodes(products, a, query_[w]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scores[i][2 * pair] = ScoreOf(products[i], scales[pair].x, factor_[i]);
        scores[i][2 * pair + 1] = ScoreOf(products[2 + i], scales[pair].y, factor_[i]);
      }
    }
    params_.cap.CapAll(scores);
    if (!is_whole) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (token + j >= end_) scores[0][j] = scores[1][j] = NegativeInfinity();
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Store(lane_ % 4 * 2 + i, scores[i], token, is_whole);
      CountIn(i, scores[i]);
    }
  }

  __device__ __forceinline__ void Store(int head, const float (&scores)[kQuad], int token,
                                        bool is_whole) const {
    if (head >= num_heads_) return;
    __half* target = scores_ + head * params_.scores.row_length + token;
    if (is_whole && params_.scores.are_aligned) {
      uint2 four = {PackPair<__half>(scores[0], scores[1]), PackPair<__half>(scores[2], scores[3])};
      __stcg(reinterpret_cast<uint2*>(target), four);
      return;
    }
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (token + j < end_) target[j] = __float2half_rn(scores[j]);
    }
  }

  // Takes scores into the maximum and the sum of this lane's i-th head.
  template <int kCount>
  __device__ __forceinline__ void CountIn(int i, const float (&scores)[kCount]) {
    float max = max_[i];
#pragma unroll
    for (float score : scores) max = fmaxf(max, score);
    float finite_max = FiniteMax(max), shift = __fmul_rn(finite_max, kLog2E);
    float sum = __fmul_rn(sum_[i], SoftmaxWeight(max_[i], finite_max));
#pragma unroll
    for (float score : scores) sum += FastExp2(__fmaf_rn(score, kLog2E, -shift));
    max_[i] = max;
    sum_[i] = sum;
  }

  const ScoreShadowParams<T, Stored>& params_;
  ScoreShadowShared<kHeadDim>& shared_;
  int batch_;
  int kv_head_;
  int num_heads_;
  int lane_;
  int warp_;
  int first_ = 0;   // of this lane's tokens
  int end_ = 0;     // of the block's
  __half* scores_;  // of the block's first head
  uint64_t policy_ = EvictFirstPolicy();
  uint32_t query_[kWords][2];
  int bias_[2];      // of the products of this lane's heads, negated
  float factor_[2];  // of this lane's heads
  float max_[2] = {NegativeInfinity(), NegativeInfinity()};
  float sum_[2] = {};
};

// grid (NumSplitBlocks, HeadParts of all KV heads, batch_size), 8 warps: a block takes splits of
// one row's keys for the query heads of one KV head, or a part of them. The newest shadow is then
// written by several, all with the same bytes.
template <typename T, typename Stored, int kHeadDim>
__global__ void __launch_bounds__(kShadowThreads, kDecodeBlocksPerSm)
    ScoreShadowKernel(const ScoreShadowParams<T, Stored> params) {
  __shared__ ScoreShadowShared<kHeadDim> shared;
  if (params.reads == CacheReads::kInOrder) WaitForPreviousKernel();
  int batch = blockIdx.z, num_q_heads = params.kv.num_kv_heads * params.parts.group_size;
  BlockHeads heads(params.parts, blockIdx.y);
  int seq_len = __ldcg(params.kv.seq_lens + batch);
  RowSplits splits(seq_len, params.splits);
  int64_t first_row = int64_t{batch} * num_q_heads + heads.first;
  BlockWork work{.first_row = first_row,
                 .first_partial = first_row,
                 .num_heads = heads.count,
                 .split = static_cast<int>(blockIdx.x),
                 .num_splits = params.splits.num_splits,
                 .num_used = splits.num_used,
                 .counter_index = static_cast<int>(batch * gridDim.y + blockIdx.y)};
  if (work.split >= work.num_used) {
    EndUnusedSplit<HeadState>(work, params.output);
    return;
  }

  for (; work.split < work.num_used; work.split += gridDim.x) {
    ShadowWarp<T, Stored, kHeadDim> warp(params, shared, batch, heads, first_row);
    SplitSpan span = splits.Span(work.split);
    bool has_newest = params.newest == NewestShadow::kWrite && span.end == seq_len;
    if (has_newest) --span.end;
    warp.Score(span, [&] {
      WaitForPreviousKernel();
      LetNextKernelStart();
      static_assert(kShadowWarps == kBlockHeads, "a warp for each head");
      int head = static_cast<int>(threadIdx.x) / kWarpSize;
      if (head < heads.count) {
        shared.queries[head].Encode(params.q + (first_row + head) * kHeadDim,
                                    params.balance + heads.kv_head * kHeadDim, params.sm_scale);
      } else {
        shared.queries[head].Clear();
      }
      __syncthreads();
    });
    if (has_newest && threadIdx.x / kWarpSize == kShadowWarps - 1) warp.AppendAndScore(seq_len - 1);
    warp.FinishBlock();
    MergeStatesInLastBlock(work, params.partials, params.output,
                           [&](int head) { return warp.BlockState(head); });
  }
}

template <typename T, typename Stored, int kHeadDim>
void RunScoreShadow(const ScoreKeysArgs& args, NewestShadow newest, const AttentionScratch& scratch,
                    CacheReads reads, cudaStream_t stream) {
  constexpr const char* kOp = "score_shadow";
  int64_t batch_size = args.q.dim(0), num_q_heads = args.q.dim(1);
  PagedKvView<Stored> kv = MakePagedKvView<Stored>(kOp, args.kv);
  HeadParts parts = PartsOfGroup(num_q_heads, kv.num_kv_heads);
  int head_blocks = kv.num_kv_heads * parts.count;
  SplitRule splits = ChooseSplits(scratch.splitting, batch_size, head_blocks, scratch.num_sms);
  ScoreShadowParams<T, Stored> params{
      .q = static_cast<const T*>(args.q.ptr),
      .kv = kv,
      .k_scale = args.kv.k_scale,
      .codes = args.shadow.codes.data<uint8_t>(),
      .scales = static_cast<__half*>(args.shadow.scales.ptr),
      .balance = args.shadow.balance.data<float>(),
      .sm_scale = args.rule.sm_scale,
      .cap = MakeSoftCap(args.rule, 1.0f),
      .parts = parts,
      .newest = newest,
      .splits = splits,
      .reads = reads,
      .partials = TakePartials(kOp, scratch, batch_size * num_q_heads, splits.num_splits, kHeadDim),
      .scores = {.first = static_cast<__half*>(args.scores.ptr),
                 .row_length = args.scores.dim(2),
                 .are_aligned = IsVectorizable(args.scores, args.scores.dim(2), kQuad)},
      .output = {.lse = args.lse.data<float>()}};
  int num_blocks = NumSplitBlocks(scratch.splitting, splits.num_splits, batch_size * head_blocks,
                                  scratch.num_sms);
  dim3 grid(num_blocks, head_blocks, static_cast<unsigned>(batch_size));
  LaunchOverlapped(kOp, ScoreShadowKernel<T, Stored, kHeadDim>,
                   {.grid = grid, .block = kShadowThreads}, stream, params);
}

}  // namespace

void LaunchScoreShadow(const ScoreKeysArgs& args, NewestShadow newest,
                       const AttentionScratch& scratch, CacheReads reads, cudaStream_t stream) {
  if (args.q.dim(0) == 0) return;
  DispatchCachedAttention(
      "score_shadow", args.q, args.kv, [&](auto type, auto stored, auto head_dim) {
        using T = typename decltype(type)::Type;
        using Stored = typename decltype(stored)::Type;
        RunScoreShadow<T, Stored, head_dim()>(args, newest, scratch, reads, stream);
      });
}

}  // namespace tidal
