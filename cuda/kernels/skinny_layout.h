// How a block of the skinny products divides its work and its shared memory (skinny_linear.cuh).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace tidal {

inline constexpr int64_t kMaxSkinnyTokens = 8;  // the N of one mma.m16n8k16
inline constexpr int kTileRows = 16;            // weight rows of a tile: the M of one mma
inline constexpr int kChunk = 128;              // inputs of a stage
inline constexpr int kStepInputs = 32;          // inputs of two mma
inline constexpr int kMultiplyWarps = 8;
inline constexpr int kFinishWarp = kMultiplyWarps;
inline constexpr int kSkinnyThreads = (kMultiplyWarps + 1) * 32;
inline constexpr int kFragmentFloats = kTileRows * static_cast<int>(kMaxSkinnyTokens);

// Of each multiplying warp: all but one are under way while it works on that one. 64 KB an SM are
// twice what 4.8 TB/s x 1 us of latency over 132 SMs asks for.
inline constexpr int kSkinnyStages = 3;
inline constexpr int kStageRowBytes = kChunk * 2;

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
  int stage_rows;        // kTileRows, and the tokens if their inputs are streamed
  int normed_tokens;     // 0 if the inputs are streamed
  int normed_row_bytes;  // whole chunks
  int num_parts;         // of a tile: chunks, but no more than warps
  int num_tile_buffers;  // tiles whose parts may wait for the finishing warp

  __host__ __device__ int StageBytes() const { return stage_rows * kStageRowBytes; }
  __host__ __device__ int Partials() const { return kMultiplyWarps * kSkinnyStages * StageBytes(); }
  __host__ __device__ int Normed() const {
    return Partials() + num_tile_buffers * num_parts * kFragmentFloats * 4;
  }
  __host__ __device__ int Barriers() const { return Normed() + normed_tokens * normed_row_bytes; }
  __host__ __device__ int Total() const {
    return Barriers() + 2 * num_tile_buffers * static_cast<int>(sizeof(uint64_t));
  }
};

inline constexpr int kMaxSharedBytes = 226 * 1024;  // of a block; 1 KiB more is the system's

inline SkinnyLayout MakeSkinnyLayout(int64_t num_inputs, int num_tokens, bool normed) {
  int num_chunks = static_cast<int>((num_inputs + kChunk - 1) / kChunk);
  int num_parts = std::min(num_chunks, kMultiplyWarps);
  return {.stage_rows = kTileRows + (normed ? 0 : num_tokens),
          .normed_tokens = normed ? num_tokens : 0,
          .normed_row_bytes = num_chunks * kStageRowBytes,
          .num_parts = num_parts,
          .num_tile_buffers = num_parts == kMultiplyWarps ? 2 : kMultiplyWarps};
}

}  // namespace tidal
