// What the kernels of skinny products share, whatever a weight is kept as: how tiles are dealt to
// blocks and chunks of them to warps, and what becomes of the parts that these sum up.
//
// One block for each SM. Some warps multiply (skinny_linear.cuh, coded_linear.cuh,
// int4_linear.cuh); further warps add up their parts of a tile and finish it (the Epilogue: bias,
// residual, SiLU, rotation and append). The tensor cores multiply: weight rows are the 16 rows of
// an mma, tokens its 8 columns.
//
// The sum behind an output is made in an order that the number of inputs alone decides: of every
// eighth chunk a part (in two accumulators, over alternate inputs), and the eight parts by pairs
// (AddTree). Of weights in codes there are sixteen parts. It does not depend on how many tokens
// there are, nor on which of them it is for; tiled_linear.cuh has the same for more tokens. The
// sums of int4_linear.cuh, for a few tokens, are others (SkinnyRun::in_one_order).
//
// With kNormed the inputs are an RmsNorm of hidden states, made on the way through a block's first
// tile: each hidden state is multiplied by the norm's weight and kept in shared memory for the
// other tiles, of which the same warp has the same chunks (a tile's are a multiple of the warps);
// the sums of squares fall off, and the results are scaled. Of more tokens than find room for that,
// folded_norm.cu makes the same inputs and scales.
#pragma once

#include <cstdint>
#include <utility>

#include "common/dependent_launch.cuh"
#include "common/reduce.cuh"
#include "common/shared_barrier.cuh"
#include "kernels/folded_norm.cuh"
#include "kernels/skinny_layout.h"
#include "kernels/skinny_sums.cuh"
#include "kernels/weight_codes.cuh"

namespace tidal {

template <typename T>
struct SkinnyParams {
  const unsigned char* weight;  // [N, K], as the kernel's WeightKind says
  WeightScales weight_scales;   // unless kHalf
  int num_outputs;              // N
  int num_inputs;               // K
  int num_tokens;               // 1 to the kernel's kTokens
  int num_tiles;                // of all blocks together
  const T* x;                   // [T, K]; with kNormed: RmsNorm of the next three
  const float* hidden;          // [T, K]
  const T* norm_weight;         // [K]
  float norm_eps;
  const float* scales;  // [T]: of the tokens' results; null: 1
  SkinnyLayout layout;
};

// The weight rows of a tile: 8 from `first` on and 8 from `second` on.
struct TileRows {
  int first;
  int second;
};

// Returns the scale that another kernel left for a token, or 1.
template <typename T>
__device__ __forceinline__ float GivenScale(const SkinnyParams<T>& params, int token) {
  return params.scales == nullptr || token >= params.num_tokens ? 1.0f : params.scales[token];
}

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// What an Epilogue offers:
//   TileRows Rows(int tile) const;
//   Lane: the finishing warp's state for 8 tokens, made from (epilogue, lane, first token) when the
//   kernel in front has ended:
//     Started Begin(tile): starts what can be read before the results are there, and
//     Finish(tile, started, values): lane l holds rows l / 4 of the first and the second 8, for
//     tokens 2 (l % 4) and 2 (l % 4) + 1: values[0], [1] of the first, [2], [3] of the second.

template <typename T, typename Epilogue, bool kNormed, typename Shape>
class SkinnyBlock : public Shape {
 protected:
  using Shape::kKind, Shape::kRowTiles, Shape::kTokenTiles, Shape::kWarps;
  static_assert(!kNormed || kTokenTiles == 1);

 public:
  __device__ SkinnyBlock(const SkinnyParams<T>& params, const Epilogue& epilogue,
                         unsigned char* shared)
      : p_(params), epilogue_(epilogue), shared_(shared) {
    num_chunks_ = (p_.num_inputs + kChunk - 1) / kChunk;
    int first = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    num_tiles_ = (p_.num_tiles - first + blocks - 1) / blocks;
    num_groups_ = (num_tiles_ + kRowTiles - 1) / kRowTiles;
    group_full_ = reinterpret_cast<SharedBarrier*>(shared + p_.layout.Barriers());
    group_empty_ = group_full_ + p_.layout.num_buffers;
  }

  // By one thread.
  __device__ void InitBarriers() {
    for (int buffer = 0; buffer < p_.layout.num_buffers; ++buffer) {
      InitBarrier(group_full_ + buffer, static_cast<uint32_t>(p_.layout.num_parts) * kWarpSize);
      InitBarrier(group_empty_ + buffer, kRowTiles * kWarpSize);
    }
  }

  // A finishing warp.
  __device__ void Finish() { FinishWith(std::make_integer_sequence<int, kTokenTiles>()); }

 protected:
  // A place in a warp's sequence of stages. The block's chunks, group by group, are dealt to its
  // warps in turn.
  struct Cursor {
    int num_chunks;  // of a group
    int group = 0;   // the block's group-th
    int chunk;       // of the group

    __device__ Cursor(int chunks, int warp) : num_chunks(chunks), chunk(warp) { Carry(); }
    __device__ void Next() {
      chunk += kWarps;
      Carry();
    }
    __device__ void Carry() {
      while (chunk >= num_chunks) {
        chunk -= num_chunks;
        ++group;
      }
    }
    __device__ int FirstInput() const { return chunk * kChunk; }
  };

  // The number of the block's index-th tile among all.
  __device__ int TileOf(int index) const {
    return static_cast<int>(blockIdx.x + index * gridDim.x);
  }

  // One float for each part and token.
  __device__ float* SquaresOf(int part, int token) const {
    return reinterpret_cast<float*>(shared_ + p_.layout.SumsOfSquares()) + part * kTileTokens +
           token;
  }
  // A lane's fragment of a part of a group.
  __device__ float4* Partial(int buffer, int part, int row_tile, int token_tile, int lane) const {
    int fragment =
        ((buffer * p_.layout.num_parts + part) * kRowTiles + row_tile) * kTokenTiles + token_tile;
    return reinterpret_cast<float4*>(shared_ + p_.layout.Partials()) + fragment * kWarpSize + lane;
  }

  // Lanes 4 g to 4 g + 3 hold the squares of token g.
  __device__ void HandInSquares(int part, int lane, float squares) const {
    squares = AddSquaresOfLanes(squares);
    if (lane % 4 == 0) *SquaresOf(part, lane / 4) = squares;
  }

  // Returns a token's factor: that of its norm, once all parts of the first group are handed in.
  __device__ float ScaleOf(int token) const {
    if constexpr (kNormed) {
      float sum = 0.0f;
      for (int part = 0; part < p_.layout.num_parts; ++part) {
        sum = __fadd_rn(sum, *SquaresOf(part, token));
      }
      return NormScale(sum, p_.num_inputs, p_.norm_eps);
    } else {
      return GivenScale(p_, token);
    }
  }

  // Leaves this warp's part of a group to the finishing warps: for each of its tiles the fragment
  // that take(row tile, token tile) returns.
  template <typename Take>
  __device__ void HandIn(int group, int part, int lane, const Take& take) {
    int buffer = BufferOf(group);
    if (group >= p_.layout.num_buffers) WaitBarrier(group_empty_ + buffer, ParityOf(group) ^ 1);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) *Partial(buffer, part, m, n, lane) = take(m, n);
    }
    Arrive(group_full_ + buffer);
  }

  // Buffers, a power of two of them, are used in turn: a group's, and which phase of its barriers.
  __device__ int BufferOf(int group) const {
    return group & (p_.layout.num_buffers - 1);
  }
  __device__ uint32_t ParityOf(int group) const {
    return (group & p_.layout.num_buffers) == 0 ? 0 : 1;
  }

  const SkinnyParams<T>& p_;
  const Epilogue& epilogue_;
  unsigned char* shared_;
  int num_chunks_;  // of a group
  int num_tiles_;   // of this block
  int num_groups_;  // of its tiles

 private:
  using Lane = typename Epilogue::Lane;

  template <int... kTiles>
  __device__ void FinishWith(std::integer_sequence<int, kTiles...>) {
    int lane = threadIdx.x % kWarpSize;
    int row_tile = static_cast<int>(threadIdx.x) / kWarpSize - kWarps;  // this warp's
    WaitForPreviousKernel();
    Lane finishers[] = {Lane(epilogue_, lane, kTiles * kTileTokens)...};
    float scales[kTokenTiles][2];  // of this lane's two tokens of each tile
    if constexpr (!kNormed) LoadScales(lane, scales);
    for (int group = 0; group < num_groups_; ++group) {
      int index = group * kRowTiles + row_tile, buffer = BufferOf(group);
      bool present = index < num_tiles_;
      float2 row_scales = present ? RowScales(TileOf(index), lane) : float2();
      typename Lane::Started started[kTokenTiles];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        if (present) started[n] = finishers[n].Begin(TileOf(index));
      }
      WaitBarrier(group_full_ + buffer, ParityOf(group));
      if constexpr (kNormed) {
        if (group == 0) LoadScales(lane, scales);
      }
      float4 totals[kTokenTiles];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        totals[n] = ScaleRows(AddParts(buffer, row_tile, n, lane), row_scales);
      }
      Arrive(group_empty_ + buffer);
      if (!present) continue;
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        float values[4];
        ScaleSums(totals[n], scales[n], values);
        finishers[n].Finish(TileOf(index), started[n], values);
      }
    }
  }

  // Scales of a tile's rows that this lane finishes, if there is one for each row.
  __device__ float2 RowScales(int tile, int lane) const {
    if constexpr (kKind == WeightKind::kFloat8) {
      const WeightScales& s = p_.weight_scales;
      TileRows rows = epilogue_.Rows(tile);
      int first = rows.first + lane / 4, second = rows.second + lane / 4;
      auto scale = [&](int row) {
        return row < p_.num_outputs ? ReadScale(s.scales + int64_t{row} * s.scale_bytes(), s.dtype)
                                    : 0.0f;
      };
      return make_float2(scale(first), scale(second));
    }
    return float2();
  }
  __device__ static float4 ScaleRows(const float4& sums, const float2& scales) {
    if constexpr (kKind != WeightKind::kFloat8) return sums;
    return make_float4(__fmul_rn(sums.x, scales.x), __fmul_rn(sums.y, scales.x),
                       __fmul_rn(sums.z, scales.y), __fmul_rn(sums.w, scales.y));
  }

  __device__ void LoadScales(int lane, float (&scales)[kTokenTiles][2]) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) scales[n][i] = ScaleOf(n * kTileTokens + lane % 4 * 2 + i);
    }
  }

  // All parts of a tile.
  __device__ float4 AddParts(int buffer, int row_tile, int token_tile, int lane) const {
    float4 parts[kWarps];
#pragma unroll
    for (int part = 0; part < kWarps; ++part) {
      parts[part] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (part < p_.layout.num_parts) {
        parts[part] = *Partial(buffer, part, row_tile, token_tile, lane);
      }
    }
    return AddTree(parts);
  }

  SharedBarrier* group_full_;   // [num_buffers]: all parts of a group are handed in
  SharedBarrier* group_empty_;  // [num_buffers]: they have been added up
};

#endif

}  // namespace tidal
