// How a block of the skinny products divides its work and its shared memory (skinny_linear.cuh).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace tidal {

inline constexpr int64_t kMaxSkinnyTokens = 8;  // the N of one mma.m16n8k16
inline constexpr int kTileRows = 16;            // weight rows of a tile: the M of one mma
inline constexpr int kChunk = 256;              // inputs of a stage
inline constexpr int kStepInputs = 32;          // inputs of two mma
inline constexpr int kMultiplyWarps = 8;
inline constexpr int kCopyWarp = kMultiplyWarps;
inline constexpr int kFinishWarp = kMultiplyWarps + 1;
inline constexpr int kSkinnyThreads = (kMultiplyWarps + 2) * 32;
inline constexpr int kFragmentFloats = kTileRows * static_cast<int>(kMaxSkinnyTokens);

// 64 bytes of padding put neighbouring rows into different halves of the banks: the 16-byte loads
// of 8 lanes, 4 from each of two rows, do not collide.
inline constexpr int kRowPadding = 64;
inline constexpr int kStageRowBytes = kChunk * 2 + kRowPadding;

// The dynamic shared memory of a block, in bytes.
//
// Who waits for a barrier must see every one of its phases: a parity tells only neighbours apart.
// So the number of stages is a multiple of kMultiplyWarps, which gives each stage a warp of its
// own, and tiles with a part of every warp have two buffers, others one for each warp, which then
// takes part in the same buffers all the time.
struct SkinnyLayout {
  int num_stages;
  int stage_rows;        // kTileRows, and the tokens if their inputs are streamed
  int normed_tokens;     // 0 if the inputs are streamed
  int normed_row_bytes;  // with padding
  int num_parts;         // of a tile: chunks, but no more than warps
  int num_tile_buffers;  // tiles whose parts may wait for the finishing warp

  __host__ __device__ int StageBytes() const { return stage_rows * kStageRowBytes; }
  __host__ __device__ int Partials() const { return num_stages * StageBytes(); }
  __host__ __device__ int Normed() const {
    return Partials() + num_tile_buffers * num_parts * kFragmentFloats * 4;
  }
  __host__ __device__ int Barriers() const { return Normed() + normed_tokens * normed_row_bytes; }
  __host__ __device__ int Total() const {
    return Barriers() + 2 * (num_stages + num_tile_buffers) * static_cast<int>(sizeof(uint64_t));
  }
};

// What a block of ours may take so that two share an SM of 228 KiB, or one has it alone; 1 KiB of
// each is the system's, some bytes are static.
inline constexpr int kSharedOfTwo = 112 * 1024;
inline constexpr int kSharedOfOne = 226 * 1024;

// With num_stages 0 if the inputs do not fit.
inline SkinnyLayout MakeSkinnyLayout(int64_t num_inputs, int num_tokens, bool normed) {
  SkinnyLayout layout = {};
  layout.stage_rows = kTileRows + (normed ? 0 : num_tokens);
  layout.normed_tokens = normed ? num_tokens : 0;
  layout.normed_row_bytes = static_cast<int>(num_inputs) * 2 + kRowPadding;
  layout.num_parts =
      static_cast<int>(std::min<int64_t>((num_inputs + kChunk - 1) / kChunk, kMultiplyWarps));
  layout.num_tile_buffers = layout.num_parts == kMultiplyWarps ? 2 : kMultiplyWarps;
  int round_bytes = kMultiplyWarps * (layout.StageBytes() + 2 * static_cast<int>(sizeof(uint64_t)));
  int fixed = layout.Total();
  int rounds = (kSharedOfTwo - fixed) / round_bytes;
  if (rounds < 1) rounds = std::max(kSharedOfOne - fixed, 0) / round_bytes;
  layout.num_stages = rounds * kMultiplyWarps;
  return layout;
}

}  // namespace tidal
