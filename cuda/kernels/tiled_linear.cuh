// The skinny products (skinny_linear.cuh) for more tokens, bit for bit: a block takes a tile of 128
// weight rows by 64 tokens, which its warps multiply stage by stage, chunk by chunk, all of a part
// one after the other. The parts may be shared out to the blocks of a cluster, so that short
// weights fill the device too; each block then finishes some fragments of the tile.
#pragma once

#include <cstdint>

#include "common/block_cluster.cuh"
#include "kernels/skinny_linear.cuh"

namespace tidal {

// Rows of the tokens' inputs one after the other.
template <typename T>
struct InputsInTurn {
  const T* x;
  int num_inputs;
  __device__ const T* Row(int token) const { return x + int64_t{token} * num_inputs; }
};

// Inputs: const T* Row(int token) const.
template <typename T, typename Epilogue, typename Inputs = InputsInTurn<T>>
class TiledBlock {
 public:
  __device__ TiledBlock(const SkinnyParams<T>& params, const Epilogue& epilogue,
                        const Inputs& inputs, unsigned char* shared)
      : p_(params),
        epilogue_(epilogue),
        inputs_(inputs),
        shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize) {
    num_chunks_ = (p_.num_inputs + kChunk - 1) / kChunk;
    num_parts_ = kMultiplyWarps / cluster_.size();
    first_part_ = cluster_.rank() * num_parts_;
    first_tile_ = static_cast<int>(blockIdx.y) * kBlockTiles;
  }

  // Multiplies the tokens from first_token on.
  __device__ void Run(int first_token) {
    first_token_ = first_token;
    Cursor ahead = FirstChunk();
#pragma unroll
    for (int stage = 0; stage < kTiledStages - 1; ++stage) {
      CopyWeight(ahead, stage);
      CommitCopies();
      Next(ahead);
    }
    WaitForPreviousKernel();
    LetNextKernelStart();
    Cursor inputs = FirstChunk();
#pragma unroll
    for (int stage = 0; stage < kTiledStages - 1; ++stage) {
      CopyInputs(inputs, stage);
      CommitCopies();
      Next(inputs);
    }

    Sums sums = {};
    Fragments held[kLevels] = {};
    int stage = 0, part = first_part_;
    for (Cursor at = FirstChunk(); IsInside(at); stage = NextStage(stage)) {
      WaitCopies<kTiledStages - 2>();
      __syncthreads();  // for all; and all are done with the stage before
      int target = stage == 0 ? kTiledStages - 1 : stage - 1;
      CopyWeight(ahead, target);
      CopyInputs(ahead, target);
      CommitCopies();
      Next(ahead);
      MultiplyStage(stage, sums);
      Next(at);
      if (at.part == part) continue;
      Fold(part - first_part_, sums, held);
      part = at.part;
    }
    // There may be parts without chunks.
    for (; part < first_part_ + num_parts_; ++part) Fold(part - first_part_, sums, held);
    Finish(held[kLevels - 1]);
  }

 private:
  static constexpr int kWarpTiles = 2;  // of rows: 4 x 2 warps share the tile
  static constexpr int kWarpTokenTiles = 4;
  static constexpr int kWarpFragments = kWarpTiles * kWarpTokenTiles;
  static constexpr int kBlockFragments = kWarpFragments * kTiledThreads / kWarpSize;
  static constexpr int kLevels = 4;  // of the tree of 8 parts, the sum included
  static constexpr int kWeightBytes = kBlockTiles * kTileRows * kChunkBytes;
  using Sums = TileSums[kWarpTiles][kWarpTokenTiles];
  using Fragments = float4[kWarpTiles][kWarpTokenTiles];

  struct Cursor {
    int part;
    int chunk;
  };
  __device__ Cursor FirstChunk() const {
    return {first_part_, first_part_};
  }
  __device__ bool IsInside(const Cursor& at) const {
    return at.part < first_part_ + num_parts_ && at.chunk < num_chunks_;
  }
  __device__ void Next(Cursor& at) const {
    at.chunk += kMultiplyWarps;
    if (at.chunk >= num_chunks_) at.chunk = ++at.part;
  }
  __device__ static int NextStage(int stage) {
    return stage == kTiledStages - 1 ? 0 : stage + 1;
  }

  __device__ unsigned char* StageOf(int stage) const {
    return shared_ + stage * kTiledStageBytes;
  }

  // A thread has 16 bytes of one row of each tile; zeros past the ends of rows and weight.
  __device__ void CopyWeight(const Cursor& at, int stage) {
    if (!IsInside(at)) return;
    constexpr int kPieces = kChunkBytes / 16;
    int piece = static_cast<int>(threadIdx.x) % kPieces;
    int row = static_cast<int>(threadIdx.x) / kPieces;  // of a tile
    int input = at.chunk * kChunk + piece * 8;
    unsigned char* target = StageOf(stage) + row * kChunkBytes + SwapHalves(row, piece * 16);
#pragma unroll
    for (int tile = 0; tile < kBlockTiles; ++tile) {
      TileRows rows = epilogue_.Rows(first_tile_ + tile);
      constexpr int kHalf = kTileRows / 2;
      int weight_row = row < kHalf ? rows.first + row : rows.second + row - kHalf;
      bool present =
          input < p_.num_inputs && first_tile_ + tile < p_.num_tiles && weight_row < p_.num_outputs;
      const T* weight = reinterpret_cast<const T*>(p_.weight);
      const T* source = weight + int64_t{weight_row} * p_.num_inputs + input;
      CopyAsync16(target + tile * kTileRows * kChunkBytes, present ? source : weight, present);
    }
  }

  __device__ void CopyInputs(const Cursor& at, int stage) {
    if (!IsInside(at)) return;
    constexpr int kPieces = kChunkBytes / 16, kRows = kTiledThreads / kPieces;
    int piece = static_cast<int>(threadIdx.x) % kPieces;
    int row = static_cast<int>(threadIdx.x) / kPieces;
    int input = at.chunk * kChunk + piece * 8;
    unsigned char* target =
        StageOf(stage) + kWeightBytes + row * kChunkBytes + SwapHalves(row, piece * 16);
#pragma unroll
    for (int below = 0; below < kBlockTokens; below += kRows) {
      int token = first_token_ + row + below;
      bool present = input < p_.num_inputs && token < p_.num_tokens;
      const T* source = present ? inputs_.Row(token) + input : p_.x;
      CopyAsync16(target + below * kChunkBytes, source, present);
    }
  }

  __device__ int FirstTileOf(int warp) const {
    return warp / 2 * kWarpTiles;
  }
  __device__ int FirstTokenOf(int warp) const {
    return warp % 2 * kWarpTokenTiles * kTileTokens;
  }

  __device__ void MultiplyStage(int stage, Sums& sums) const {
    int row = lane_ / 4;  // of a tile's halves, and token of a tile
    const unsigned char* weights =
        StageOf(stage) + (FirstTileOf(warp_) * kTileRows + row) * kChunkBytes;
    const unsigned char* inputs =
        StageOf(stage) + kWeightBytes + (FirstTokenOf(warp_) + row) * kChunkBytes;
#pragma unroll
    for (int step = 0; step < kChunk / kStepInputs; ++step) {
      int offset = SwapHalves(row, step * kStepInputs * 2 + lane_ % 4 * 16);
      uint4 b[kWarpTokenTiles];
#pragma unroll
      for (int n = 0; n < kWarpTokenTiles; ++n) {
        b[n] = *reinterpret_cast<const uint4*>(inputs + n * kTileTokens * kChunkBytes + offset);
      }
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        const unsigned char* tile = weights + m * kTileRows * kChunkBytes + offset;
        uint4 low = *reinterpret_cast<const uint4*>(tile);
        uint4 high = *reinterpret_cast<const uint4*>(tile + kTileRows / 2 * kChunkBytes);
#pragma unroll
        for (int n = 0; n < kWarpTokenTiles; ++n) {
          MultiplyStep<T>(low, high, b[n], sums[m][n]);
        }
      }
    }
  }

  // Takes the index-th part into the tree of AddTree, and starts afresh: held[i] is the sum of 2^i
  // parts that waits for as many more. The last of a block's parts makes the sum, in the last
  // place.
  __device__ void Fold(int index, Sums& sums, Fragments (&held)[kLevels]) const {
    bool is_last = index == num_parts_ - 1;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kWarpTokenTiles; ++n) {
        float4 sum = TakePart(sums[m][n]);
        bool is_held = false;
#pragma unroll
        for (int level = 0; level < kLevels - 1; ++level) {
          if (is_held) continue;
          if ((index >> level & 1) != 0) {
            sum = AddFragments(held[level][m][n], sum);
          } else if (!is_last) {
            held[level][m][n] = sum;
            is_held = true;
          }
        }
        if (is_last) held[kLevels - 1][m][n] = sum;
      }
    }
  }

  // The block's sums to shared memory, and from those of all blocks of the cluster to the epilogue.
  __device__ void Finish(const Fragments& sums) {
    WaitCopies<0>();
    __syncthreads();  // nobody needs the stages any more
    auto* own = reinterpret_cast<float4*>(shared_);
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kWarpTokenTiles; ++n) {
        own[(warp_ * kWarpFragments + m * kWarpTokenTiles + n) * kWarpSize + lane_] = sums[m][n];
      }
    }
    cluster_.Sync();
    int count = kBlockFragments / cluster_.size(), begin = cluster_.rank() * count;
    for (int i = warp_; i < count; i += kTiledThreads / kWarpSize) FinishFragment(begin + i);
    cluster_.ArriveAfterReads();
    cluster_.Wait();  // no block ends while others read its memory
  }

  __device__ void FinishFragment(int fragment) {
    int warp = fragment / kWarpFragments, in_warp = fragment % kWarpFragments;
    int tile = first_tile_ + FirstTileOf(warp) + in_warp / kWarpTokenTiles;
    int first_token = first_token_ + FirstTokenOf(warp) + in_warp % kWarpTokenTiles * kTileTokens;
    if (tile >= p_.num_tiles || first_token >= p_.num_tokens) return;
    typename Epilogue::Lane finisher(epilogue_, lane_, first_token);
    auto started = finisher.Begin(tile);
    float4* place = reinterpret_cast<float4*>(shared_) + fragment * kWarpSize + lane_;
    float4 parts[kMultiplyWarps];
#pragma unroll
    for (int rank = 0; rank < kMultiplyWarps; ++rank) {
      parts[rank] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (rank < cluster_.size()) parts[rank] = *cluster_.Map(place, rank);
    }
    float4 total = AddTree(parts);
    int token = first_token + lane_ % 4 * 2;
    const float scales[2] = {GivenScale(p_, token), GivenScale(p_, token + 1)};
    float values[4];
    ScaleSums(total, scales, values);
    finisher.Finish(tile, started, values);
  }

  const SkinnyParams<T>& p_;
  const Epilogue& epilogue_;
  const Inputs& inputs_;
  unsigned char* shared_;
  BlockCluster cluster_;
  int lane_;
  int warp_;
  int num_chunks_;  // of a row
  int first_part_;  // of this block
  int num_parts_;
  int first_token_ = 0;
  int first_tile_;
};

// grid (cluster size x tiles of 64 tokens, tiles of 128 rows); kTiledThreads threads. Those that
// read the same weight start together, so that it is read once.
template <typename T, typename Epilogue>
__global__ void __launch_bounds__(kTiledThreads, 1)
    TiledLinearKernel(const __grid_constant__ SkinnyParams<T> params,
                      const __grid_constant__ Epilogue epilogue) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  const InputsInTurn<T> inputs = {params.x, params.num_inputs};
  TiledBlock<T, Epilogue> block(params, epilogue, inputs, shared_bytes);
  block.Run(static_cast<int>(blockIdx.x) / BlockCluster().size() * kBlockTokens);
#endif
}

}  // namespace tidal
