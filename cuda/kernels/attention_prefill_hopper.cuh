// Causal attention of prompt chunks over the paged cache on compute capability 9.0: after
// FlashAttention-3 (arXiv 2407.08608). Same meaning and numerics as attention_prefill.cuh, which
// other devices run.
//
// A block takes a tile of 128 rows: neighbouring queries, each with all heads of one KV head. One
// warp starts the copies of K and V, 128 tokens at a time, page by page, into stages in shared
// memory. Two warpgroups compute, 64 rows each. What keeps the tensor cores busy while exponentials
// are taken:
// - a group has the products of the next scores under way while it makes weights of these, and
// - the groups issue products in turns, so that one's products run beside the other's softmax.
//
// A block's shared memory fills its SM. Tiles that are too few to fill the SMs, or their last
// wave, are split: each of several blocks takes a span of the tokens, and the last of them to end
// merges what they found (ChoosePromptSplits).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/launch_config.h"
#include "common/merge_splits.cuh"
#include "common/mma.cuh"
#include "common/paged_kv.cuh"
#include "common/reduce.cuh"
#include "common/score_rule.cuh"
#include "common/shared_barrier.cuh"
#include "common/softmax_state.cuh"
#include "common/tensor_copy.cuh"
#include "common/warpgroup_mma.cuh"
#include "kernels/attention_run.h"
#include "kernels/prefill_hopper_task.cuh"

namespace tidal {

inline constexpr int kPrefillGroups = 2;
static_assert(kPrefillRows == kPrefillGroups * kWarpgroupRows);
inline constexpr int kPrefillStages = 3;
inline constexpr int kGroupsThreads = kPrefillGroups * kWarpgroupThreads;
inline constexpr int kHopperThreads = kWarpgroupThreads + kGroupsThreads;
// Registers a thread. 168 is what a block of 384 threads is launched with at most; what the copying
// warps leave, the others get.
inline constexpr int kCopyRegisters = 24;
inline constexpr int kComputeRegisters = 240;

// Barriers by number (SyncThreads); + group where it says so.
inline constexpr int kTurnBarrier = 1;                               // + group
inline constexpr int kGroupBarrier = kTurnBarrier + kPrefillGroups;  // + group
inline constexpr int kGroupsBarrier = kGroupBarrier + kPrefillGroups;

struct PrefillMaps {
  CUtensorMap q;  // [T, Hq, D]: boxes of a tile's queries and heads
  CUtensorMap k;  // [num_pages, Hkv, page_size, D]: boxes of one page, or of 128 of its tokens
  CUtensorMap v;  // likewise
};

// Float4s that a split of a tile leaves.
template <int kHeadDim>
inline constexpr int kPrefillPart = (kHeadDim / 8 + 1) * kGroupsThreads;

// Panels of 64 dims, one after the other: [panel][row][64].
template <typename T, int kHeadDim>
struct PrefillShared {
  static constexpr int kPanels = kHeadDim / kPanelElements;
  static constexpr int kQueryPanel = kPrefillRows * kPanelElements;
  static constexpr int kTokenPanel = kPrefillTokens * kPanelElements;

  alignas(kPanelAlignment) T query[kPanels * kQueryPanel];  // later the output
  alignas(kPanelAlignment) T key[kPrefillStages][kPanels * kTokenPanel];
  alignas(kPanelAlignment) T value[kPrefillStages][kPanels * kTokenPanel];
  // Full: the copies have landed. Empty: every computing warp is done with the stage.
  SharedBarrier query_full;
  SharedBarrier key_full[kPrefillStages], key_empty[kPrefillStages];
  SharedBarrier value_full[kPrefillStages], value_empty[kPrefillStages];
  int is_last_split;

  // By one thread.
  __device__ __forceinline__ void InitBarriers() {
    constexpr int kComputeWarps = kGroupsThreads / kWarpSize;
    InitBarrier(&query_full, 1);
#pragma unroll
    for (int stage = 0; stage < kPrefillStages; ++stage) {
      InitBarrier(&key_full[stage], 1);
      InitBarrier(&value_full[stage], 1);
      InitBarrier(&key_empty[stage], kComputeWarps);
      InitBarrier(&value_empty[stage], kComputeWarps);
    }
    PublishBarriers();
  }
};

// Where a block's index-th tile goes, and the parities of its barriers: stages are used in turn,
// and the first use waits for no one (a barrier's phase before the first counts as ended).
__device__ __forceinline__ int StageOf(int index) {
  return index % kPrefillStages;
}
__device__ __forceinline__ uint32_t FullParity(int index) {
  return index / kPrefillStages & 1;
}
__device__ __forceinline__ uint32_t EmptyParity(int index) {
  return FullParity(index) ^ 1;
}

// The warp that starts all copies of a block.
template <typename T, int kHeadDim>
class PrefillCopies {
 public:
  using Shared = PrefillShared<T, kHeadDim>;

  __device__ __forceinline__ PrefillCopies(Shared& shared, const PrefillMaps& maps,
                                           const PrefillHopperParams<T>& params,
                                           const PrefillHopperTask& task)
      : shared_(shared), maps_(maps), params_(params), task_(task), lane_(threadIdx.x) {
    constexpr int kTileShift = 7;
    static_assert(1 << kTileShift == kPrefillTokens);
    piece_shift_ = min(params.page_shift, kTileShift);
  }

  __device__ __forceinline__ void Run() {
    CopyQueries();
    int next_page = PageOfLane(task_.first_tile);
    for (int tile = task_.first_tile; tile < task_.end_tile; ++tile) {
      int index = tile - task_.first_tile, page = next_page, stage = StageOf(index);
      next_page = PageOfLane(tile + 1);  // its latency passes while the stages are in use
      WaitBarrier(&shared_.key_empty[stage], EmptyParity(index));
      CopyTile(shared_.key[stage], &maps_.k, &shared_.key_full[stage], tile, page);
      WaitBarrier(&shared_.value_empty[stage], EmptyParity(index));
      CopyTile(shared_.value[stage], &maps_.v, &shared_.value_full[stage], tile, page);
    }
  }

 private:
  // Rows past the last query are other queries, zeros past the last of all, or what a group that
  // does not divide the rows leaves as it was: they are computed and not stored.
  __device__ __forceinline__ void CopyQueries() {
    if (lane_ != 0) return;
    int num_rows = params_.tile_queries * params_.group_size;
    ArriveExpecting(&shared_.query_full, Shared::kPanels * num_rows * kPanelRowBytes);
#pragma unroll
    for (int panel = 0; panel < Shared::kPanels; ++panel) {
      CopyBox(shared_.query + panel * Shared::kQueryPanel, &maps_.q, &shared_.query_full,
              panel * kPanelElements, task_.kv_head * params_.group_size, task_.first_query);
    }
  }

  // A tile's pieces are what boxes bring: pages, or halves of pages of 256. Lane l looks up the
  // page of piece l. Past kv_end the page table may hold anything: there the page after the last,
  // which is all zeros.
  __device__ __forceinline__ int PageOfLane(int tile) const {
    int token = tile * kPrefillTokens + (lane_ << piece_shift_);
    if (token >= task_.kv_end || lane_ >= kPrefillTokens >> piece_shift_) return params_.num_pages;
    return __ldg(params_.page_table + int64_t{task_.batch} * params_.max_pages +
                 (token >> params_.page_shift));
  }

  __device__ __forceinline__ void CopyTile(T* target, const CUtensorMap* map, SharedBarrier* full,
                                           int tile, int page_of_lane) {
    if (lane_ == 0) ArriveExpecting(full, sizeof(shared_.key[0]));
    int slot_mask = (1 << params_.page_shift) - 1;
    for (int token = 0; token < kPrefillTokens; token += 1 << piece_shift_) {
      int page = __shfl_sync(kFullWarp, page_of_lane, token >> piece_shift_);
      if (lane_ != 0) continue;
      int slot = (tile * kPrefillTokens + token) & slot_mask;
#pragma unroll
      for (int panel = 0; panel < Shared::kPanels; ++panel) {
        CopyBox(target + panel * Shared::kTokenPanel + token * kPanelElements, map, full,
                panel * kPanelElements, slot, task_.kv_head, page);
      }
    }
  }

  Shared& shared_;
  const PrefillMaps& maps_;
  const PrefillHopperParams<T>& params_;
  const PrefillHopperTask& task_;
  int lane_;
  int piece_shift_;  // log2 of the tokens of a piece
};

// A computing warpgroup: 64 rows against the block's tiles. A thread holds parts of two rows of
// scores and output: of each 8-column tile, columns lane % 4 * 2 and the next, of the rows lane / 4
// and lane / 4 + 8 of its warp's 16.
template <typename T, int kHeadDim>
class PrefillGroup {
 public:
  using Shared = PrefillShared<T, kHeadDim>;

  __device__ __forceinline__ PrefillGroup(Shared& shared, int group,
                                          const PrefillHopperParams<T>& params,
                                          const PrefillHopperTask& task)
      : shared_(shared),
        params_(params),
        task_(task),
        group_(group),
        whole_tiles_(
            task.first_position + group * kWarpgroupRows / params.group_size,
            task.first_position + (group * kWarpgroupRows + kWarpgroupRows - 1) / params.group_size,
            params.rule.window) {
    lane_ = threadIdx.x % kWarpSize;
    int first_row = group * kWarpgroupRows;
    first_row_ = first_row + threadIdx.x % kWarpgroupThreads / kWarpSize * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = first_row_ + lane_ / 4 + half * 8;
      position_[half] = task.first_position + row / params.group_size;
    }
  }

  // Tile i's product with V waits for tile i + 1's scores to be issued. Rows that see none of a
  // split's tokens end with a maximum of -inf, a sum of 0 and zeros.
  __device__ __forceinline__ void Attend() {
    int num_tiles = task_.end_tile - task_.first_tile;
    if (group_ == 1) ArriveThreads(kTurnBarrier, kGroupsThreads);  // group 0 has the first turn
    WaitBarrier(&shared_.query_full, 0);
    float scores[kScores], rescale[2];
    WaitBarrier(&shared_.key_full[0], FullParity(0));
    BeginTurn();
    IssueScores(0, scores);
    EndTurn(num_tiles == 1);
    WaitProducts<0>();
    PinRegisters(scores);
    Release(&shared_.key_empty[0]);
    Softmax(task_.first_tile, scores, rescale);
    Round(scores);
#pragma unroll 1
    for (int index = 1; index < num_tiles; ++index) {
      int stage = StageOf(index), value_stage = StageOf(index - 1);
      WaitBarrier(&shared_.key_full[stage], FullParity(index));
      WaitBarrier(&shared_.value_full[value_stage], FullParity(index - 1));
      BeginTurn();
      IssueScores(stage, scores);
      IssueOutput(value_stage);
      EndTurn(index == num_tiles - 1);
      WaitProducts<1>();
      PinRegisters(scores);
      Release(&shared_.key_empty[stage]);
      Softmax(task_.first_tile + index, scores, rescale);
      FinishSoftmax();
      WaitProducts<0>();
      PinRegisters(out_);
      PinRegisters(weights_);
      Release(&shared_.value_empty[value_stage]);
      Round(scores);
      Rescale(rescale);
    }
    int stage = StageOf(num_tiles - 1);
    WaitBarrier(&shared_.value_full[stage], FullParity(num_tiles - 1));
    int num_valid = task_.kv_end - (task_.end_tile - 1) * kPrefillTokens;
    if (num_valid < kPrefillTokens) ClearValues(shared_.value[stage], num_valid);
    IssueOutput(stage);
    WaitProducts<0>();
    PinRegisters(out_);
    PinRegisters(weights_);
  }

  // Leaves what was found to the tile's last split. Returns whether that is this one: then it holds
  // what all have found, added up in their order, whichever came last.
  __device__ __forceinline__ bool Merge(const PrefillParts& parts, int num_splits) {
    float4* of_tile =
        parts.values + int64_t{task_.split_tile} * num_splits * kPart + GroupsThread();
    WritePart(of_tile + int64_t{task_.split} * kPart);
    SyncThreads(kGroupsBarrier, kGroupsThreads);  // both groups have written
    if (GroupsThread() == 0) {
      shared_.is_last_split = CountSplit(parts.counters + task_.split_tile, task_.num_used);
    }
    SyncThreads(kGroupsBarrier, kGroupsThreads);
    if (!shared_.is_last_split) return false;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) out_[i] = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max_[half] = NegativeInfinity();
      sum_[half] = 0.0f;
    }
#pragma unroll 1
    for (int split = 0; split < task_.num_used; ++split) AddPart(of_tile + int64_t{split} * kPart);
    return true;
  }

  // Writes the block's rows of `out`. The way leads through the place of the queries, so that whole
  // rows are written.
  __device__ __forceinline__ void Store() {
    SyncThreads(kGroupBarrier + group_, kWarpgroupThreads);  // all warps are done with the queries
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = sum_[half];
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
      int row = first_row_ + half * 8 + lane_ / 4;
      int head = task_.kv_head * params_.group_size + row % params_.group_size;
      float scale = params_.out_scale * params_.rule.OutputScale(head, max_[half], sum);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        float low = out_[n * 4 + half * 2] * scale, high = out_[n * 4 + half * 2 + 1] * scale;
        T* target = shared_.query + n / 8 * Shared::kQueryPanel + PanelOffset(row, n % 8);
        *reinterpret_cast<uint32_t*>(target + lane_ % 4 * 2) = PackPair<T>(low, high);
      }
    }
    __syncwarp();
    constexpr int kChunks = kHeadDim / kChunkElements, kRowsPerPass = kWarpSize / kChunks;
    int chunk = lane_ % kChunks, group_size = params_.group_size;
    int num_q_heads = params_.num_kv_heads * group_size;
    const T* panel = shared_.query + chunk / 8 * Shared::kQueryPanel;
    // Its first query and head; row r is r / group_size queries and r % group_size heads further.
    int64_t first = int64_t{task_.first_query} * num_q_heads + task_.kv_head * group_size;
#pragma unroll
    for (int pass = 0; pass < 16 / kRowsPerPass; ++pass) {
      int row = first_row_ + pass * kRowsPerPass + lane_ / kChunks;
      if (row >= task_.num_rows) break;
      int64_t target = first + row / group_size * num_q_heads + row % group_size;
      *reinterpret_cast<uint4*>(params_.out + target * kHeadDim + chunk * kChunkElements) =
          *reinterpret_cast<const uint4*>(panel + PanelOffset(row, chunk % 8));
    }
  }

 private:
  static constexpr int kScores = kPrefillTokens / 2;  // of a thread
  static constexpr int kOutputs = kHeadDim / 2;
  static constexpr int kPart = kPrefillPart<kHeadDim>;

  // This thread among those of both groups.
  __device__ __forceinline__ int GroupsThread() const {
    return group_ * kWarpgroupThreads + threadIdx.x % kWarpgroupThreads;
  }

  // In its turn a group issues products; they queue up behind those of the other's turn before.
  __device__ __forceinline__ void BeginTurn() {
    SyncThreads(kTurnBarrier + group_, kGroupsThreads);
  }
  // Group 0's turn comes first, so nothing waits for the end of group 1's last.
  __device__ __forceinline__ void EndTurn(bool last) {
    if (group_ == 1 && last) return;
    ArriveThreads(kTurnBarrier + (group_ ^ 1), kGroupsThreads);
  }

  // This warp is done with a stage.
  __device__ __forceinline__ void Release(SharedBarrier* empty) {
    if (lane_ == 0) Arrive(empty);
  }

  // A group of products: scores = Q . K^T.
  __device__ __forceinline__ void IssueScores(int stage, float (&scores)[kScores]) {
    MatrixDescriptor query =
        RowsDescriptor(shared_.query + group_ * kWarpgroupRows * kPanelElements);
    MatrixDescriptor key = RowsDescriptor(shared_.key[stage]);
    constexpr int kStepsPerPanel = kPanelElements / kProductDepth;
    constexpr int kNextQueryPanel = Shared::kQueryPanel * sizeof(T) / 16;
    constexpr int kNextKeyPanel = Shared::kTokenPanel * sizeof(T) / 16;
    PinRegisters(scores);
    PinRegisters(out_);
    PinRegisters(weights_);
    BeginProducts();
#pragma unroll
    for (int step = 0; step < kHeadDim / kProductDepth; ++step) {
      int panel = step / kStepsPerPanel, in_panel = step % kStepsPerPanel * kNextRowsDepth;
      MultiplyShared<T>(scores, query + panel * kNextQueryPanel + in_panel,
                        key + panel * kNextKeyPanel + in_panel, step > 0);
    }
    CommitProducts();
  }

  // A group of products: out += weights . V.
  __device__ __forceinline__ void IssueOutput(int stage) {
    constexpr int kPanelBytes = Shared::kTokenPanel * sizeof(T);
    MatrixDescriptor value = DepthDescriptor(shared_.value[stage], kPanelBytes);
    PinRegisters(out_);
    PinRegisters(weights_);
    BeginProducts();
#pragma unroll
    for (int step = 0; step < kPrefillTokens / kProductDepth; ++step) {
      const uint32_t a[4] = {weights_[step * 4], weights_[step * 4 + 1], weights_[step * 4 + 2],
                             weights_[step * 4 + 3]};
      MultiplyRegisters<T>(out_, a, value + step * kNextDepthRows);
    }
    CommitProducts();
  }

  // The assembler would rather wait for products first and compute afterwards. It moves no wait
  // over a branch, and this one, never taken, depends on all weights.
  __device__ __forceinline__ void FinishSoftmax() {
    if (sum_[0] + sum_[1] < 0.0f) asm volatile("nanosleep.u32 0;\n" ::: "memory");
  }

  // A query sees the tokens up to its own position, and so many of them.
  __device__ __forceinline__ void Mask(int tile, float (&scores)[kScores]) {
    int first_token = tile * kPrefillTokens + lane_ % 4 * 2;  // of this thread's first column
    int behind[2] = {position_[0] - first_token, position_[1] - first_token};
    auto window = static_cast<unsigned>(params_.rule.window);
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      auto distance = static_cast<unsigned>(behind[i % 4 / 2] - (i / 4 * 8 + i % 2));
      if (distance >= window) scores[i] = NegativeInfinity();
    }
  }

  // Scores to weights 2^(scale * (score - max)), in place; `rescale`: from the old maximum to the
  // new one, for what was accumulated under the old.
  __device__ __forceinline__ void Softmax(int tile, float (&scores)[kScores], float (&rescale)[2]) {
    params_.rule.cap.CapAll(scores);
    if (tile < whole_tiles_.begin || tile >= whole_tiles_.end) Mask(tile, scores);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = max_[half];
#pragma unroll
      for (int i = half * 2; i < kScores; i += 4) max = fmaxf(max, fmaxf(scores[i], scores[i + 1]));
      max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 1));
      max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 2));
      float scaled_max = FiniteMax(max) * params_.rule.weight_scale;
      rescale[half] = FastExp2(max_[half] * params_.rule.weight_scale - scaled_max);
      max_[half] = max;
      float sum = 0.0f;
#pragma unroll
      for (int i = half * 2; i < kScores; i += 4) {
        scores[i] = FastExp2(scores[i] * params_.rule.weight_scale - scaled_max);
        scores[i + 1] = FastExp2(scores[i + 1] * params_.rule.weight_scale - scaled_max);
        sum += scores[i] + scores[i + 1];
      }
      sum_[half] = sum_[half] * rescale[half] + sum;
    }
  }

  // Weights to T: two neighbouring 8-column tiles of them, packed, are one 16 x 16 operand.
  __device__ __forceinline__ void Round(const float (&scores)[kScores]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      weights_[i] = PackPair<T>(scores[i * 2], scores[i * 2 + 1]);
    }
  }

  __device__ __forceinline__ void Rescale(const float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) out_[i] *= rescale[i % 4 / 2];
  }

  // What this thread has found, in memory.
  __device__ __forceinline__ void WritePart(float4* part) const {
#pragma unroll
    for (int i = 0; i < kOutputs / 4; ++i) {
      part[i * kGroupsThreads] =
          make_float4(out_[i * 4], out_[i * 4 + 1], out_[i * 4 + 2], out_[i * 4 + 3]);
    }
    part[kOutputs / 4 * kGroupsThreads] = make_float4(max_[0], sum_[0], max_[1], sum_[1]);
  }

  // Adds what this thread of another block, or of this one, has written. The loads go to the L2:
  // the L1 may hold what was there before.
  __device__ __forceinline__ void AddPart(const float4* part) {
    float4 state = __ldcg(part + kOutputs / 4 * kGroupsThreads);
    float4 values[kOutputs / 4];
#pragma unroll
    for (int i = 0; i < kOutputs / 4; ++i) values[i] = __ldcg(part + i * kGroupsThreads);
    float maxima[2] = {state.x, state.z}, sums[2] = {state.y, state.w}, keep[2], weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = fmaxf(max_[half], maxima[half]);
      float scaled_max = FiniteMax(max) * params_.rule.weight_scale;
      keep[half] = FastExp2(max_[half] * params_.rule.weight_scale - scaled_max);
      weight[half] = FastExp2(maxima[half] * params_.rule.weight_scale - scaled_max);
      max_[half] = max;
      sum_[half] = sum_[half] * keep[half] + sums[half] * weight[half];
    }
#pragma unroll
    for (int i = 0; i < kOutputs / 4; ++i) {
      out_[i * 4] = out_[i * 4] * keep[0] + values[i].x * weight[0];
      out_[i * 4 + 1] = out_[i * 4 + 1] * keep[0] + values[i].y * weight[0];
      out_[i * 4 + 2] = out_[i * 4 + 2] * keep[1] + values[i].z * weight[1];
      out_[i * 4 + 3] = out_[i * 4 + 3] * keep[1] + values[i].w * weight[1];
    }
  }

  // Zeros for the values of the tokens from `valid` on. Their weights are 0, but a slot that holds
  // no token may hold NaN. By both groups.
  __device__ __forceinline__ void ClearValues(T* values, int valid) {
    int num_chunks = (kPrefillTokens - valid) * 8;
#pragma unroll
    for (int panel = 0; panel < Shared::kPanels; ++panel) {
      T* rows = values + panel * Shared::kTokenPanel + valid * kPanelElements;  // whole rows: no
      for (int i = GroupsThread(); i < num_chunks; i += kGroupsThreads) {       // swizzle matters
        *reinterpret_cast<uint4*>(rows + i * kChunkElements) = uint4{};
      }
    }
    PublishSharedWrites();
    SyncThreads(kGroupsBarrier, kGroupsThreads);
  }

  Shared& shared_;
  const PrefillHopperParams<T>& params_;
  const PrefillHopperTask& task_;
  int group_;
  WholeTiles whole_tiles_;
  int lane_;
  int first_row_;    // of this warp, in the block
  int position_[2];  // of the queries of this thread's rows
  float out_[kOutputs] = {};
  uint32_t weights_[kScores / 2] = {};  // of the tile before
  float max_[2] = {NegativeInfinity(), NegativeInfinity()};
  float sum_[2] = {};  // of this thread's columns
};

// grid (whole tiles + splits of the others; TaskOf), 3 warpgroups. Blocks start in the order of the
// grid: those of a KV head together, so that its K and V stay in L2.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kHopperThreads, 1)
    AttentionPrefillHopperKernel(const __grid_constant__ PrefillMaps maps,
                                 const __grid_constant__ PrefillHopperParams<T> params) {
  extern __shared__ __align__(kPanelAlignment) unsigned char hopper_shared[];
  auto& shared = *reinterpret_cast<PrefillShared<T, kHeadDim>*>(hopper_shared);
  const PrefillHopperTask task = TaskOf(params, blockIdx.x);
  if (task.num_rows <= 0 || task.first_tile >= task.end_tile) return;
  if (threadIdx.x == 0) shared.InitBarriers();
  __syncthreads();

  // The same in all lanes, which the compiler learns from the shuffle.
  int warpgroup = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    ReleaseRegisters<kCopyRegisters>();
    if (threadIdx.x < kWarpSize) PrefillCopies<T, kHeadDim>(shared, maps, params, task).Run();
  } else {
    ClaimRegisters<kComputeRegisters>();
    PrefillGroup<T, kHeadDim> group(shared, warpgroup - 1, params, task);
    group.Attend();
    if (task.num_used > 1 && !group.Merge(params.parts, params.splits.num_splits)) return;
    group.Store();
  }
}

template <typename T, int kHeadDim>
PrefillMaps MakePrefillMaps(const AttentionPrefillArgs& args) {
  auto size = [](const TensorView& view, int dim) { return static_cast<uint64_t>(view.dim(dim)); };
  const TensorView& k = args.kv.k_pages;
  auto encode = FindTensorMapEncode();
  std::array<uint64_t, 4> pool = {size(k, 3), size(k, 2), size(k, 1), size(k, 0)};
  auto piece = static_cast<uint32_t>(std::min<int64_t>(k.dim(2), kPrefillTokens));
  auto group_size = static_cast<uint32_t>(args.q.dim(1) / k.dim(1));
  return {
      .q = MakeTensorMap<T, 3>(encode, args.q.ptr,
                               {size(args.q, 2), size(args.q, 1), size(args.q, 0)},
                               {kPanelElements, group_size, kPrefillRows / group_size}),
      .k = MakeTensorMap<T, 4>(encode, k.ptr, pool, {kPanelElements, piece, 1, 1}),
      .v = MakeTensorMap<T, 4>(encode, args.kv.v_pages.ptr, pool, {kPanelElements, piece, 1, 1})};
}

// Takes the room for what `num_blocks` splits of `num_tiles` tiles leave.
template <int kHeadDim>
PrefillParts TakePrefillParts(const AttentionScratch& scratch, int64_t num_tiles,
                              int64_t num_blocks) {
  if (num_blocks == 0) return {};
  int64_t needed = scratch.counter_bytes + PromptPartBytes(num_blocks, kHeadDim);
  static_assert(kPrefillPart<kHeadDim> * sizeof(float4) == PromptPartBytes(1, kHeadDim));
  TIDAL_CHECK(
      needed <= scratch.bytes && num_tiles * int64_t{sizeof(uint32_t)} <= scratch.counter_bytes,
      BackendError, "attention_prefill: needs ", needed, " bytes of attention scratch, has ",
      scratch.bytes, "; reserve the backend for the largest step that will run");
  return {.values =
              reinterpret_cast<float4*>(static_cast<char*>(scratch.memory) + scratch.counter_bytes),
          .counters = static_cast<uint32_t*>(scratch.memory)};
}

template <typename T, int kHeadDim>
void RunAttentionPrefillHopper(const AttentionPrefillArgs& args, const AttentionScratch& scratch,
                               cudaStream_t stream) {
  int64_t batch_size = args.kv.seq_lens.dim(0);
  if (args.max_q_len == 0 || batch_size == 0 || args.q.dim(0) == 0) return;
  TIDAL_CHECK(args.rule.sm_scale > 0.0f, UnsupportedError, "attention_prefill: sm_scale ",
              args.rule.sm_scale, " on CUDA; expected a positive number");
  PagedKvView<T> kv = MakePagedKvView<T>("attention_prefill", args.kv);
  int64_t group_size = args.q.dim(1) / kv.num_kv_heads, tile_queries = kPrefillRows / group_size;
  int64_t row_tiles = CeilDiv(args.max_q_len, tile_queries);
  int64_t num_tiles = row_tiles * kv.num_kv_heads * batch_size;
  // Tiles of tokens that one of queries sees at most: those of a window may begin anywhere.
  PromptRule rule = MakePromptRule(args.rule, args.kv.k_scale);
  int64_t most_tiles = std::min(CeilDiv(args.max_seq_len, kPrefillTokens),
                                CeilDiv(rule.window + tile_queries, kPrefillTokens) + 1);
  PromptSplits splits =
      ChoosePromptSplits(scratch.splitting, num_tiles, most_tiles, scratch.num_sms);
  int64_t num_split = num_tiles - splits.num_whole;
  PrefillHopperParams<T> params{
      .q_starts = args.q_starts.data<int32_t>(),
      .seq_lens = kv.seq_lens,
      .page_table = kv.page_table,
      .max_pages = kv.max_pages,
      .num_pages = static_cast<int>(args.kv.k_pages.dim(0)),
      .page_shift = kv.page_shift,
      .rule = rule,
      .out_scale = args.kv.v_scale,
      .num_kv_heads = kv.num_kv_heads,
      .group_size = static_cast<int>(group_size),
      .tile_queries = static_cast<int>(tile_queries),
      .row_tiles = static_cast<int>(row_tiles),
      .num_tiles = static_cast<int>(num_tiles),
      .splits = splits,
      .parts = TakePrefillParts<kHeadDim>(scratch, num_split, num_split * splits.num_splits),
      .out = static_cast<T*>(args.out.ptr)};

  auto kernel = AttentionPrefillHopperKernel<T, kHeadDim>;
  constexpr int kSharedBytes = sizeof(PrefillShared<T, kHeadDim>);
  TIDAL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  int64_t num_blocks = splits.num_whole + num_split * splits.num_splits;
  kernel<<<static_cast<unsigned>(num_blocks), kHopperThreads, kSharedBytes, stream>>>(
      MakePrefillMaps<T, kHeadDim>(args), params);
  TIDAL_LAUNCH_CHECK("attention_prefill");
}

}  // namespace tidal
