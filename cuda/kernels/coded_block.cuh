// What the products of a few tokens with a weight in codes share (skinny_block.cuh): bound by
// reading the codes once, at memory speed, where every instruction counts, as there are two to four
// times as many numbers in a byte as in 16 bits.
//
// So the copy engine brings the codes: a box of 8 rows by a chunk of inputs is one instruction of
// one lane. Each multiplying warp has stages of its own, and a barrier for each; the first codes
// are started before the kernel in front has ended. Scales are read by each lane, a stage ahead.
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/tensor_copy.cuh"
#include "kernels/skinny_block.cuh"

namespace tidal {

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

template <typename T_, typename Epilogue, bool kNormed_, int kTokens, WeightKind kKind_>
class CodedBlock : public SkinnyBlock<T_, Epilogue, kNormed_, kTokens, kKind_> {
  using Base = SkinnyBlock<T_, Epilogue, kNormed_, kTokens, kKind_>;
  using Base::epilogue_, Base::shared_, Base::num_tiles_, Base::num_groups_;

 public:
  using T = T_;
  static constexpr bool kNormed = kNormed_;
  static constexpr WeightKind kKind = kKind_;
  using Base::kRowTiles, Base::kTokenTiles, Base::kRowBytes, Base::kWeightBytes, Base::kWarps;
  using Base::p_, Base::num_chunks_, Base::HandInSquares, Base::SquaresOf;
  using typename Base::Cursor;
  static constexpr bool kGrouped = IsGrouped(kKind);
  static constexpr int kHalfRows = kTileRows / 2;
  static constexpr int kBoxBytes = kHalfRows * kRowBytes;

  // weight: its codes [N, bytes of K inputs], in boxes of half a tile's rows by a chunk's bytes.
  __device__ CodedBlock(const SkinnyParams<T>& params, const Epilogue& epilogue,
                        const CUtensorMap& weight, unsigned char* shared)
      : Base(params, epilogue, shared), weight_(&weight) {
    stage_full_ = reinterpret_cast<SharedBarrier*>(shared + p_.layout.StageBarriers());
  }

  // By one thread. stage_arrivals: of a stage, besides the one with the codes.
  __device__ void InitBarriers(uint32_t stage_arrivals) {
    Base::InitBarriers();
    for (int stage = 0; stage < kWarps * p_.layout.num_stages; ++stage) {
      InitBarrier(stage_full_ + stage, 1 + stage_arrivals);
    }
    InitBarrier(InputsMade(), kWarps);
    PublishBarriers();
  }

  // One of a warp's stages, which are used in turn.
  struct Stage {
    int slot, first_slot, end_slot;  // among those of all warps
    uint32_t parity = 0;             // of its barrier's phase

    __device__ Stage(int warp, int num_stages)
        : slot(warp * num_stages), first_slot(slot), end_slot(slot + num_stages) {}
    __device__ void Next() {
      if (++slot < end_slot) return;
      slot = first_slot;
      parity ^= 1;
    }
  };
  // Boxes of half a tile.
  __device__ unsigned char* CodesOf(const Stage& stage) const {
    return shared_ + stage.slot * kWeightBytes;
  }
  // What a stage has room for besides.
  __device__ unsigned char* InputsOf(const Stage& stage) const {
    return shared_ + p_.layout.Inputs() + stage.slot * p_.layout.input_bytes;
  }
  __device__ SharedBarrier* FullBarrier(const Stage& stage) const {
    return stage_full_ + stage.slot;
  }
  // What the block makes of the inputs of all chunks.
  __device__ unsigned char* MadeInputs() const { return shared_ + p_.layout.Made(); }
  // All warps have made theirs.
  __device__ SharedBarrier* InputsMade() const {
    return stage_full_ + kWarps * p_.layout.num_stages;
  }

  // A lane's rows, of both halves of a group's tiles.
  struct Rows {
    int of[kRowTiles][2];
  };
  // As they are stored, of a group of inputs.
  struct Scales {
    uint32_t scale[kRowTiles][2];
    uint32_t zero[kRowTiles][2];
  };

  // Rows past the last are the last: nobody takes their sums.
  __device__ void FindRows(const Cursor& at, int lane, Rows& rows) const {
    if (!IsInside(at)) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      TileRows first = RowsOf(at, m);
      rows.of[m][0] = min(first.first + lane / 4, p_.num_outputs - 1);
      rows.of[m][1] = min(first.second + lane / 4, p_.num_outputs - 1);
    }
  }

  // The group of a chunk's first input.
  __device__ int FirstGroup(int chunk) const {
    return p_.weight_scales.FirstGroup(chunk);
  }

  // Reads those of a group of inputs.
  __device__ void LoadScales(int group, const Rows& rows, Scales& scales) const {
    const WeightScales& s = p_.weight_scales;
    const int64_t first = int64_t{min(group, s.num_groups - 1)} * p_.num_outputs;
    auto load = [&](auto type) {
      using Stored = decltype(type);
      const auto* stored = reinterpret_cast<const Stored*>(s.scales);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        scales.scale[m][0] = __ldg(stored + (first + rows.of[m][0]));
        scales.scale[m][1] = __ldg(stored + (first + rows.of[m][1]));
      }
    };
    if (s.dtype == DType::kFloat32) {
      load(uint32_t());
    } else {
      load(static_cast<unsigned short>(0));
    }
    if constexpr (kKind == WeightKind::kInt4) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        scales.zero[m][0] = s.zeros == nullptr ? 8u : __ldg(s.zeros + (first + rows.of[m][0]));
        scales.zero[m][1] = s.zeros == nullptr ? 8u : __ldg(s.zeros + (first + rows.of[m][1]));
      }
    }
  }

  // Calls fn(read), where read(scale) is the number that a scale as it is stored stands for.
  template <typename Fn>
  __device__ void WithScales(const Fn& fn) const {
    DType dtype = p_.weight_scales.dtype;
    if (dtype == DType::kBFloat16) {
      fn([](uint32_t scale) { return __uint_as_float(scale << 16); });
    } else if (dtype == DType::kFloat16) {
      fn([](uint32_t scale) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(scale)));
      });
    } else {
      fn([](uint32_t scale) { return __uint_as_float(scale); });
    }
  }

  // Into the L2 cache while the kernel in front still runs.
  __device__ void FetchNorm(int warp, int lane) const {
    constexpr int kLines = kChunkBytes / 128;
    for (int chunk = warp; chunk < num_chunks_; chunk += kWarps) {
      if (lane >= kLines) break;
      const T* line = p_.norm_weight + chunk * kChunk + lane * (kChunk / kLines);
      asm volatile("prefetch.global.L2 [%0];\n" ::"l"(line));
    }
  }

  // Whether a group's index-th tile is there.
  __device__ bool HasTile(const Cursor& at, int m) const {
    return m == 0 || m < NumTiles(at);
  }

  // A multiplying warp: every kWarps-th chunk of the block's groups, through stages of its own.
  // As HalfBlock, its part of a group is given by its chunks alone.
  //
  // What Products offers, made from (block, lane):
  //   kStageArrivals: of a stage's barrier, when inputs have landed;
  //   void Begin(first, first stage, warp): makes the inputs, or starts the first copies of them;
  //   void Copy(at, stage): starts those of a later stage;
  //   void Multiply(at, stage, rows, scales): adds what has landed;
  //   float4 Take(m, n): a fragment of what is added up of a group, which starts afresh.
  template <typename Products>
  __device__ void Multiply() {
    const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpSize, 0);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int num_stages = p_.layout.num_stages;
    Stage stage(warp, num_stages);
    Cursor at(num_chunks_, warp), ahead = at;  // ahead: of the next copy
    Boxes boxes;
    for (int i = 0; i < num_stages; ++i) {
      CopyCodes(ahead, stage, boxes);
      ahead.Next();
      stage.Next();
    }
    Rows rows = {};
    Scales scales;
    if constexpr (kGrouped) {
      FindRows(at, lane, rows);
      LoadScales(FirstGroup(at.chunk), rows, scales);
    }
    if constexpr (kNormed) FetchNorm(warp, lane);
    WaitForPreviousKernel();
    LetNextKernelStart();
    Products products(*this, lane);
    products.Begin(at, stage, warp);

    stage.parity = 0;
    while (IsInside(at)) {
      WaitBarrier(FullBarrier(stage), stage.parity);
      products.Multiply(at, stage, rows, scales);
      __syncwarp();  // all are done with the stage
      CopyCodes(ahead, stage, boxes);
      products.Copy(ahead, stage);
      ahead.Next();
      stage.Next();
      int group = at.group, part = at.chunk % kWarps;
      at.Next();
      if (at.group != group) {
        this->HandIn(group, part, lane, [&](int m, int n) { return products.Take(m, n); });
        if constexpr (kGrouped) FindRows(at, lane, rows);
      }
      if constexpr (kGrouped) LoadScales(FirstGroup(at.chunk), rows, scales);
    }
  }

  // Whether there is something to copy or to multiply.
  __device__ bool IsInside(const Cursor& at) const {
    return at.group < num_groups_;
  }

 private:
  // The rows of a group of tiles; those past the last tile are none.
  struct Boxes {
    int group = -1;
    int num_tiles;
    TileRows rows[kRowTiles];
  };

  // Starts the copies of a stage's part of a group's rows. Nothing past the last tile, whose sums
  // nobody takes; zeros past the ends of rows and weight.
  __device__ void CopyCodes(const Cursor& at, const Stage& stage, Boxes& boxes) {
    if (!IsInside(at)) return;
    if (at.group != boxes.group) {
      boxes.group = at.group;
      boxes.num_tiles = NumTiles(at);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) boxes.rows[m] = RowsOf(at, m);
    }
    if (!IsElected()) return;
    SharedBarrier* full = stage_full_ + stage.slot;
    ArriveExpecting(full, static_cast<uint32_t>(boxes.num_tiles * 2 * kBoxBytes));
    const int first_byte = at.chunk * kRowBytes;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (m > 0 && m >= boxes.num_tiles) break;
      unsigned char* target = CodesOf(stage) + m * 2 * kBoxBytes;
      CopyBox(target, weight_, full, first_byte, boxes.rows[m].first, policy_);
      CopyBox(target + kBoxBytes, weight_, full, first_byte, boxes.rows[m].second, policy_);
    }
  }

  // Tiles of a group that are there.
  __device__ int NumTiles(const Cursor& at) const {
    return min(num_tiles_ - at.group * kRowTiles, kRowTiles);
  }
  __device__ TileRows RowsOf(const Cursor& at, int m) const {
    return epilogue_.Rows(this->TileOf(at.group * kRowTiles + m));
  }

  const CUtensorMap* weight_;
  // [kWarps, num_stages]: its copies have landed; behind them InputsMade.
  SharedBarrier* stage_full_;
  uint64_t policy_ = EvictFirstPolicy();  // what other kernels will want stays in the L2
};

// grid: at most one block for each SM and tile.
template <typename Products, typename T, typename Epilogue>
__device__ void RunCodedBlock(const SkinnyParams<T>& params, const Epilogue& epilogue,
                              const CUtensorMap& weight, unsigned char* shared) {
  using Block = typename Products::Block;
  Block block(params, epilogue, weight, shared);
  if (threadIdx.x == 0) block.InitBarriers(Products::kStageArrivals);
  __syncthreads();
  if (threadIdx.x / kWarpSize >= Block::kWarps) {
    block.Finish();
  } else {
    block.template Multiply<Products>();
  }
}

#endif

}  // namespace tidal
