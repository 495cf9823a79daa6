// The product of a few tokens with a weight: bound by reading the weight once, at memory speed.
//
// One block for each SM. Eight warps multiply, each on stages of its own: 16 weight rows by kChunk
// inputs, with the tokens' inputs beside them, copied asynchronously; the first weights before the
// kernel in front has ended, since they do not depend on it. They use the tensor cores: weight rows
// are the 16 rows of an mma, tokens its 8 columns. A ninth warp adds up their parts of a tile in a
// fixed order and finishes it (the Epilogue: bias, residual, SiLU, rotation and append).
//
// With kNormed the inputs are an RmsNorm of hidden states, made on the way through a block's first
// tile: each hidden state is multiplied by the norm's weight and kept in shared memory for the
// other tiles, where the same lane needs it again (a tile's chunks are a multiple of the warps);
// the sums of squares fall off, and the results are scaled.
//
// Inside an mma the order of the inputs does not matter as long as both sides agree: a lane takes 8
// neighbouring inputs of a row with one 16-byte load, and they serve as the k of two mma.
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/dependent_launch.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/shared_barrier.cuh"
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
  const T* x;            // [T, K]; with kNormed: RmsNorm of the next three
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
//   Lane: the finishing warp's state, made from (epilogue, lane) when the kernel in front has
//   ended:
//     Begin(tile): starts what can be read before the results are there, and
//     Finish(tile, values): lane l holds rows l / 4 of the first and the second 8, for tokens
//     2 (l % 4) and 2 (l % 4) + 1: values[0], [1] of the first, [2], [3] of the second.

template <typename T, typename Epilogue, bool kNormed>
class SkinnyBlock {
 public:
  __device__ SkinnyBlock(const SkinnyParams<T>& params, const Epilogue& epilogue,
                         unsigned char* shared)
      : p_(params), epilogue_(epilogue), shared_(shared) {
    num_chunks_ = (p_.num_inputs + kChunk - 1) / kChunk;
    int first = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    num_tiles_ = (p_.num_tiles - first + blocks - 1) / blocks;
    tile_full_ = reinterpret_cast<SharedBarrier*>(shared + p_.layout.Barriers());
    tile_empty_ = tile_full_ + p_.layout.num_tile_buffers;
  }

  // By one thread.
  __device__ void InitBarriers() {
    for (int buffer = 0; buffer < p_.layout.num_tile_buffers; ++buffer) {
      InitBarrier(tile_full_ + buffer, static_cast<uint32_t>(p_.layout.num_parts) * kWarpSize);
      InitBarrier(tile_empty_ + buffer, kWarpSize);
    }
  }

  // A multiplying warp: every kMultiplyWarps-th chunk of the block's tiles, through stages of its
  // own. Where its part of a tile stands among the others is given by its chunks alone, so sums do
  // not depend on which warp had them.
  __device__ void Multiply() {
    int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    int num_stages = p_.layout.num_stages, stage_bytes = p_.layout.StageBytes();
    // Stages are named by pointers carried along: for an offset of stage x bytes, which is the same
    // in all threads, ptxas 13.0 encodes copies under an L2 policy as illegal instructions.
    unsigned char* const first_stage = shared_ + warp * num_stages * stage_bytes;
    unsigned char* const end_of_stages = first_stage + num_stages * stage_bytes;
    Cursor ahead(num_chunks_, warp);  // of the next copy
    for (unsigned char* stage = first_stage; stage != end_of_stages; stage += stage_bytes) {
      CopyWeight(ahead, stage, lane);
      CommitCopies();
      ahead.Next();
    }
    WaitForPreviousKernel();
    LetNextKernelStart();
    Cursor inputs(num_chunks_, warp);
    for (unsigned char* stage = first_stage; stage != end_of_stages; stage += stage_bytes) {
      CopyInputs(inputs, stage, lane);
      CommitCopies();
      inputs.Next();
    }

    float sums[2][4] = {}, sum_of_squares = 0.0f;
    unsigned char* stage = first_stage;
    for (Cursor at(num_chunks_, warp); at.tile < num_tiles_;) {
      WaitOldest(num_stages);
      __syncwarp();  // for all lanes
      if (kNormed && at.tile == 0) {
        sum_of_squares = __fadd_rn(sum_of_squares, MakeInputs(at, stage, lane));
      }
      MultiplyStage(at, stage, lane, sums);
      __syncwarp();  // all are done with the stage
      CopyWeight(ahead, stage, lane);
      CopyInputs(ahead, stage, lane);
      CommitCopies();
      ahead.Next();
      int tile = at.tile, chunk = at.chunk;
      at.Next();
      if (at.tile != tile) {
        int part = chunk % kMultiplyWarps;
        if (kNormed && tile == 0) HandInSquares(part, lane, sum_of_squares);
        HandIn(tile, part, lane, sums);
      }
      stage += stage_bytes;
      if (stage == end_of_stages) stage = first_stage;
    }
  }

  // The finishing warp.
  __device__ void Finish() {
    int lane = threadIdx.x % kWarpSize, num_buffers = p_.layout.num_tile_buffers;
    WaitForPreviousKernel();
    typename Epilogue::Lane finisher(epilogue_, lane);
    float scales[2] = {1.0f, 1.0f};  // of this lane's two tokens
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
      if (kNormed && i == 0) {
        scales[0] = NormScale(lane % 4 * 2);
        scales[1] = NormScale(lane % 4 * 2 + 1);
      }
      Arrive(tile_empty_ + buffer);
      const float values[4] = {total.x * scales[0], total.y * scales[1], total.z * scales[0],
                               total.w * scales[1]};
      finisher.Finish(tile, values);
    }
  }

 private:
  // A place in a warp's sequence of chunks. The block's chunks, tile by tile, are dealt to its
  // warps in turn.
  struct Cursor {
    int num_chunks;  // of a tile
    int tile = 0;    // the block's tile-th
    int chunk;       // of the tile

    __device__ Cursor(int chunks, int warp) : num_chunks(chunks), chunk(warp) { Carry(); }
    __device__ void Next() {
      chunk += kMultiplyWarps;
      Carry();
    }
    __device__ void Carry() {
      while (chunk >= num_chunks) {
        chunk -= num_chunks;
        ++tile;
      }
    }
  };

  // Until the oldest of num_stages groups of copies has landed.
  __device__ static void WaitOldest(int num_stages) {
    static_assert(kMinStages == 3 && kMaxStages == 6);
    if (num_stages == 6) {
      WaitCopies<5>();
    } else if (num_stages == 5) {
      WaitCopies<4>();
    } else if (num_stages == 4) {
      WaitCopies<3>();
    } else {
      WaitCopies<2>();
    }
  }

  // One float for each part and token.
  __device__ float* SquaresOf(int part, int token) const {
    return reinterpret_cast<float*>(shared_ + p_.layout.SumsOfSquares()) +
           part * static_cast<int>(kMaxSkinnyTokens) + token;
  }
  __device__ float4* Partial(int buffer, int part, int lane) const {
    return reinterpret_cast<float4*>(shared_ + p_.layout.Partials()) +
           (buffer * p_.layout.num_parts + part) * kWarpSize + lane;
  }

  // Starts the copies of a chunk of a tile's rows, two rows at a time: lane l has the l % 16-th 16
  // bytes of a row; for a first tile with kNormed of the norm's weights, too. Zeros past the ends
  // of rows and weight; nothing past the last tile.
  __device__ void CopyWeight(const Cursor& at, unsigned char* stage, int lane) {
    if (at.tile >= num_tiles_) return;
    TileRows rows = epilogue_.Rows(static_cast<int>(blockIdx.x + at.tile * gridDim.x));
    int piece = lane % 16, odd = lane / 16, input = at.chunk * kChunk + piece * 8;
    bool inside = input < p_.num_inputs;
    if (kNormed && at.tile == 0 && odd == 0) {
      unsigned char* norm =
          stage + kTileRows * kStageRowBytes + p_.num_tokens * kHiddenRowBytes + piece * 16;
      CopyAsync16(norm, inside ? p_.norm_weight + input : p_.norm_weight, inside);
    }
    unsigned char* target = stage + odd * kStageRowBytes + SwapHalves(odd, piece * 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int first = (half == 0 ? rows.first : rows.second) + odd;
      const T* source = p_.weight + int64_t{first} * p_.num_inputs + input;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        bool present = inside && first + 2 * pair < p_.num_outputs;
        CopyAsync16(target + (half * 4 + pair) * 2 * kStageRowBytes,
                    present ? source + int64_t{2 * pair} * p_.num_inputs : p_.weight, present,
                    policy_);
      }
    }
  }

  // Likewise the inputs of all tokens, 16 bytes a lane.
  __device__ void CopyInputs(const Cursor& at, unsigned char* stage, int lane) {
    if (at.tile >= num_tiles_ || (kNormed && at.tile > 0)) return;
    unsigned char* target = stage + kTileRows * kStageRowBytes;
    if constexpr (kNormed) {
      int input = at.chunk * kChunk + lane * 4;
      bool inside = input < p_.num_inputs;
      for (int token = 0; token < p_.num_tokens; ++token) {
        const float* source = p_.hidden + int64_t{token} * p_.num_inputs + input;
        CopyAsync16(target + token * kHiddenRowBytes + lane * 16, inside ? source : p_.hidden,
                    inside);
      }
    } else {
      int piece = lane % 16, input = at.chunk * kChunk + piece * 8;
      bool inside = input < p_.num_inputs;
      for (int token = lane / 16; token < p_.num_tokens; token += 2) {
        const T* source = p_.x + int64_t{token} * p_.num_inputs + input;
        CopyAsync16(target + token * kStageRowBytes + SwapHalves(token, piece * 16),
                    inside ? source : p_.x, inside);
      }
    }
  }

  __device__ void MultiplyStage(const Cursor& at, const unsigned char* stage, int lane,
                                float (&sums)[2][4]) {
    int group = lane / 4;  // weight row, and token
    const unsigned char* weights = stage + group * kStageRowBytes;
    const unsigned char* inputs =
        kNormed ? NormedRow(group, at.chunk) : stage + (kTileRows + group) * kStageRowBytes;
    bool present = group < p_.num_tokens;
#pragma unroll
    for (int step = 0; step < kChunk / kStepInputs; ++step) {
      int offset = SwapHalves(group, step * kStepInputs * 2 + lane % 4 * 16);
      uint4 low = *reinterpret_cast<const uint4*>(weights + offset);
      uint4 high = *reinterpret_cast<const uint4*>(weights + 8 * kStageRowBytes + offset);
      uint4 b = make_uint4(0, 0, 0, 0);
      if (present) b = *reinterpret_cast<const uint4*>(inputs + offset);
      MultiplyAdd<T>(sums[0], {low.x, high.x, low.y, high.y}, b.x, b.y);
      MultiplyAdd<T>(sums[1], {low.z, high.z, low.w, high.w}, b.z, b.w);
    }
  }

  // The inputs of a token and chunk, made by MakeInputs.
  __device__ unsigned char* NormedRow(int token, int chunk) const {
    return shared_ + p_.layout.Normed() + (token * num_chunks_ + chunk) * kStageRowBytes;
  }

  // Hidden states times norm weights, what this lane needs of them; what the norm divides by is the
  // same for a whole row and multiplies the results. Returns the sum of the squares.
  __device__ float MakeInputs(const Cursor& at, const unsigned char* stage, int lane) {
    int token = lane / 4;
    if (token >= p_.num_tokens) return 0.0f;
    const unsigned char* inputs = stage + kTileRows * kStageRowBytes;
    const auto* hidden = reinterpret_cast<const float*>(inputs + token * kHiddenRowBytes);
    const auto* norm = reinterpret_cast<const T*>(inputs + p_.num_tokens * kHiddenRowBytes);
    float squares = 0.0f;
#pragma unroll
    for (int step = 0; step < kChunk / kStepInputs; ++step) {
      int first = step * kStepInputs + lane % 4 * 8;
      float low[4], high[4], weights[8];
      LoadFloats<4>(hidden + first, low);
      LoadFloats<4>(hidden + first + 4, high);
      LoadFloats<8>(norm + first, weights);
      float products[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        squares = __fmaf_rn(low[i], low[i], __fmaf_rn(high[i], high[i], squares));
        products[i] = low[i] * weights[i];
        products[i + 4] = high[i] * weights[i + 4];
      }
      unsigned char* target = NormedRow(token, at.chunk) + SwapHalves(token, first * 2);
      StoreFloats<8>(reinterpret_cast<T*>(target), products);
    }
    return squares;
  }

  // Lanes 4 g to 4 g + 3 hold the squares of token g.
  __device__ void HandInSquares(int part, int lane, float squares) {
    squares = __fadd_rn(squares, __shfl_xor_sync(kFullWarp, squares, 1));
    squares = __fadd_rn(squares, __shfl_xor_sync(kFullWarp, squares, 2));
    if (lane % 4 == 0) *SquaresOf(part, lane / 4) = squares;
  }

  // 1 / sqrt(mean of squares + eps), once all parts of the first tile are handed in.
  __device__ float NormScale(int token) const {
    float sum = 0.0f;
    for (int part = 0; part < p_.layout.num_parts; ++part) {
      sum = __fadd_rn(sum, *SquaresOf(part, token));
    }
    return 1.0f / sqrtf(sum / static_cast<float>(p_.num_inputs) + p_.norm_eps);
  }

  // Leaves this warp's part of a tile to the finishing warp, and starts afresh.
  __device__ void HandIn(int tile, int part, int lane, float (&sums)[2][4]) {
    int num_buffers = p_.layout.num_tile_buffers;
    int buffer = tile % num_buffers, round = tile / num_buffers;
    if (round > 0) WaitBarrier(tile_empty_ + buffer, (round - 1) & 1);
    *Partial(buffer, part, lane) = make_float4(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1],
                                               sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]);
    Arrive(tile_full_ + buffer);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[0][i] = sums[1][i] = 0.0f;
  }

  const SkinnyParams<T>& p_;
  const Epilogue& epilogue_;
  unsigned char* shared_;
  uint64_t policy_ = EvictFirstPolicy();  // what other kernels will want stays in the L2
  SharedBarrier* tile_full_;              // [num_tile_buffers]: all parts of a tile are handed in
  SharedBarrier* tile_empty_;             // [num_tile_buffers]: they have been added up
  int num_chunks_;                        // of a tile
  int num_tiles_;                         // of this block
};

#endif

// grid: at most one block for each SM and tile; kSkinnyThreads threads.
template <typename T, typename Epilogue, bool kNormed>
__global__ void __launch_bounds__(kSkinnyThreads, 2)
    SkinnyLinearKernel(const __grid_constant__ SkinnyParams<T> params,
                       const __grid_constant__ Epilogue epilogue) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  SkinnyBlock<T, Epilogue, kNormed> block(params, epilogue, shared_bytes);
  if (threadIdx.x == 0) block.InitBarriers();
  __syncthreads();
  if (threadIdx.x / kWarpSize == kFinishWarp) {
    block.Finish();
  } else {
    block.Multiply();
  }
#endif
}

}  // namespace tidal
