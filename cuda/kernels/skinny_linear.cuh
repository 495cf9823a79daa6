// The product of a few tokens with a weight: bound by reading the weight once, at memory speed.
//
// One block for each SM. A copy warp streams the weight through a ring of shared memory, 16 rows by
// kChunk inputs a stage, and starts before the kernel in front has ended: the weight does not
// depend on it. Eight warps multiply, each a whole stage at a time, with the tensor cores: weight
// rows are the 16 rows of an mma, tokens its 8 columns. One warp adds up their partial results in a
// fixed order and finishes the tile (the Epilogue: bias, residual, SiLU, rotation and append).
//
// The tokens' inputs are copied beside the weight, or, with an RmsNorm in front, normalised by the
// block into shared memory first. A block takes less than half of an SM's shared memory where it
// can, so that the next kernel's blocks move in beside it and fill their rings early.
//
// Inside an mma the order of the inputs does not matter as long as both sides agree: a lane takes 8
// neighbouring inputs of a row with one 16-byte load, and they serve as the k of two mma.
#pragma once

#include <cstdint>

#include "common/bulk_copy.cuh"
#include "common/dependent_launch.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "kernels/skinny_layout.h"

namespace tidal {

template <typename T>
struct SkinnyParams {
  const T* weight;       // [N, K]
  int num_outputs;       // N
  int num_inputs;        // K
  int num_tokens;        // 1 to kMaxSkinnyTokens
  int num_tiles;         // of all blocks together
  const T* x;            // [T, K], or null: RmsNorm of the next three
  const float* hidden;   // [T, K]
  const T* norm_weight;  // [K]
  float norm_eps;
  SkinnyLayout layout;
};

// The weight rows of a tile: 8 from `first` on and 8 from `second` on.
struct TileRows {
  int first;
  int second;
};

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// What an Epilogue offers:
//   TileRows Rows(int tile) const;
//   Lane: the finishing warp's state, made from (epilogue, lane) after the kernel in front has
//   ended,
//     with Begin(tile): starts what can be read before the results are there, and
//     Finish(tile, values): lane l holds rows l / 4 of the first and the second 8, for tokens
//     2 (l % 4) and 2 (l % 4) + 1: values[0], [1] of the first, [2], [3] of the second.

template <typename T, typename Epilogue>
class SkinnyBlock {
 public:
  __device__ SkinnyBlock(const SkinnyParams<T>& params, const Epilogue& epilogue,
                         unsigned char* shared)
      : p_(params), epilogue_(epilogue), shared_(shared) {
    num_chunks_ = (p_.num_inputs + kChunk - 1) / kChunk;
    int first = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    num_tiles_ = (p_.num_tiles - first + blocks - 1) / blocks;
    full_ = reinterpret_cast<SharedBarrier*>(shared + p_.layout.Barriers());
    empty_ = full_ + p_.layout.num_stages;
    tile_full_ = empty_ + p_.layout.num_stages;
    tile_empty_ = tile_full_ + p_.layout.num_tile_buffers;
  }

  // By one thread.
  __device__ void InitBarriers() {
    for (int stage = 0; stage < p_.layout.num_stages; ++stage) {
      InitBarrier(full_ + stage, 1);
      InitBarrier(empty_ + stage, 1);
    }
    for (int buffer = 0; buffer < p_.layout.num_tile_buffers; ++buffer) {
      InitBarrier(tile_full_ + buffer, static_cast<uint32_t>(p_.layout.num_parts));
      InitBarrier(tile_empty_ + buffer, 1);
    }
    FenceBarrierInit();
  }

  // The copy warp: weight (and inputs) of all stages in turn.
  __device__ void Copy() {
    int lane = threadIdx.x % kWarpSize;
    int total = num_tiles_ * num_chunks_, num_stages = p_.layout.num_stages;
    int early = min(total, num_stages);
    Cursor cursor(num_chunks_, num_stages);
    for (int i = 0; i < early; ++i, cursor.Next()) {
      Announce(cursor, lane);
      CopyWeight(cursor, lane);
    }
    WaitForPreviousKernel();
    LetNextKernelStart();
    if (p_.x != nullptr) {
      Cursor inputs(num_chunks_, num_stages);
      for (int i = 0; i < early; ++i, inputs.Next()) CopyInputs(inputs, lane);
    }
    for (int i = early; i < total; ++i, cursor.Next()) {
      WaitBarrier(empty_ + cursor.stage, (cursor.round - 1) & 1);
      Announce(cursor, lane);
      CopyWeight(cursor, lane);
      if (p_.x != nullptr) CopyInputs(cursor, lane);
    }
  }

  // A multiplying warp: every kMultiplyWarps-th stage. Where its part of a tile stands among the
  // others is given by its chunks alone, so sums do not depend on which warp had them.
  __device__ void Multiply() {
    int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    int total = num_tiles_ * num_chunks_;
    float sums[2][4] = {};
    Cursor cursor(num_chunks_, p_.layout.num_stages);
    cursor.Skip(warp);
    for (int i = warp; i < total; i += kMultiplyWarps) {
      WaitBarrier(full_ + cursor.stage, cursor.round & 1);
      MultiplyStage(cursor, lane, sums);
      __syncwarp();
      if (lane == 0) Arrive(empty_ + cursor.stage);
      Cursor next = cursor;
      next.Skip(kMultiplyWarps);
      if (next.tile != cursor.tile || i + kMultiplyWarps >= total) {
        HandIn(cursor.tile, cursor.chunk % kMultiplyWarps, lane, sums);
      }
      cursor = next;
    }
  }

  // The finishing warp.
  __device__ void Finish() {
    int lane = threadIdx.x % kWarpSize, num_buffers = p_.layout.num_tile_buffers;
    WaitForPreviousKernel();
    typename Epilogue::Lane finisher(epilogue_, lane);
    for (int i = 0; i < num_tiles_; ++i) {
      int tile = static_cast<int>(blockIdx.x + i * gridDim.x), buffer = i % num_buffers;
      finisher.Begin(tile);
      WaitBarrier(tile_full_ + buffer, (i / num_buffers) & 1);
      float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int part = 0; part < p_.layout.num_parts; ++part) {
        float4 partial = *Partial(buffer, part, lane);
        total.x = __fadd_rn(total.x, partial.x);
        total.y = __fadd_rn(total.y, partial.y);
        total.z = __fadd_rn(total.z, partial.z);
        total.w = __fadd_rn(total.w, partial.w);
      }
      __syncwarp();
      if (lane == 0) Arrive(tile_empty_ + buffer);
      const float values[4] = {total.x, total.y, total.z, total.w};
      finisher.Finish(tile, values);
    }
  }

  // The multiplying warps together: RmsNorm of all tokens into shared memory, as rms_norm.cu.
  // `warp_sums` is shared.
  __device__ void NormalizeTokens(float (&warp_sums)[kMultiplyWarps]) {
    constexpr int kVec = 4;
    int warps_each = p_.num_tokens == 1 ? 8 : p_.num_tokens == 2 ? 4 : p_.num_tokens <= 4 ? 2 : 1;
    int warp = threadIdx.x / kWarpSize, token = warp / warps_each;
    int index = static_cast<int>(threadIdx.x) - token * warps_each * kWarpSize;
    int stride = warps_each * kWarpSize * kVec;
    // Into the L2 cache while the kernel in front still runs.
    for (int i = threadIdx.x * 64; i < p_.num_inputs; i += kMultiplyWarps * kWarpSize * 64) {
      asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p_.norm_weight + i));
    }
    WaitForPreviousKernel();
    bool present = token < p_.num_tokens;
    const float* row = p_.hidden + int64_t{token} * p_.num_inputs;
    float sum = 0.0f;
    if (present) {
#pragma unroll 8
      for (int i = index * kVec; i < p_.num_inputs; i += stride) {
        float values[kVec];
        LoadFloats<kVec>(row + i, values);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum = __fmaf_rn(values[j], values[j], sum);
      }
    }
    sum = WarpSum(sum);
    if (threadIdx.x % kWarpSize == 0) warp_sums[warp] = sum;
    SyncMultiplyWarps();
    if (present) {
      float total = 0.0f;
      for (int i = 0; i < warps_each; ++i) total += warp_sums[token * warps_each + i];
      float scale = 1.0f / sqrtf(total / static_cast<float>(p_.num_inputs) + p_.norm_eps);
      T* out =
          reinterpret_cast<T*>(shared_ + p_.layout.Normed() + token * p_.layout.normed_row_bytes);
#pragma unroll 4
      for (int i = index * kVec; i < p_.num_inputs; i += stride) {
        float values[kVec], weights[kVec];
        LoadFloats<kVec>(row + i, values);
        LoadFloats<kVec>(p_.norm_weight + i, weights);
#pragma unroll
        for (int j = 0; j < kVec; ++j) values[j] *= scale * weights[j];
        StoreFloats<kVec>(out + i, values);
      }
    }
    SyncMultiplyWarps();
  }

 private:
  // A place in the block's sequence of stages.
  struct Cursor {
    int num_chunks, num_stages;
    int tile = 0;   // the block's tile-th
    int chunk = 0;  // of the tile
    int stage = 0;
    int round = 0;  // how often the ring has been gone round

    __device__ Cursor(int chunks, int stages) : num_chunks(chunks), num_stages(stages) {}
    __device__ void Skip(int count) {
      chunk += count;
      while (chunk >= num_chunks) {
        chunk -= num_chunks;
        ++tile;
      }
      stage += count;
      while (stage >= num_stages) {
        stage -= num_stages;
        ++round;
      }
    }
    __device__ void Next() { Skip(1); }
  };

  __device__ unsigned char* StageRow(int stage, int row) const {
    return shared_ + stage * p_.layout.StageBytes() + row * kStageRowBytes;
  }
  __device__ float4* Partial(int buffer, int part, int lane) const {
    return reinterpret_cast<float4*>(shared_ + p_.layout.Partials()) +
           (buffer * p_.layout.num_parts + part) * kWarpSize + lane;
  }
  __device__ int ChunkInputs(const Cursor& at) const {
    return min(kChunk, p_.num_inputs - at.chunk * kChunk);
  }

  __device__ void Announce(const Cursor& at, int lane) {
    if (lane == 0) {
      uint32_t row_bytes = static_cast<uint32_t>(ChunkInputs(at)) * sizeof(T);
      ArriveExpectingBytes(full_ + at.stage,
                           row_bytes * static_cast<uint32_t>(p_.layout.stage_rows));
    }
    __syncwarp();
  }

  // Lane l copies the l-th row of the tile. Rows past the end of the weight repeat its last one.
  __device__ void CopyWeight(const Cursor& at, int lane) {
    if (lane >= kTileRows) return;
    TileRows rows = epilogue_.Rows(static_cast<int>(blockIdx.x + at.tile * gridDim.x));
    int row = lane < 8 ? rows.first + lane : rows.second + lane - 8;
    const T* source =
        p_.weight + int64_t{min(row, p_.num_outputs - 1)} * p_.num_inputs + at.chunk * kChunk;
    CopyBulk(StageRow(at.stage, lane), source, static_cast<uint32_t>(ChunkInputs(at)) * sizeof(T),
             full_ + at.stage);
  }

  // Lane l copies the inputs of token l.
  __device__ void CopyInputs(const Cursor& at, int lane) {
    if (lane >= p_.num_tokens) return;
    const T* source = p_.x + int64_t{lane} * p_.num_inputs + at.chunk * kChunk;
    CopyBulk(StageRow(at.stage, kTileRows + lane), source,
             static_cast<uint32_t>(ChunkInputs(at)) * sizeof(T), full_ + at.stage);
  }

  __device__ void MultiplyStage(const Cursor& at, int lane, float (&sums)[2][4]) {
    int group = lane / 4, offset = lane % 4 * 16;  // weight row (and token); bytes into a step
    const unsigned char* low = StageRow(at.stage, group) + offset;
    const unsigned char* high = StageRow(at.stage, group + 8) + offset;
    const unsigned char* input =
        p_.x != nullptr ? StageRow(at.stage, kTileRows + group) + offset
                        : shared_ + p_.layout.Normed() + group * p_.layout.normed_row_bytes +
                              at.chunk * kChunk * static_cast<int>(sizeof(T)) + offset;
    bool present = group < p_.num_tokens;
    int num_steps = ChunkInputs(at) / kStepInputs;
#pragma unroll 4
    for (int step = 0; step < num_steps; ++step) {
      constexpr int kStepBytes = kStepInputs * static_cast<int>(sizeof(T));
      uint4 a_low = *reinterpret_cast<const uint4*>(low + step * kStepBytes);
      uint4 a_high = *reinterpret_cast<const uint4*>(high + step * kStepBytes);
      uint4 b = make_uint4(0, 0, 0, 0);
      if (present) b = *reinterpret_cast<const uint4*>(input + step * kStepBytes);
      MultiplyAdd<T>(sums[0], {a_low.x, a_high.x, a_low.y, a_high.y}, b.x, b.y);
      MultiplyAdd<T>(sums[1], {a_low.z, a_high.z, a_low.w, a_high.w}, b.z, b.w);
    }
  }

  // Leaves this warp's part of a tile to the finishing warp, and starts afresh.
  __device__ void HandIn(int tile, int part, int lane, float (&sums)[2][4]) {
    int num_buffers = p_.layout.num_tile_buffers;
    int buffer = tile % num_buffers, round = tile / num_buffers;
    if (round > 0) WaitBarrier(tile_empty_ + buffer, (round - 1) & 1);
    *Partial(buffer, part, lane) = make_float4(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1],
                                               sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]);
    __syncwarp();
    if (lane == 0) Arrive(tile_full_ + buffer);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[0][i] = sums[1][i] = 0.0f;
  }

  __device__ static void SyncMultiplyWarps() {
    asm volatile("bar.sync 1, %0;\n" ::"n"(kMultiplyWarps * kWarpSize) : "memory");
  }

  const SkinnyParams<T>& p_;
  const Epilogue& epilogue_;
  unsigned char* shared_;
  SharedBarrier* full_;        // [num_stages]: a stage's copies have landed
  SharedBarrier* empty_;       // [num_stages]: its warp is done with it
  SharedBarrier* tile_full_;   // [num_tile_buffers]: all parts of a tile are handed in
  SharedBarrier* tile_empty_;  // [num_tile_buffers]: they have been added up
  int num_chunks_;             // of a tile
  int num_tiles_;              // of this block
};

#endif

// grid: at most one block for each SM and tile; kSkinnyThreads threads.
template <typename T, typename Epilogue>
__global__ void __launch_bounds__(kSkinnyThreads, 2)
    SkinnyLinearKernel(const __grid_constant__ SkinnyParams<T> params,
                       const __grid_constant__ Epilogue epilogue) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  __shared__ float warp_sums[kMultiplyWarps];
  SkinnyBlock<T, Epilogue> block(params, epilogue, shared_bytes);
  if (threadIdx.x == 0) block.InitBarriers();
  __syncthreads();
  int warp = threadIdx.x / kWarpSize;
  if (warp == kCopyWarp) {
    block.Copy();
  } else if (warp == kFinishWarp) {
    block.Finish();
  } else {
    if (params.x == nullptr) block.NormalizeTokens(warp_sums);
    block.Multiply();
  }
#endif
}

}  // namespace tidal
