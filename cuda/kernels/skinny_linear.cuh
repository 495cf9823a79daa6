// The product of a few tokens with a weight: bound by reading the weight once, at memory speed.
//
// One block for each SM. Some warps multiply, each on stages of its own: rows of the weight by a
// chunk of inputs, with the tokens' inputs beside them, copied asynchronously; the first weights
// before the kernel in front has ended, since they do not depend on it. They use the tensor cores:
// weight rows are the 16 rows of an mma, tokens its 8 columns. Further warps add up their parts of
// a tile and finish it (the Epilogue: bias, residual, SiLU, rotation and append).
//
// The sum behind an output is made in an order that the number of inputs alone decides: of every
// eighth chunk a part (in two accumulators, over alternate inputs), and the eight parts by pairs
// (AddTree). Of weights in codes there are sixteen parts. It does not depend on how many tokens
// there are, nor on which of them it is for; tiled_linear.cuh has the same for more tokens.
//
// With kNormed the inputs are an RmsNorm of hidden states, made on the way through a block's first
// tile: each hidden state is multiplied by the norm's weight and kept in shared memory for the
// other tiles, where the same lane needs it again (a tile's chunks are a multiple of the warps);
// the sums of squares fall off, and the results are scaled. Of more tokens than find room for that,
// folded_norm.cu makes the same inputs and scales.
//
// Inside an mma the order of the inputs does not matter as long as both sides agree: a lane takes 8
// neighbouring inputs of a row with one 16-byte load, and they serve as the k of two mma.
#pragma once

#include <cstdint>
#include <utility>

#include "common/async_copy.cuh"
#include "common/dependent_launch.cuh"
#include "common/reduce.cuh"
#include "common/shared_barrier.cuh"
#include "common/vec.cuh"
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

template <typename T, typename Epilogue, bool kNormed, int kTokens, WeightKind kKind>
class SkinnyBlock : SkinnyShape<kTokens, kKind> {
  using Shape = SkinnyShape<kTokens, kKind>;
  using Reader = WeightReader<T, kKind>;
  using Shape::kRowTiles, Shape::kTokenTiles, Shape::kRowBytes, Shape::kWeightBytes, Shape::kWarps;
  static_assert(!kNormed || kTokens == kTileTokens);
  using Lane = typename Epilogue::Lane;

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

  // A multiplying warp: every kWarps-th chunk of the block's groups, through stages of its
  // own. Where its part of a group stands among the others is given by its chunks alone, so sums do
  // not depend on which warp had them.
  __device__ void Multiply() {
    int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    int num_stages = p_.layout.num_stages, stage_bytes = p_.layout.stage_bytes;
    // Stages are named by pointers carried along: for an offset of stage x bytes, which is the same
    // in all threads, ptxas 13.0 encodes copies under an L2 policy as illegal instructions.
    unsigned char* const first_stage = shared_ + warp * num_stages * stage_bytes;
    unsigned char* const end_of_stages = first_stage + num_stages * stage_bytes;
    Cursor ahead(num_chunks_, warp);  // of the next copy
    Sources sources;
    for (unsigned char* stage = first_stage; stage != end_of_stages; stage += stage_bytes) {
      CopyWeight(ahead, stage, lane, sources);
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

    Sums sums = {};
    Totals totals = {};
    float sum_of_squares = 0.0f;
    unsigned char* stage = first_stage;
    for (Cursor at(num_chunks_, warp); at.group < num_groups_;) {
      WaitOldest(num_stages);
      __syncwarp();  // for all lanes
      if (kNormed && at.group == 0) {
        sum_of_squares = __fadd_rn(sum_of_squares, MakeInputs(at, stage, lane));
      }
      MultiplyStage(at, stage, lane, sums, totals);
      __syncwarp();  // all are done with the stage
      CopyWeight(ahead, stage, lane, sources);
      CopyInputs(ahead, stage, lane);
      CommitCopies();
      ahead.Next();
      int group = at.group, chunk = at.chunk;
      at.Next();
      if (at.group != group) {
        int part = chunk % kWarps;
        if (kNormed && group == 0) HandInSquares(part, lane, sum_of_squares);
        HandIn(group, part, lane, sums, totals);
      }
      stage += stage_bytes;
      if (stage == end_of_stages) stage = first_stage;
    }
  }

  // A finishing warp.
  __device__ void Finish() { FinishWith(std::make_integer_sequence<int, kTokenTiles>()); }

 private:
  static constexpr bool kGrouped = IsGrouped(kKind);
  static constexpr int kSteps = kChunk / kStepInputs;                 // of a stage
  static constexpr int kStepBytes = kStepInputs * BitsOf(kKind) / 8;  // of a row
  static constexpr int kLaneBytes = kStepBytes / 4;                   // of a step
  using Sums = TileSums[kRowTiles][kTokenTiles];
  using Totals = float4[kRowTiles][kTokenTiles];  // of groups of inputs, scaled; if kGrouped
  struct Zeros {
    uint32_t of[kRowTiles][2];  // of a group of inputs: of rows in both halves of a tile
    __device__ const uint32_t (&operator[](int m) const)[2] { return of[m]; }
  };

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

  // Until the oldest of num_stages groups of copies has landed.
  __device__ static void WaitOldest(int num_stages) {
    static_assert(Shape::kMinStages >= 2 && kMaxStages == 6);
    if (num_stages == 6) {
      WaitCopies<5>();
    } else if (num_stages == 5) {
      WaitCopies<4>();
    } else if (num_stages == 4) {
      WaitCopies<3>();
    } else if (num_stages == 3) {
      WaitCopies<2>();
    } else {
      WaitCopies<1>();
    }
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

  // Where a lane copies from, for the tiles of a group.
  struct Sources {
    int group = -1;
    // The lane's first row of a tile, its 16 bytes of chunk 0.
    const unsigned char* rows[kRowTiles];
    int64_t to_second;  // bytes from the first half of a tile to the second
    int num_tiles;      // that are there
    bool are_whole;     // all of their rows are there
    int scale_row;      // of the lane's run of scales; -1: none
  };

  static constexpr int kRowLanes = kRowBytes / 16;  // that share a row, 16 bytes each
  static constexpr int kCopyRows = kWarpSize / kRowLanes;

  __device__ void FindSources(int group, int lane, Sources& sources) const {
    sources.group = group;
    sources.num_tiles = min(num_tiles_ - group * kRowTiles, kRowTiles);
    sources.are_whole = true;
    sources.scale_row = -1;
    int64_t row_bytes = BytesOfInputs(p_.num_inputs);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      if (tile >= sources.num_tiles) break;
      TileRows rows = epilogue_.Rows(TileOf(group * kRowTiles + tile));
      sources.rows[tile] =
          p_.weight + (rows.first + lane / kRowLanes) * row_bytes + lane % kRowLanes * 16;
      sources.to_second = (rows.second - rows.first) * row_bytes;
      sources.are_whole = sources.are_whole && rows.second + kTileRows / 2 <= p_.num_outputs;
      if constexpr (kGrouped) {
        if (lane / 2 % kRowTiles != tile) continue;
        int row = lane % 2 == 0 ? rows.first : rows.second;
        sources.scale_row = row < p_.num_outputs ? row : -1;
      }
    }
  }

  // Starts the copies of a stage's part of a group's rows: a lane has 16 bytes of a row; for a
  // first group with kNormed of the norm's weights, too. Zeros past the ends of rows and weight;
  // nothing past the last tile, whose sums nobody takes.
  __device__ void CopyWeight(const Cursor& at, unsigned char* stage, int lane, Sources& sources) {
    if (at.group >= num_groups_) return;
    if (at.group != sources.group) FindSources(at.group, lane, sources);
    if (kNormed && at.group == 0) CopyNormWeight(at, stage, lane);
    if constexpr (kGrouped) CopyScales(at, stage, lane, sources.scale_row);
    int piece = lane % kRowLanes, row = lane / kRowLanes;
    bool inside = at.FirstInput() + piece * (kChunk / kRowLanes) < p_.num_inputs;
    unsigned char* target = stage + row * kRowBytes + Reader::Place(row, piece * 16);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      if (kRowTiles > 1 && tile >= sources.num_tiles) break;
      const unsigned char* source = sources.rows[tile] + at.chunk * kRowBytes;
      int num_rows = kTileRows / 2 - row;  // of a half, from this lane's on
      if (!sources.are_whole) {
        TileRows rows = epilogue_.Rows(TileOf(at.group * kRowTiles + tile));
        CopyHalf(target, source, min(num_rows, p_.num_outputs - rows.first - row), inside);
        num_rows = min(num_rows, p_.num_outputs - rows.second - row);
      } else {
        CopyHalf(target, source, num_rows, inside);
      }
      CopyHalf(target + kTileRows / 2 * kRowBytes, source + sources.to_second, num_rows, inside);
      target += kTileRows * kRowBytes;
    }
  }

  // Half a tile's part, every kCopyRows-th row.
  __device__ void CopyHalf(unsigned char* target, const unsigned char* source, int num_rows,
                           bool inside) const {
    int64_t row_bytes = BytesOfInputs(p_.num_inputs);
#pragma unroll
    for (int below = 0; below < kTileRows / 2; below += kCopyRows) {
      bool present = inside && below < num_rows;
      CopyAsync16(target + below * kRowBytes, present ? source + below * row_bytes : p_.weight,
                  present, policy_);
    }
  }

  __device__ static int64_t BytesOfInputs(int inputs) {
    return int64_t{inputs} * BitsOf(kKind) / 8;
  }

  // By the lanes that copy the first 16-bit row of a token's inputs.
  __device__ void CopyNormWeight(const Cursor& at, unsigned char* stage, int lane) {
    if (lane >= kChunkBytes / 16) return;
    int input = at.FirstInput() + lane * 8;
    bool inside = input < p_.num_inputs;
    unsigned char* target = InputsOf(stage) + p_.num_tokens * kHiddenRowBytes + lane * 16;
    CopyAsync16(target, inside ? p_.norm_weight + input : p_.norm_weight, inside);
  }

  // A stage's scales [groups_per_chunk, rows of the group of tiles], then its zeros likewise: a run
  // of 8 rows, that is half a tile, which lies together in memory, for each lane.
  __device__ void CopyScales(const Cursor& at, unsigned char* stage, int lane, int row) {
    constexpr int kHalves = kRowTiles * 2, kHalfRows = kTileRows / 2;
    const WeightScales& s = p_.weight_scales;
    static_assert(kHalves * kSteps <= kWarpSize);
    if (lane >= s.groups_per_chunk * kHalves) return;
    int size = s.scale_bytes(), group = FirstGroup(at.chunk) + lane / kHalves;
    bool present = row >= 0 && group < s.num_groups;
    int64_t place = present ? int64_t{group} * p_.num_outputs + row : 0;
    unsigned char* target = stage + kWeightBytes + lane * kHalfRows * size;
    CopyAsync16(target, s.scales + place * size, present);
    if (size == 4) CopyAsync16(target + 16, s.scales + place * size + 16, present);
    if (s.zeros == nullptr) return;
    unsigned char* zeros = stage + kWeightBytes + s.groups_per_chunk * kHalves * kHalfRows * size;
    CopyAsync8(zeros + lane * kHalfRows, s.zeros + place, present);
  }

  // Returns the group of a chunk's first input.
  __device__ int FirstGroup(int chunk) const {
    const WeightScales& s = p_.weight_scales;
    return chunk * s.groups_per_chunk / s.chunks_per_group;
  }

  // Likewise the inputs of all tokens, 16 bytes a lane.
  __device__ void CopyInputs(const Cursor& at, unsigned char* stage, int lane) {
    if (at.group >= num_groups_ || (kNormed && at.group > 0)) return;
    unsigned char* target = InputsOf(stage);
    if constexpr (kNormed) {
      int input = at.FirstInput() + lane * 4;
      bool inside = input < p_.num_inputs;
      for (int token = 0; token < p_.num_tokens; ++token) {
        const float* source = p_.hidden + int64_t{token} * p_.num_inputs + input;
        CopyAsync16(target + token * kHiddenRowBytes + lane * 16, inside ? source : p_.hidden,
                    inside);
      }
    } else {
      constexpr int kRowLanes = kChunkBytes / 16, kRows = kWarpSize / kRowLanes;
      int piece = lane % kRowLanes, input = at.FirstInput() + piece * 8;
      bool inside = input < p_.num_inputs;
      for (int token = lane / kRowLanes; token < p_.num_tokens; token += kRows) {
        const T* source = p_.x + int64_t{token} * p_.num_inputs + input;
        CopyAsync16(target + token * kChunkBytes + SwapHalves(token, piece * 16),
                    inside ? source : p_.x, inside);
      }
    }
  }

  // What a lane reads of a stage.
  struct StageLane {
    const unsigned char* stage;
    const unsigned char* weights;  // this lane's row of the first tile
    const unsigned char* inputs;   // of its token of the first tile
    int row;                       // of a tile's halves, and token of a tile
    int quarter;                   // of the inputs of a step
  };

  __device__ void MultiplyStage(const Cursor& at, const unsigned char* stage, int lane, Sums& sums,
                                Totals& totals) const {
    int row = lane / 4;
    StageLane from = {stage, stage + row * kRowBytes,
                      kNormed ? NormedRow(row, at.chunk) : InputsOf(stage) + row * kChunkBytes, row,
                      lane % 4};
    if constexpr (kKind == WeightKind::kHalf) {
      MultiplySteps<kRowTiles, kSteps>(from, 0, Zeros{}, sums);
    } else if (num_tiles_ - at.group * kRowTiles >= kRowTiles) {
      MultiplyTiles<kRowTiles>(from, sums, totals);
    } else {
      MultiplyTiles<1>(from, sums, totals);
    }
  }

  // The first kTiles tiles of a group, by groups of inputs.
  template <int kTiles>
  __device__ void MultiplyTiles(const StageLane& from, Sums& sums, Totals& totals) const {
    static_assert(kTiles == 1 || kTiles == kRowTiles);
    if constexpr (!kGrouped) {
      MultiplySteps<kTiles, kSteps>(from, 0, Zeros{}, sums);
    } else if (p_.weight_scales.groups_per_chunk == 1) {
      MultiplyGroup<kTiles, kSteps>(from, 0, sums, totals);
    } else if (p_.weight_scales.groups_per_chunk == 2) {
#pragma unroll 1
      for (int group = 0; group < 2; ++group) {
        MultiplyGroup<kTiles, kSteps / 2>(from, group, sums, totals);
      }
    } else {
#pragma unroll 1
      for (int group = 0; group < kSteps; ++group) {
        MultiplyGroup<kTiles, 1>(from, group, sums, totals);
      }
    }
  }

  template <int kTiles, int kCount>
  __device__ void MultiplyGroup(const StageLane& from, int group, Sums& sums,
                                Totals& totals) const {
    Zeros zeros = {};
    LoadZeros(from.stage, group, from.row, zeros);
    MultiplySteps<kTiles, kCount>(from, group * kCount, zeros, sums);
    AddGroup(from.stage, group, from.row, sums, totals);
  }

  template <int kTiles, int kCount>
  __device__ void MultiplySteps(const StageLane& from, int first_step, const Zeros& zeros,
                                Sums& sums) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int step = first_step + i;
      int input_offset = SwapHalves(from.row, step * kStepInputs * 2 + from.quarter * 16);
      uint4 b[kTokenTiles];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        b[n] = make_uint4(0, 0, 0, 0);
        if (n * kTileTokens + from.row < p_.num_tokens) {
          b[n] = Reader::Order(*reinterpret_cast<const uint4*>(
              from.inputs + n * kTileTokens * kChunkBytes + input_offset));
        }
      }
      int offset = Reader::Place(from.row, step * kStepBytes + from.quarter * kLaneBytes);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const unsigned char* tile = from.weights + m * kTileRows * kRowBytes + offset;
        uint4 low = Reader::Load(tile, zeros[m][0]);
        uint4 high = Reader::Load(tile + kTileRows / 2 * kRowBytes, zeros[m][1]);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          MultiplyStep<T>(low, high, b[n], sums[m][n]);
        }
      }
    }
  }

  // The index-th run of a stage's scales or zeros, of a row in its half of a tile.
  __device__ static int RowOfRun(int group, int m, int half, int row) {
    return ((group * kRowTiles + m) * 2 + half) * (kTileRows / 2) + row;
  }

  // Loads the zeros of a stage's group-th group of inputs.
  __device__ void LoadZeros(const unsigned char* stage, int group, int row, Zeros& zeros) const {
    if constexpr (kKind == WeightKind::kInt4) {
      const WeightScales& s = p_.weight_scales;
      const unsigned char* stored =
          stage + kWeightBytes + s.groups_per_chunk * Shape::kGroupRows * s.scale_bytes();
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t zero = s.zeros == nullptr ? 8u : stored[RowOfRun(group, m, half, row)];
          zeros.of[m][half] = Int4Ops<T>::kIntegers + zero * 0x00010001u;
        }
      }
    }
  }

  // Adds what is summed up of a group of inputs to the totals, scaled, and starts afresh.
  __device__ void AddGroup(const unsigned char* stage, int group, int row, Sums& sums,
                           Totals& totals) const {
    const WeightScales& s = p_.weight_scales;
    const unsigned char* stored = stage + kWeightBytes;
    int size = s.scale_bytes();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      float low = ReadScale(stored + RowOfRun(group, m, 0, row) * size, s.dtype);
      float high = ReadScale(stored + RowOfRun(group, m, 1, row) * size, s.dtype);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        float4 part = TakePart(sums[m][n]);
        float4& total = totals[m][n];
        total = make_float4(__fmaf_rn(part.x, low, total.x), __fmaf_rn(part.y, low, total.y),
                            __fmaf_rn(part.z, high, total.z), __fmaf_rn(part.w, high, total.w));
      }
    }
  }

  // Behind a stage's weights and their scales.
  __device__ unsigned char* InputsOf(unsigned char* stage) const {
    return stage + kWeightBytes + (kGrouped ? p_.layout.scale_bytes : 0);
  }
  __device__ const unsigned char* InputsOf(const unsigned char* stage) const {
    return stage + kWeightBytes + (kGrouped ? p_.layout.scale_bytes : 0);
  }

  // The inputs of a token and chunk, made by MakeInputs.
  __device__ unsigned char* NormedRow(int token, int chunk) const {
    return shared_ + p_.layout.Normed() + (token * num_chunks_ + chunk) * kChunkBytes;
  }

  // Hidden states times norm weights, what this lane needs of them; what the norm divides by is the
  // same for a whole row and multiplies the results. Returns the sum of the squares.
  __device__ float MakeInputs(const Cursor& at, const unsigned char* stage, int lane) {
    int token = lane / 4;
    if (token >= p_.num_tokens) return 0.0f;
    const unsigned char* inputs = InputsOf(stage);
    const auto* hidden = reinterpret_cast<const float*>(inputs + token * kHiddenRowBytes);
    const auto* norm = reinterpret_cast<const T*>(inputs + p_.num_tokens * kHiddenRowBytes);
    float squares = 0.0f;
#pragma unroll
    for (int step = 0; step < kChunk / kStepInputs; ++step) {
      int first = step * kStepInputs + lane % 4 * 8;
      unsigned char* target = NormedRow(token, at.chunk) + SwapHalves(token, first * 2);
      FoldNorm(hidden + first, norm + first, reinterpret_cast<T*>(target), squares);
    }
    return squares;
  }

  // Lanes 4 g to 4 g + 3 hold the squares of token g.
  __device__ void HandInSquares(int part, int lane, float squares) {
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

  // Leaves this warp's part of a group to the finishing warp, and starts afresh.
  __device__ void HandIn(int group, int part, int lane, Sums& sums, Totals& totals) {
    int num_buffers = p_.layout.num_buffers;
    int buffer = group % num_buffers, round = group / num_buffers;
    if (round > 0) WaitBarrier(group_empty_ + buffer, (round - 1) & 1);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        if constexpr (kGrouped) {
          *Partial(buffer, part, m, n, lane) = totals[m][n];
          totals[m][n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        } else {
          *Partial(buffer, part, m, n, lane) = TakePart(sums[m][n]);
        }
      }
    }
    Arrive(group_full_ + buffer);
  }

  template <int... kTiles>
  __device__ void FinishWith(std::integer_sequence<int, kTiles...>) {
    int lane = threadIdx.x % kWarpSize, num_buffers = p_.layout.num_buffers;
    int row_tile = static_cast<int>(threadIdx.x) / kWarpSize - kWarps;  // this warp's
    WaitForPreviousKernel();
    Lane finishers[] = {Lane(epilogue_, lane, kTiles * kTileTokens)...};
    float scales[kTokenTiles][2];  // of this lane's two tokens of each tile
    if constexpr (!kNormed) LoadScales(lane, scales);
    for (int group = 0; group < num_groups_; ++group) {
      int index = group * kRowTiles + row_tile, buffer = group % num_buffers;
      bool present = index < num_tiles_;
      float2 row_scales = present ? RowScales(TileOf(index), lane) : float2();
      typename Lane::Started started[kTokenTiles];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        if (present) started[n] = finishers[n].Begin(TileOf(index));
      }
      WaitBarrier(group_full_ + buffer, (group / num_buffers) & 1);
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
        return row < p_.num_outputs ? ReadScale(s.scales + row * s.scale_bytes(), s.dtype) : 0.0f;
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

  const SkinnyParams<T>& p_;
  const Epilogue& epilogue_;
  unsigned char* shared_;
  uint64_t policy_ = EvictFirstPolicy();  // what other kernels will want stays in the L2
  SharedBarrier* group_full_;             // [num_buffers]: all parts of a group are handed in
  SharedBarrier* group_empty_;            // [num_buffers]: they have been added up
  int num_chunks_;                        // of a group
  int num_tiles_;                         // of this block
  int num_groups_;                        // of its tiles
};

#endif

// grid: at most one block for each SM and tile; kSkinnyThreads threads.
template <typename T, typename Epilogue, bool kNormed, int kTokens, WeightKind kKind>
__global__ void __launch_bounds__(SkinnyShape<kTokens, kKind>::kThreads,
                                  SkinnyShape<kTokens, kKind>::kMinBlocks)
    SkinnyLinearKernel(const __grid_constant__ SkinnyParams<T> params,
                       const __grid_constant__ Epilogue epilogue) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  SkinnyBlock<T, Epilogue, kNormed, kTokens, kKind> block(params, epilogue, shared_bytes);
  if (threadIdx.x == 0) block.InitBarriers();
  __syncthreads();
  if (threadIdx.x / kWarpSize >= SkinnyShape<kTokens, kKind>::kWarps) {
    block.Finish();
  } else {
    block.Multiply();
  }
#endif
}

}  // namespace tidal
