// How a block of the skinny products divides its work and its shared memory (skinny_linear.cuh).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace tidal {

inline constexpr int64_t kMaxSkinnyTokens = 8;  // the N of one mma.m16n8k16
inline constexpr int64_t kMaxNormedTokens = 4;  // with an RmsNorm in front
inline constexpr int kTileRows = 16;            // weight rows of a tile: the M of one mma
inline constexpr int kChunk = 128;              // inputs of a stage
inline constexpr int kStepInputs = 32;          // inputs of two mma
inline constexpr int kMultiplyWarps = 8;
inline constexpr int kFinishWarp = kMultiplyWarps;
inline constexpr int kSkinnyThreads = (kMultiplyWarps + 1) * 32;
inline constexpr int kFragmentFloats = kTileRows * static_cast<int>(kMaxSkinnyTokens);
inline constexpr int kStageRowBytes = kChunk * 2;
inline constexpr int kHiddenRowBytes = kChunk * 4;
inline constexpr int kMinStages = 3;
inline constexpr int kMaxStages = 6;
inline constexpr int kStagesBeforeAttention = 3;

// Of a block; 1 KiB more is the system's. One product's block has an SM for itself: then the next
// product's blocks come when this one's end, SM by SM, and what they copy ahead fills the gap
// between the kernels.
inline constexpr int kMaxSharedBytes = 226 * 1024;

// The 16-byte loads of 8 lanes, 4 from each of two neighbouring rows, must not meet in a bank: odd
// rows have the halves of every 128 bytes swapped.
__host__ __device__ __forceinline__ int SwapHalves(int row, int byte_offset) {
  return byte_offset ^ ((row & 1) * 64);
}

// The dynamic shared memory of a block, in bytes.
//
// Who waits for a barrier must see every one of its phases: a parity tells only neighbours apart.
// So tiles with a part of every warp have two buffers, others one for each warp: then a warp takes
// part in the same buffers all the time.
struct SkinnyLayout {
  int num_stages;        // of each multiplying warp
  int input_bytes;       // of a stage, behind its weight rows
  int normed_bytes;      // inputs made from hidden states, of all chunks and tokens
  int num_parts;         // of a tile: chunks, but no more than warps
  int num_tile_buffers;  // tiles whose parts may wait for the finishing warp

  __host__ __device__ int StageBytes() const { return kTileRows * kStageRowBytes + input_bytes; }
  __host__ __device__ int Partials() const { return kMultiplyWarps * num_stages * StageBytes(); }
  __host__ __device__ int Normed() const {
    return Partials() + num_tile_buffers * num_parts * kFragmentFloats * 4;
  }
  // Of the tokens' hidden states, one for each part of a tile and token.
  __host__ __device__ int SumsOfSquares() const { return Normed() + normed_bytes; }
  __host__ __device__ int Barriers() const {
    return SumsOfSquares() + num_parts * static_cast<int>(kMaxSkinnyTokens) * 4;
  }
  __host__ __device__ int Total() const {
    return Barriers() + 2 * num_tile_buffers * static_cast<int>(sizeof(uint64_t));
  }
};

// The inputs of a chunk: of a normed product hidden states in float32 and norm weights.
inline int InputBytes(int num_tokens, bool normed) {
  return normed ? num_tokens * kHiddenRowBytes + kStageRowBytes : num_tokens * kStageRowBytes;
}

// As many stages as fit, at most max_stages.
inline SkinnyLayout MakeSkinnyLayout(int64_t num_inputs, int num_tokens, bool normed,
                                     int max_stages) {
  int num_chunks = static_cast<int>((num_inputs + kChunk - 1) / kChunk);
  int num_parts = std::min(num_chunks, kMultiplyWarps);
  SkinnyLayout layout = {.num_stages = max_stages,
                         .input_bytes = InputBytes(num_tokens, normed),
                         .normed_bytes = normed ? num_tokens * num_chunks * kStageRowBytes : 0,
                         .num_parts = num_parts,
                         .num_tile_buffers = num_parts == kMultiplyWarps ? 2 : kMultiplyWarps};
  while (layout.num_stages > kMinStages && layout.Total() > kMaxSharedBytes) --layout.num_stages;
  return layout;
}

}  // namespace tidal
