// Causal attention of prompt chunks over the paged cache on compute capability 9.0: after
// FlashAttention-3 (arXiv 2407.08608). Same meaning and numerics as attention_prefill.cuh, which
// other devices run.
//
// A block takes 128 queries of one head. One warp starts the copies of K and V, 128 tokens at a
// time, page by page, into stages in shared memory. Two warpgroups compute, 64 queries each. What
// keeps the tensor cores busy while exponentials are taken:
// - a group has the products of the next scores under way while it makes weights of these, and
// - the groups issue products in turns, so that one's products run beside the other's softmax.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/mma.cuh"
#include "common/paged_kv.cuh"
#include "common/reduce.cuh"
#include "common/shared_barrier.cuh"
#include "common/softmax_state.cuh"
#include "common/tensor_copy.cuh"
#include "common/warpgroup_mma.cuh"
#include "kernels/attention_run.h"

namespace tidal {

inline constexpr int kPrefillGroups = 2;
inline constexpr int kPrefillQueries = kPrefillGroups * kWarpgroupRows;  // of a block
inline constexpr int kPrefillTokens = 128;                               // of a tile of K or V
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
  CUtensorMap q;  // [T, Hq, D]: boxes of 128 queries
  CUtensorMap k;  // [num_pages, Hkv, page_size, D]: boxes of one page, or of 128 of its tokens
  CUtensorMap v;  // likewise
};

template <typename T>
struct PrefillHopperParams {
  const int32_t* q_starts;    // [B + 1]
  const int32_t* seq_lens;    // [B]
  const int32_t* page_table;  // [B, max_pages]
  int max_pages;
  int num_pages;
  int page_shift;       // log2(page_size)
  float sm_scale_log2;  // sm_scale x log2(e), > 0
  int group_size;
  T* out;  // [T, Hq, D]
};

// What a block works on.
struct PrefillHopperTask {
  int batch;
  int q_head;
  int kv_head;
  int first_row;       // of q and out: its first query
  int num_queries;     // 1 to 128
  int first_position;  // of its first query
  int kv_end;          // tokens that its last query sees

  __device__ __forceinline__ int num_tiles() const {
    return (kv_end + kPrefillTokens - 1) / kPrefillTokens;
  }
};

// Panels of 64 dims, one after the other: [panel][row][64].
template <typename T, int kHeadDim>
struct PrefillShared {
  static constexpr int kPanels = kHeadDim / kPanelElements;
  static constexpr int kQueryPanel = kPrefillQueries * kPanelElements;
  static constexpr int kTokenPanel = kPrefillTokens * kPanelElements;

  alignas(kPanelAlignment) T query[kPanels * kQueryPanel];  // later the output
  alignas(kPanelAlignment) T key[kPrefillStages][kPanels * kTokenPanel];
  alignas(kPanelAlignment) T value[kPrefillStages][kPanels * kTokenPanel];
  // Full: the copies have landed. Empty: every computing warp is done with the stage.
  SharedBarrier query_full;
  SharedBarrier key_full[kPrefillStages], key_empty[kPrefillStages];
  SharedBarrier value_full[kPrefillStages], value_empty[kPrefillStages];

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

// Where tile `tile` goes, and the parities of its barriers: stages are used in turn, and the first
// use waits for no one (a barrier's phase before the first counts as ended).
__device__ __forceinline__ int StageOf(int tile) {
  return tile % kPrefillStages;
}
__device__ __forceinline__ uint32_t FullParity(int tile) {
  return tile / kPrefillStages & 1;
}
__device__ __forceinline__ uint32_t EmptyParity(int tile) {
  return FullParity(tile) ^ 1;
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
    int num_tiles = task_.num_tiles();
    int next_page = PageOfLane(0);
    for (int tile = 0; tile < num_tiles; ++tile) {
      int page = next_page, stage = StageOf(tile);
      next_page = PageOfLane(tile + 1);  // its latency passes while the stages are in use
      WaitBarrier(&shared_.key_empty[stage], EmptyParity(tile));
      CopyTile(shared_.key[stage], &maps_.k, &shared_.key_full[stage], tile, page);
      WaitBarrier(&shared_.value_empty[stage], EmptyParity(tile));
      CopyTile(shared_.value[stage], &maps_.v, &shared_.value_full[stage], tile, page);
    }
  }

 private:
  // Rows past the last query are other queries, or zeros past the last of all: they are computed
  // and not stored.
  __device__ __forceinline__ void CopyQueries() {
    if (lane_ != 0) return;
    ArriveExpecting(&shared_.query_full, sizeof(shared_.query));
#pragma unroll
    for (int panel = 0; panel < Shared::kPanels; ++panel) {
      CopyBox(shared_.query + panel * Shared::kQueryPanel, &maps_.q, &shared_.query_full,
              panel * kPanelElements, task_.q_head, task_.first_row);
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

// A computing warpgroup: 64 queries against all tiles. A thread holds parts of two rows of scores
// and output: of each 8-column tile, columns lane % 4 * 2 and the next, of the rows lane / 4 and
// lane / 4 + 8 of its warp's 16.
template <typename T, int kHeadDim>
class PrefillGroup {
 public:
  using Shared = PrefillShared<T, kHeadDim>;

  // `first_position`: of the block's first query.
  __device__ __forceinline__ PrefillGroup(Shared& shared, int group, int first_position,
                                          float sm_scale_log2)
      : shared_(shared), group_(group), sm_scale_log2_(sm_scale_log2) {
    lane_ = threadIdx.x % kWarpSize;
    first_row_ = group * kWarpgroupRows + threadIdx.x % kWarpgroupThreads / kWarpSize * 16;
    position_ = first_position + first_row_ + lane_ / 4;
    // The first tile that has a token after the group's first query.
    first_masked_tile_ = (first_position + group * kWarpgroupRows + 1) / kPrefillTokens;
  }

  // Tiles run from the first: all rows see its first token, so each has a maximum from then on.
  // Tile i's product with V waits for tile i + 1's scores to be issued.
  __device__ __forceinline__ void Attend(int kv_end) {
    int num_tiles = (kv_end + kPrefillTokens - 1) / kPrefillTokens;
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
    Softmax(0, scores, rescale);
    Round(scores);
#pragma unroll 1
    for (int tile = 1; tile < num_tiles; ++tile) {
      int stage = StageOf(tile), value_stage = StageOf(tile - 1);
      WaitBarrier(&shared_.key_full[stage], FullParity(tile));
      WaitBarrier(&shared_.value_full[value_stage], FullParity(tile - 1));
      BeginTurn();
      IssueScores(stage, scores);
      IssueOutput(value_stage);
      EndTurn(tile == num_tiles - 1);
      WaitProducts<1>();
      PinRegisters(scores);
      Release(&shared_.key_empty[stage]);
      Softmax(tile, scores, rescale);
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
    if (kv_end % kPrefillTokens != 0) ClearValues(shared_.value[stage], kv_end % kPrefillTokens);
    IssueOutput(stage);
    WaitProducts<0>();
    PinRegisters(out_);
    PinRegisters(weights_);
  }

  // Writes the block's rows that are below num_queries; `out`: its first row, rows are row_stride
  // elements apart. The way leads through the place of the queries, so that whole rows are written.
  __device__ __forceinline__ void Store(T* out, int64_t row_stride, int num_queries) {
    SyncThreads(kGroupBarrier + group_, kWarpgroupThreads);  // all warps are done with the queries
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = sum_[half];
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
      float scale = sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: every score was -inf
      int row = first_row_ + half * 8 + lane_ / 4;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        float low = out_[n * 4 + half * 2] * scale, high = out_[n * 4 + half * 2 + 1] * scale;
        T* target = shared_.query + n / 8 * Shared::kQueryPanel + PanelOffset(row, n % 8);
        *reinterpret_cast<uint32_t*>(target + lane_ % 4 * 2) = PackPair<T>(low, high);
      }
    }
    __syncwarp();
    constexpr int kChunks = kHeadDim / kChunkElements, kRowsPerPass = kWarpSize / kChunks;
    int chunk = lane_ % kChunks;
    const T* panel = shared_.query + chunk / 8 * Shared::kQueryPanel;
#pragma unroll
    for (int pass = 0; pass < 16 / kRowsPerPass; ++pass) {
      int row = first_row_ + pass * kRowsPerPass + lane_ / kChunks;
      if (row >= num_queries) break;
      *reinterpret_cast<uint4*>(out + row * row_stride + chunk * kChunkElements) =
          *reinterpret_cast<const uint4*>(panel + PanelOffset(row, chunk % 8));
    }
  }

 private:
  static constexpr int kScores = kPrefillTokens / 2;  // of a thread
  static constexpr int kOutputs = kHeadDim / 2;

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

  // A query sees the tokens up to its own position.
  __device__ __forceinline__ void Mask(int tile, float (&scores)[kScores]) {
    // Of this thread's first row and column: how far its query lies after its token.
    int visible = position_ - tile * kPrefillTokens - lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      int column = i / 4 * 8 + i % 2, row = i % 4 / 2 * 8;
      if (column - row > visible) scores[i] = NegativeInfinity();
    }
  }

  // Scores to weights 2^(scale * (score - max)), in place; `rescale`: from the old maximum to the
  // new one, for what was accumulated under the old.
  __device__ __forceinline__ void Softmax(int tile, float (&scores)[kScores], float (&rescale)[2]) {
    if (tile >= first_masked_tile_) Mask(tile, scores);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = max_[half];
#pragma unroll
      for (int i = half * 2; i < kScores; i += 4) max = fmaxf(max, fmaxf(scores[i], scores[i + 1]));
      max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 1));
      max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 2));
      float scaled_max = FiniteMax(max) * sm_scale_log2_;
      rescale[half] = FastExp2(max_[half] * sm_scale_log2_ - scaled_max);
      max_[half] = max;
      float sum = 0.0f;
#pragma unroll
      for (int i = half * 2; i < kScores; i += 4) {
        scores[i] = FastExp2(scores[i] * sm_scale_log2_ - scaled_max);
        scores[i + 1] = FastExp2(scores[i + 1] * sm_scale_log2_ - scaled_max);
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

  // Zeros for the values of the tokens from `valid` on. Their weights are 0, but a slot that holds
  // no token may hold NaN. By both groups.
  __device__ __forceinline__ void ClearValues(T* values, int valid) {
    int thread = group_ * kWarpgroupThreads + threadIdx.x % kWarpgroupThreads;
    int num_chunks = (kPrefillTokens - valid) * 8;
#pragma unroll
    for (int panel = 0; panel < Shared::kPanels; ++panel) {
      T* rows = values + panel * Shared::kTokenPanel + valid * kPanelElements;  // whole rows: no
      for (int i = thread; i < num_chunks; i += kGroupsThreads) {               // swizzle matters
        *reinterpret_cast<uint4*>(rows + i * kChunkElements) = uint4{};
      }
    }
    PublishSharedWrites();
    SyncThreads(kGroupsBarrier, kGroupsThreads);
  }

  Shared& shared_;
  int group_;
  float sm_scale_log2_;
  int lane_;
  int first_row_;  // of this warp, in the block
  int position_;   // of this thread's first row
  int first_masked_tile_;
  float out_[kOutputs] = {};
  uint32_t weights_[kScores / 2] = {};  // of the tile before
  float max_[2] = {NegativeInfinity(), NegativeInfinity()};
  float sum_[2] = {};  // of this thread's columns
};

// grid (query tiles, num_q_heads, batch_size), 3 warpgroups. Blocks start in the order of the grid,
// x first: those of a head together, so that its K and V stay in L2, and of a head the last tiles
// of queries, which see the most tokens, first.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kHopperThreads, 1)
    AttentionPrefillHopperKernel(const __grid_constant__ PrefillMaps maps,
                                 const __grid_constant__ PrefillHopperParams<T> params) {
  extern __shared__ __align__(kPanelAlignment) unsigned char hopper_shared[];
  auto& shared = *reinterpret_cast<PrefillShared<T, kHeadDim>*>(hopper_shared);
  int batch = blockIdx.z, first_query = (gridDim.x - 1 - blockIdx.x) * kPrefillQueries;
  int q_start = __ldg(params.q_starts + batch);
  int q_len = __ldg(params.q_starts + batch + 1) - q_start;
  if (first_query >= q_len) return;

  int num_queries = min(kPrefillQueries, q_len - first_query);
  int first_position = __ldg(params.seq_lens + batch) - q_len + first_query;
  const PrefillHopperTask task = {.batch = batch,
                                  .q_head = static_cast<int>(blockIdx.y),
                                  .kv_head = static_cast<int>(blockIdx.y) / params.group_size,
                                  .first_row = q_start + first_query,
                                  .num_queries = num_queries,
                                  .first_position = first_position,
                                  .kv_end = first_position + num_queries};
  if (threadIdx.x == 0) shared.InitBarriers();
  __syncthreads();

  // The same in all lanes, which the compiler learns from the shuffle.
  int warpgroup = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    ReleaseRegisters<kCopyRegisters>();
    if (threadIdx.x < kWarpSize) PrefillCopies<T, kHeadDim>(shared, maps, params, task).Run();
  } else {
    ClaimRegisters<kComputeRegisters>();
    PrefillGroup<T, kHeadDim> group(shared, warpgroup - 1, first_position, params.sm_scale_log2);
    group.Attend(task.kv_end);
    int64_t row_stride = int64_t{gridDim.y} * kHeadDim;
    T* out = params.out + task.first_row * row_stride + task.q_head * kHeadDim;
    group.Store(out, row_stride, num_queries);
  }
}

template <typename T, int kHeadDim>
PrefillMaps MakePrefillMaps(const AttentionPrefillArgs& args) {
  auto size = [](const TensorView& view, int dim) { return static_cast<uint64_t>(view.dim(dim)); };
  const TensorView& k = args.kv.k_pages;
  auto encode = FindTensorMapEncode();
  std::array<uint64_t, 4> pool = {size(k, 3), size(k, 2), size(k, 1), size(k, 0)};
  auto piece = static_cast<uint32_t>(std::min<int64_t>(k.dim(2), kPrefillTokens));
  return {
      .q = MakeTensorMap<T, 3>(encode, args.q.ptr,
                               {size(args.q, 2), size(args.q, 1), size(args.q, 0)},
                               {kPanelElements, 1, kPrefillQueries}),
      .k = MakeTensorMap<T, 4>(encode, k.ptr, pool, {kPanelElements, piece, 1, 1}),
      .v = MakeTensorMap<T, 4>(encode, args.kv.v_pages.ptr, pool, {kPanelElements, piece, 1, 1})};
}

template <typename T, int kHeadDim>
void RunAttentionPrefillHopper(const AttentionPrefillArgs& args, cudaStream_t stream) {
  int64_t num_q_heads = args.q.dim(1), batch_size = args.kv.seq_lens.dim(0);
  int64_t num_tiles = CeilDiv(args.max_q_len, kPrefillQueries);
  if (num_tiles == 0 || batch_size == 0 || args.q.dim(0) == 0) return;
  TIDAL_CHECK(args.sm_scale > 0.0f, UnsupportedError, "attention_prefill: sm_scale ", args.sm_scale,
              " on CUDA; expected a positive number");
  PagedKvView<T> kv = MakePagedKvView<T>("attention_prefill", args.kv);
  PrefillHopperParams<T> params{.q_starts = args.q_starts.data<int32_t>(),
                                .seq_lens = kv.seq_lens,
                                .page_table = kv.page_table,
                                .max_pages = kv.max_pages,
                                .num_pages = static_cast<int>(args.kv.k_pages.dim(0)),
                                .page_shift = kv.page_shift,
                                .sm_scale_log2 = args.sm_scale * kLog2E,
                                .group_size = static_cast<int>(num_q_heads / kv.num_kv_heads),
                                .out = static_cast<T*>(args.out.ptr)};

  auto kernel = AttentionPrefillHopperKernel<T, kHeadDim>;
  constexpr int kSharedBytes = sizeof(PrefillShared<T, kHeadDim>);
  TIDAL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  dim3 grid(static_cast<unsigned>(num_tiles), static_cast<unsigned>(num_q_heads),
            static_cast<unsigned>(batch_size));
  kernel<<<grid, kHopperThreads, kSharedBytes, stream>>>(MakePrefillMaps<T, kHeadDim>(args),
                                                         params);
  TIDAL_LAUNCH_CHECK("attention_prefill");
}

}  // namespace tidal
