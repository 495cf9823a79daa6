// The product of a few tokens with a weight of 16 bits: bound by reading the weight once, at memory
// speed (skinny_block.cuh).
//
// Each multiplying warp works on stages of its own: rows of the weight by a chunk of inputs, with
// the tokens' inputs beside them, copied asynchronously; the first weights before the kernel in
// front has ended, since they do not depend on it.
//
// Inside an mma the order of the inputs does not matter as long as both sides agree: a lane takes 8
// neighbouring inputs of a row with one 16-byte load, and they serve as the k of two mma.
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "kernels/skinny_block.cuh"

namespace tidal {

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

template <typename T, typename Epilogue, bool kNormed, int kTokens>
class HalfBlock : public SkinnyBlock<T, Epilogue, kNormed, SkinnyShape<kTokens>> {
  using Base = SkinnyBlock<T, Epilogue, kNormed, SkinnyShape<kTokens>>;
  using Base::kRowTiles, Base::kTokenTiles, Base::kRowBytes, Base::kWeightBytes, Base::kWarps;
  using Base::p_, Base::epilogue_, Base::shared_, Base::num_chunks_, Base::num_tiles_,
      Base::num_groups_;
  using typename Base::Cursor;

 public:
  using Base::Base;

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
    float sum_of_squares = 0.0f;
    unsigned char* stage = first_stage;
    for (Cursor at(num_chunks_, warp); at.group < num_groups_;) {
      WaitOldest(num_stages);
      __syncwarp();  // for all lanes
      if (kNormed && at.group == 0) {
        sum_of_squares = __fadd_rn(sum_of_squares, MakeInputs(at, stage, lane));
      }
      MultiplyStage(at, stage, lane, sums);
      __syncwarp();  // all are done with the stage
      CopyWeight(ahead, stage, lane, sources);
      CopyInputs(ahead, stage, lane);
      CommitCopies();
      ahead.Next();
      int group = at.group, chunk = at.chunk;
      at.Next();
      if (at.group != group) {
        int part = chunk % kWarps;
        if (kNormed && group == 0) this->HandInSquares(part, lane, sum_of_squares);
        this->HandIn(group, part, lane, [&](int m, int n) { return TakePart(sums[m][n]); });
      }
      stage += stage_bytes;
      if (stage == end_of_stages) stage = first_stage;
    }
  }

 private:
  using Sums = TileSums[kRowTiles][kTokenTiles];

  // Until the oldest of num_stages groups of copies has landed.
  __device__ static void WaitOldest(int num_stages) {
    static_assert(Base::kMinStages >= 2 && kMaxStages == 6);
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

  // Where a lane copies from, for the tiles of a group.
  struct Sources {
    int group = -1;
    // The lane's first row of a tile, its 16 bytes of chunk 0.
    const unsigned char* rows[kRowTiles];
    int64_t to_second;  // bytes from the first half of a tile to the second
    int num_tiles;      // that are there
    bool are_whole;     // all of their rows are there
  };

  static constexpr int kRowLanes = kRowBytes / 16;  // that share a row, 16 bytes each
  static constexpr int kCopyRows = kWarpSize / kRowLanes;

  __device__ void FindSources(int group, int lane, Sources& sources) const {
    sources.group = group;
    sources.num_tiles = min(num_tiles_ - group * kRowTiles, kRowTiles);
    sources.are_whole = true;
    int64_t row_bytes = int64_t{p_.num_inputs} * 2;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      if (tile >= sources.num_tiles) break;
      TileRows rows = epilogue_.Rows(this->TileOf(group * kRowTiles + tile));
      sources.rows[tile] =
          p_.weight + (rows.first + lane / kRowLanes) * row_bytes + lane % kRowLanes * 16;
      sources.to_second = (rows.second - rows.first) * row_bytes;
      sources.are_whole = sources.are_whole && rows.second + kTileRows / 2 <= p_.num_outputs;
    }
  }

  // Starts the copies of a stage's part of a group's rows: a lane has 16 bytes of a row; for a
  // first group with kNormed of the norm's weights, too. Zeros past the ends of rows and weight;
  // nothing past the last tile, whose sums nobody takes.
  __device__ void CopyWeight(const Cursor& at, unsigned char* stage, int lane, Sources& sources) {
    if (at.group >= num_groups_) return;
    if (at.group != sources.group) FindSources(at.group, lane, sources);
    if (kNormed && at.group == 0) CopyNormWeight(at, stage, lane);
    int piece = lane % kRowLanes, row = lane / kRowLanes;
    bool inside = at.FirstInput() + piece * (kChunk / kRowLanes) < p_.num_inputs;
    unsigned char* target = stage + row * kRowBytes + SwapHalves(row, piece * 16);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      if (kRowTiles > 1 && tile >= sources.num_tiles) break;
      const unsigned char* source = sources.rows[tile] + at.chunk * kRowBytes;
      int num_rows = kTileRows / 2 - row;  // of a half, from this lane's on
      if (!sources.are_whole) {
        TileRows rows = epilogue_.Rows(this->TileOf(at.group * kRowTiles + tile));
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
    int64_t row_bytes = int64_t{p_.num_inputs} * 2;
#pragma unroll
    for (int below = 0; below < kTileRows / 2; below += kCopyRows) {
      bool present = inside && below < num_rows;
      CopyAsync16(target + below * kRowBytes, present ? source + below * row_bytes : p_.weight,
                  present, policy_);
    }
  }

  // By the lanes that copy the first 16-bit row of a token's inputs.
  __device__ void CopyNormWeight(const Cursor& at, unsigned char* stage, int lane) {
    if (lane >= kChunkBytes / 16) return;
    int input = at.FirstInput() + lane * 8;
    bool inside = input < p_.num_inputs;
    unsigned char* target = InputsOf(stage) + p_.num_tokens * kHiddenRowBytes + lane * 16;
    CopyAsync16(target, inside ? p_.norm_weight + input : p_.norm_weight, inside);
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

  __device__ void MultiplyStage(const Cursor& at, const unsigned char* stage, int lane,
                                Sums& sums) const {
    int row = lane / 4;  // of a tile's halves, and token of a tile
    const unsigned char* weights = stage + row * kRowBytes;
    const unsigned char* inputs =
        kNormed ? NormedRow(row, at.chunk) : InputsOf(stage) + row * kChunkBytes;
#pragma unroll
    for (int step = 0; step < kChunk / kStepInputs; ++step) {
      int offset = SwapHalves(row, step * kStepInputs * 2 + lane % 4 * 16);
      uint4 b[kTokenTiles];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        b[n] = make_uint4(0, 0, 0, 0);
        if (n * kTileTokens + row < p_.num_tokens) {
          b[n] = *reinterpret_cast<const uint4*>(inputs + n * kTileTokens * kChunkBytes + offset);
        }
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const unsigned char* tile = weights + m * kTileRows * kRowBytes + offset;
        uint4 low = *reinterpret_cast<const uint4*>(tile);
        uint4 high = *reinterpret_cast<const uint4*>(tile + kTileRows / 2 * kRowBytes);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          MultiplyStep<T>(low, high, b[n], sums[m][n]);
        }
      }
    }
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

  // Behind a stage's weights.
  // The inputs of a token and chunk, made from hidden states.
  __device__ unsigned char* NormedRow(int token, int chunk) const {
    return shared_ + p_.layout.Made() + (token * num_chunks_ + chunk) * kChunkBytes;
  }
  __device__ static unsigned char* InputsOf(unsigned char* stage) {
    return stage + kWeightBytes;
  }
  __device__ static const unsigned char* InputsOf(const unsigned char* stage) {
    return stage + kWeightBytes;
  }

  uint64_t policy_ = EvictFirstPolicy();  // what other kernels will want stays in the L2
};

#endif

// grid: at most one block for each SM and tile.
template <typename T, typename Epilogue, bool kNormed, int kTokens>
__global__ void __launch_bounds__(SkinnyShape<kTokens>::kThreads, SkinnyShape<kTokens>::kMinBlocks)
    SkinnyLinearKernel(const __grid_constant__ SkinnyParams<T> params,
                       const __grid_constant__ Epilogue epilogue) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  HalfBlock<T, Epilogue, kNormed, kTokens> block(params, epilogue, shared_bytes);
  if (threadIdx.x == 0) block.InitBarriers();
  __syncthreads();
  if (threadIdx.x / kWarpSize >= SkinnyShape<kTokens>::kWarps) {
    block.Finish();
  } else {
    block.Multiply();
  }
#endif
}

}  // namespace tidal
