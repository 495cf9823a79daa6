// How a block of the skinny products divides its work and its shared memory (skinny_block.cuh).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "backend/op_args.h"

namespace tidal {

inline constexpr int kTileTokens = 8;            // the N of one mma.m16n8k16
inline constexpr int kTileRows = 16;             // weight rows of a tile: the M of one mma
inline constexpr int64_t kMaxSkinnyTokens = 16;  // of the streaming kernels
inline constexpr int64_t kMaxNormedTokens = 4;   // with an RmsNorm in front
inline constexpr int kChunk = 128;               // inputs that one warp sums up at a time
inline constexpr int kStepInputs = 32;           // inputs of two mma
inline constexpr int kMultiplyWarps = 8;         // of 16-bit weights
inline constexpr int kFragmentFloats = kTileRows * kTileTokens;
inline constexpr int kHiddenRowBytes = kChunk * 4;
inline constexpr int kMaxStages = 6;
inline constexpr int kStagesBeforeAttention = 3;

// A block's; 1 KiB more is the system's. One product's block has an SM for itself: then the next
// product's blocks come when this one's end, SM by SM, and what they copy ahead fills the gap
// between the kernels.
inline constexpr int kMaxSharedBytes = 227 * 1024;

inline constexpr int kChunkBytes = kChunk * 2;  // of a token's inputs, and of a 16-bit row

// Inputs in digits (int4_linear.cuh): of a token and chunk, and what belongs to them.
inline constexpr int kDigits = 3;
inline constexpr int kDigitBytes = kDigits * kChunk + 32;
inline constexpr int64_t kMaxDigitTokens = 4;

// How a kernel finds the weight's numbers.
enum class WeightKind : int32_t {
  kHalf,           // as they are, in 16 bits
  kFloat8,         // in 8 bits, with a scale for each row
  kFloat8Grouped,  // in 8 bits, with scales for groups of inputs
  kInt4,           // in 4 bits, likewise
  kMxfp4,          // of experts only: expert_mxfp4.cuh
};

__host__ __device__ constexpr int BitsOf(WeightKind kind) {
  return kind == WeightKind::kHalf ? 16 : kind == WeightKind::kInt4 ? 4 : 8;
}
__host__ __device__ constexpr bool IsGrouped(WeightKind kind) {
  return kind == WeightKind::kFloat8Grouped || kind == WeightKind::kInt4;
}

// The 16-byte loads of 8 lanes, 4 from each of two neighbouring rows, must not meet in a bank: odd
// rows have the halves of every 128 bytes swapped.
__host__ __device__ __forceinline__ int SwapHalves(int row, int byte_offset) {
  return byte_offset ^ ((row & 1) * 64);
}

// Tiles of weight rows that a block's warps work on at a time, unless digits are made.
constexpr int RowTilesOf(int tokens, WeightKind kind) {
  int token_tiles = tokens / kTileTokens;
  return kind == WeightKind::kHalf ? token_tiles : 2 / token_tiles;
}

// What a block's warps work on at a time. The inputs of more tokens, and those beside weights of
// fewer bits, are shared by more tiles of weight rows, a group of them, so that they stay the
// smaller part of what is copied; a group has a finishing warp for each of its row tiles. Codes
// take many instructions that wait for each other, so more warps share them, and with many tokens
// there is room for one tile only. Every output is the same sum, in the same order, for every
// width, but for inputs in digits.
template <int kTokens_, WeightKind kKind_ = WeightKind::kHalf,
          int kRowTiles_ = RowTilesOf(kTokens_, kKind_)>
struct SkinnyShape {
  static constexpr int kTokens = kTokens_;
  static constexpr WeightKind kKind = kKind_;
  static constexpr int kTokenTiles = kTokens / kTileTokens;
  static constexpr int kRowTiles = kRowTiles_;  // of a group
  static constexpr int kWarps = kKind == WeightKind::kHalf ? kMultiplyWarps : 2 * kMultiplyWarps;
  static constexpr int kRowBytes = kChunk * BitsOf(kKind) / 8;            // of a stage's rows
  static constexpr int kWeightBytes = kRowTiles * kTileRows * kRowBytes;  // of a stage
  static constexpr int kScaleBytes = kRowTiles * kTileRows * 4;           // of a group of inputs
  static constexpr int kPartFloats = kRowTiles * kTokenTiles * kFragmentFloats;
  static constexpr int kThreads = (kWarps + kRowTiles) * 32;
  static constexpr int kMinStages = kTokens > kTileTokens || kKind != WeightKind::kHalf ? 2 : 3;
  // Blocks that must find room for their registers in an SM, of 16-bit weights.
  static constexpr int kMinBlocks = kTokens > kTileTokens ? 1 : 2;
};

// The dynamic shared memory of a block, in bytes.
//
// Who waits for a barrier must see every one of its phases: a parity tells only neighbours apart.
// So there are as many buffers for groups as bring each warp back to the buffers that it had.
struct SkinnyLayout {
  int num_warps;       // that multiply
  int num_stages;      // of each of them
  int stage_bytes;     // weight rows, and behind those of 16 bits inputs
  int input_bytes;     // of a stage of codes, which lie apart
  int scale_bytes;     // likewise
  int stage_barriers;  // 1 for codes, of which one more is for the inputs made; else 0
  int made_bytes;      // inputs made by the block, of all chunks and tokens
  int num_parts;       // of a group: chunks, but no more than warps
  int part_bytes;
  int num_buffers;  // groups whose parts may wait for the finishing warps: a power of two

  __host__ __device__ int Inputs() const { return num_warps * num_stages * stage_bytes; }
  __host__ __device__ int Scales() const { return Inputs() + num_warps * num_stages * input_bytes; }
  __host__ __device__ int Partials() const {
    return Scales() + num_warps * num_stages * scale_bytes;
  }
  __host__ __device__ int Made() const { return Partials() + num_buffers * num_parts * part_bytes; }
  // Sums of squares of the tokens' hidden states, one for each part of a group and token.
  __host__ __device__ int SumsOfSquares() const { return Made() + made_bytes; }
  __host__ __device__ int Barriers() const { return SumsOfSquares() + num_parts * kTileTokens * 4; }
  __host__ __device__ int StageBarriers() const {
    return Barriers() + 2 * num_buffers * static_cast<int>(sizeof(uint64_t));
  }
  __host__ __device__ int Total() const {
    return StageBarriers() +
           (num_warps * num_stages + 1) * stage_barriers * static_cast<int>(sizeof(uint64_t));
  }
};

// What a product asks of a block's memory.
struct SkinnyNeeds {
  int64_t num_inputs;
  int num_tokens;
  bool normed;
  int max_stages;
  int scale_sets = 0;  // of a stage (ScaleSets)
  bool in_digits = false;
};

// The inputs of a chunk in a stage: of a normed product hidden states in float32 and norm weights,
// which the products of codes read at once, as those in digits.
inline int InputBytes(const SkinnyNeeds& needs, bool is_coded) {
  if (needs.in_digits) return 0;
  if (!needs.normed) return needs.num_tokens * kChunkBytes;
  return is_coded ? 0 : needs.num_tokens * kHiddenRowBytes + kChunkBytes;
}

// What a block makes of all inputs of a token and chunk.
inline int MadeBytes(const SkinnyNeeds& needs) {
  if (needs.in_digits) return kDigitBytes;
  return needs.normed ? kChunkBytes : 0;
}

// As many stages as fit, at most max_stages; a second buffer for groups only beside them.
template <typename Shape>
SkinnyLayout MakeSkinnyLayout(const SkinnyNeeds& needs) {
  int num_chunks = static_cast<int>((needs.num_inputs + kChunk - 1) / kChunk);
  int num_parts = std::min(num_chunks, Shape::kWarps);
  constexpr bool kCoded = Shape::kKind != WeightKind::kHalf;
  int input_bytes = InputBytes(needs, kCoded);
  SkinnyLayout layout = {
      .num_warps = Shape::kWarps,
      .num_stages = needs.max_stages,
      .stage_bytes = Shape::kWeightBytes + (kCoded ? 0 : input_bytes),
      .input_bytes = kCoded ? input_bytes : 0,
      .scale_bytes = needs.scale_sets * Shape::kScaleBytes,
      .stage_barriers = kCoded ? 1 : 0,
      .made_bytes = needs.num_tokens * num_chunks * MadeBytes(needs),
      .num_parts = num_parts,
      .part_bytes = Shape::kPartFloats * 4,
      .num_buffers = num_parts == Shape::kWarps
                         ? 2
                         : std::max(2, Shape::kWarps / std::gcd(Shape::kWarps, num_chunks))};
  while (layout.num_stages > Shape::kMinStages && layout.Total() > kMaxSharedBytes) {
    --layout.num_stages;
  }
  // Inputs in digits have narrower groups of tiles to go to instead.
  if (!needs.in_digits && num_parts == Shape::kWarps && layout.Total() > kMaxSharedBytes) {
    layout.num_buffers = 1;
  }
  return layout;
}

// Returns whether a coded weight's inputs have several groups.
inline bool IsGrouped(const Weight& weight) {
  return weight.is_coded() &&
         (weight.codes == WeightCodes::kInt4 || weight.group_size < weight.num_inputs());
}

// Calls fn(kind) with a WeightKind as a constant, which is never kMxfp4.
template <typename Fn>
void DispatchKind(const Weight& weight, const Fn& fn) {
  if (!weight.is_coded()) {
    fn(std::integral_constant<WeightKind, WeightKind::kHalf>());
  } else if (weight.codes == WeightCodes::kInt4) {
    fn(std::integral_constant<WeightKind, WeightKind::kInt4>());
  } else if (IsGrouped(weight)) {
    fn(std::integral_constant<WeightKind, WeightKind::kFloat8Grouped>());
  } else {
    fn(std::integral_constant<WeightKind, WeightKind::kFloat8>());
  }
}

// Groups of inputs in a chunk; 1 if they are as long or longer.
inline int GroupsPerChunk(const Weight& weight) {
  return weight.group_size < kChunk ? static_cast<int>(kChunk / weight.group_size) : 1;
}

// Sets of scales copied with a chunk's codes, and as many of zeros if there are any.
inline int ScaleSets(const Weight& weight) {
  return IsGrouped(weight) ? GroupsPerChunk(weight) * (weight.zeros ? 2 : 1) : 0;
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
