// A decode warp's stages of shared memory, which it goes round in: a stage holds the K and V of a
// tile of tokens while they are worked on. Where a head is so long that there is room for too few
// of these, K and V take turns: a stage holds one of the two, and a tile takes two stages.
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/attended_tokens.cuh"
#include "common/mma.cuh"
#include "common/paged_kv.cuh"
#include "common/reduce.cuh"

namespace tidal {

// What a stage of a tile has: K, with V in the same stage if there is room, or V.
enum class TilePart { kKeys, kValues };

template <typename Stored, int kHeadDim, int kStages, DecodeReads kReads>
class DecodeStages {
 public:
  static constexpr int kTokens = kCopyTokens<Stored>;            // of a tile
  static constexpr int kOfTile = kTileStages<kHeadDim, kReads>;  // stages that a tile takes
  static constexpr int kTiles = kStageTiles<kHeadDim, kReads>;   // of K or V in a stage
  // Stages whose copies are under way at a time: all but that which is worked on. With fewer stages
  // than usual, which should hold all of a warp's tiles, all of them.
  static constexpr int kAhead = kStages < kDecodeStages<kHeadDim, kReads> ? kStages : kStages - 1;
  static constexpr int kTilesAhead = kAhead / kOfTile;
  static constexpr int kBytes =
      kStages * kTiles * kTokens * kPaddedDim<kHeadDim> * static_cast<int>(sizeof(Stored));

  // `shared`: kBytes, aligned to 128.
  __device__ __forceinline__ DecodeStages(unsigned char* shared, const PagedKvView<Stored>& kv)
      : shared_(reinterpret_cast<Stored*>(shared)),
        k_(kv.k),
        v_(kv.v),
        lane_(threadIdx.x % kWarpSize) {}

  // For the tile that begins in the stage, or the one whose V the stage has.
  __device__ __forceinline__ Stored* KeyTile(int stage) const {
    return shared_ + stage * kTiles * kTileElements;
  }
  __device__ __forceinline__ Stored* ValueTile(int stage) const {
    return KeyTile(stage) + (kTiles - 1) * kTileElements;
  }

  // Starts the copies of the first kTilesAhead tiles, without the tokens in late_row, the row that
  // the kernel in front may be writing. rows: as of Copy, of each tile; valid: a bit for each token
  // that there is.
  __device__ __forceinline__ void StartEarly(const int (&rows)[kTilesAhead + 1], int num_tiles,
                                             int late_row, unsigned (&valid)[kTilesAhead + 1]) {
#pragma unroll
    for (int tile = 0; tile < kTilesAhead; ++tile) {
      int row = rows[tile] == late_row ? -1 : rows[tile];
      Copy<TilePart::kKeys>(tile * kOfTile, tile < num_tiles, row);
      if constexpr (kOfTile == 2) Copy<TilePart::kValues>(tile * 2 + 1, tile < num_tiles, row);
      valid[tile] = __ballot_sync(kFullWarp, rows[tile] >= 0);
    }
  }

  // Brings in what StartEarly left out; the query's loads are under way meanwhile.
  __device__ __forceinline__ void CopyLate(const int (&rows)[kTilesAhead + 1], int late_row) {
    constexpr unsigned kLanes = kFullWarp >> (kWarpSize - kTokens);
    bool waited = false;
#pragma unroll
    for (int tile = 0; tile < kTilesAhead; ++tile) {
      // With tiles of 16 tokens lanes l and l + 16 have the same.
      unsigned late = __ballot_sync(kFullWarp, rows[tile] == late_row) & kLanes;
      if (late == 0) continue;
      if (!waited) {
        WaitCopies<0>();
        __syncwarp();  // the zeros that took the tokens' place are not written any more
        waited = true;
      }
      for (; late != 0; late &= late - 1) CopyToken(tile, __ffs(late) - 1, late_row);
    }
    if (waited) {
      CommitCopies();
      WaitCopies<0>();  // the main loop counts the groups of whole tiles; its barrier follows
    }
  }

  // Starts the copies of the part of the tile kTilesAhead after the one whose part is in `stage`.
  template <TilePart kPart>
  __device__ __forceinline__ void CopyNext(int stage, bool present, int row) {
    int target = stage + kAhead - kStages;
    Copy<kPart>(target < 0 ? target + kStages : target, present, row);
  }

 private:
  static constexpr int kTileElements = kTokens * kPaddedDim<kHeadDim>;
  static_assert(kAhead % kOfTile == 0, "whole tiles are under way");

  // Starts the copies into a stage, if its tile is `present`; one group, possibly empty. `row`: of
  // token lane % kTokens; -1 gives zeros.
  template <TilePart kPart>
  __device__ __forceinline__ void Copy(int stage, bool present, int row) {
    if (present) {
      if constexpr (kTiles == 2) {
        CopyTokens<Stored, kHeadDim>(KeyTile(stage), ValueTile(stage), k_, v_, row, policy_);
      } else {
        const Stored* source = kPart == TilePart::kKeys ? k_ : v_;
        CopyRows<Stored, kHeadDim>(KeyTile(stage), source, row, policy_);
      }
    }
    CommitCopies();
  }

  // Starts the copies of what is read of one token of a tile.
  __device__ __forceinline__ void CopyToken(int tile, int token, int row) {
    constexpr int kChunk = kElementsOfChunk<Stored>, kChunks = kHeadDim / kChunk;
    Stored* key = KeyTile(tile * kOfTile);
    Stored* value = ValueTile(tile * kOfTile + kOfTile - 1);
#pragma unroll
    for (int first = 0; first < kTiles * kOfTile * kChunks; first += kWarpSize) {
      int index = first + lane_;
      if (index < kTiles * kOfTile * kChunks) {
        int chunk = index % kChunks;
        int64_t source = int64_t{row} * kHeadDim + chunk * kChunk;
        int target = TileOffset<kHeadDim, Stored>(token, chunk);
        bool is_key = index < kChunks;
        CopyAsync16((is_key ? key : value) + target, (is_key ? k_ : v_) + source, true, policy_);
      }
    }
  }

  Stored* shared_;
  const Stored* k_;
  const Stored* v_;
  int lane_;
  uint64_t policy_ = EvictFirstPolicy();  // a cache row is read once a step
};

}  // namespace tidal
