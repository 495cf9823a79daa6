// How a block of the skinny products divides its work and its shared memory (skinny_linear.cuh).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace tidal {

inline constexpr int kTileTokens = 8;            // the N of one mma.m16n8k16
inline constexpr int kTileRows = 16;             // weight rows of a tile: the M of one mma
inline constexpr int64_t kMaxSkinnyTokens = 16;  // of the streaming kernels
inline constexpr int64_t kMaxNormedTokens = 4;   // with an RmsNorm in front
inline constexpr int kChunk = 128;               // inputs that one warp sums up at a time
inline constexpr int kStepInputs = 32;           // inputs of two mma
inline constexpr int kMultiplyWarps = 8;
inline constexpr int kFragmentFloats = kTileRows * kTileTokens;
inline constexpr int kHiddenRowBytes = kChunk * 4;
inline constexpr int kMaxStages = 6;
inline constexpr int kStagesBeforeAttention = 3;

// Of a block; 1 KiB more is the system's. One product's block has an SM for itself: then the next
// product's blocks come when this one's end, SM by SM, and what they copy ahead fills the gap
// between the kernels.
inline constexpr int kMaxSharedBytes = 226 * 1024;

inline constexpr int kChunkBytes = kChunk * 2;  // of one row

// The 16-byte loads of 8 lanes, 4 from each of two neighbouring rows, must not meet in a bank: odd
// rows have the halves of every 128 bytes swapped.
__host__ __device__ __forceinline__ int SwapHalves(int row, int byte_offset) {
  return byte_offset ^ ((row & 1) * 64);
}

// What a block's warps work on at a time. The inputs of more tokens are shared by more tiles of
// weight rows, a group of them, so that they stay the smaller part of what is copied; a group has a
// finishing warp for each of its row tiles. Every output is the same sum, in the same order, for
// every width.
template <int kTokens>
struct SkinnyShape {
  static constexpr int kTokenTiles = kTokens / kTileTokens;
  static constexpr int kRowTiles = kTokenTiles;                             // of a group
  static constexpr int kWeightBytes = kRowTiles * kTileRows * kChunkBytes;  // of a stage
  static constexpr int kPartFloats = kRowTiles * kTokenTiles * kFragmentFloats;
  static constexpr int kThreads = (kMultiplyWarps + kRowTiles) * 32;
  static constexpr int kMinStages = kTokens > kTileTokens ? 2 : 3;
};

// The dynamic shared memory of a block, in bytes.
//
// Who waits for a barrier must see every one of its phases: a parity tells only neighbours apart.
// So there are as many buffers for groups as bring each warp back to the buffers that it had.
struct SkinnyLayout {
  int num_stages;    // of each multiplying warp
  int stage_bytes;   // weight rows, and inputs behind them
  int normed_bytes;  // inputs made from hidden states, of all chunks and tokens
  int num_parts;     // of a group: chunks, but no more than warps
  int part_bytes;
  int num_buffers;  // groups whose parts may wait for the finishing warps

  __host__ __device__ int Partials() const { return kMultiplyWarps * num_stages * stage_bytes; }
  __host__ __device__ int Normed() const {
    return Partials() + num_buffers * num_parts * part_bytes;
  }
  // Of the tokens' hidden states, one for each part of a group and token.
  __host__ __device__ int SumsOfSquares() const { return Normed() + normed_bytes; }
  __host__ __device__ int Barriers() const { return SumsOfSquares() + num_parts * kTileTokens * 4; }
  __host__ __device__ int Total() const {
    return Barriers() + 2 * num_buffers * static_cast<int>(sizeof(uint64_t));
  }
};

// The inputs of a chunk: of a normed product hidden states in float32 and norm weights.
inline int InputBytes(int num_tokens, bool normed) {
  return normed ? num_tokens * kHiddenRowBytes + kChunkBytes : num_tokens * kChunkBytes;
}

// As many stages as fit, at most max_stages.
template <int kTokens>
SkinnyLayout MakeSkinnyLayout(int64_t num_inputs, int num_tokens, bool normed, int max_stages) {
  using Shape = SkinnyShape<kTokens>;
  int num_chunks = static_cast<int>((num_inputs + kChunk - 1) / kChunk);
  int num_parts = std::min(num_chunks, kMultiplyWarps);
  SkinnyLayout layout = {
      .num_stages = max_stages,
      .stage_bytes = Shape::kWeightBytes + InputBytes(num_tokens, normed),
      .normed_bytes = normed ? num_tokens * num_chunks * kChunkBytes : 0,
      .num_parts = num_parts,
      .part_bytes = Shape::kPartFloats * 4,
      .num_buffers = num_parts == kMultiplyWarps
                         ? 2
                         : std::max(2, kMultiplyWarps / std::gcd(kMultiplyWarps, num_chunks))};
  while (layout.num_stages > Shape::kMinStages && layout.Total() > kMaxSharedBytes) {
    --layout.num_stages;
  }
  return layout;
}

// --- for more tokens: tiled_linear.cuh ---

inline constexpr int kBlockTiles = 8;           // of rows: 128 weight rows of a block
inline constexpr int kBlockTokens = 64;         // likewise
inline constexpr int kAnyWidth = kBlockTokens;  // as the number of tokens of a kernel
inline constexpr int kTiledThreads = 256;
inline constexpr int kTiledStages = 4;
inline constexpr int kTiledStageBytes = (kBlockTiles * kTileRows + kBlockTokens) * kChunkBytes;
inline constexpr int kTiledSharedBytes = kTiledStages * kTiledStageBytes;
static_assert(kTiledSharedBytes <= kMaxSharedBytes);

}  // namespace tidal
