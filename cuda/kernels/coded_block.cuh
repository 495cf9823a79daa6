// What the products of a few tokens with a weight in codes share (skinny_block.cuh): bound by
// reading the codes once, at memory speed, where every instruction counts, as there are two to four
// times as many numbers in a byte as in 16 bits.
//
// So the copy engine brings the codes: a box of 8 rows by a chunk of inputs is one instruction of
// one lane. Each multiplying warp has stages of its own, and a barrier for each, which it makes
// itself (one thread took 1 to 2 us for all); the first codes are started before the kernel in
// front has ended. Scales of groups of inputs are copied into the same stage, by all lanes.
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/tensor_copy.cuh"
#include "kernels/skinny_block.cuh"

namespace tidal {

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

template <typename T, typename Epilogue, bool kNormed, typename Shape>
class CodedBlock : public SkinnyBlock<T, Epilogue, kNormed, Shape> {
  using Base = SkinnyBlock<T, Epilogue, kNormed, Shape>;
  using Base::epilogue_, Base::shared_, Base::num_tiles_, Base::num_groups_;

 public:
  using Base::p_, Base::num_chunks_, Base::HandInSquares, Base::SquaresOf;
  using Shape::kKind, Shape::kRowTiles, Shape::kTokenTiles, Shape::kWarps;
  using Shape::kRowBytes, Shape::kWeightBytes;
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

  // By one thread: those of the whole block.
  __device__ void InitBarriers() {
    Base::InitBarriers();
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

  // Reads the scales of a lane's rows, of both halves of a group's tiles; group: of inputs, among
  // those of the chunk. Tiles begin at even rows: of an odd one the upper 16 bits of the word that
  // it was copied in are its scale.
  __device__ void ReadScales(const Stage& stage, int group, int lane,
                             float2 (&scales)[kRowTiles]) const {
    auto read = [&](auto number) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const uint2 words = WordsOf(stage, group, m, lane);
        scales[m] = make_float2(number(words.x), number(words.y));
      }
    };
    const bool is_odd = lane / 4 % 2 != 0;
    const DType dtype = p_.weight_scales.dtype;
    if (dtype == DType::kBFloat16) {
      const uint32_t to_upper = is_odd ? 0x3244 : 0x1044;
      read([=](uint32_t word) { return __uint_as_float(__byte_perm(word, 0, to_upper)); });
    } else if (dtype == DType::kFloat16) {
      const uint32_t to_lower = is_odd ? 0x4432 : 0x4410;
      read([=](uint32_t word) {
        const uint32_t bits = __byte_perm(word, 0, to_lower);
        return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
      });
    } else {
      read([](uint32_t word) { return __uint_as_float(word); });
    }
  }
  // The zeros of the lane's rows of the m-th tile.
  __device__ uint2 ZerosOf(const Stage& stage, int group, int m, int lane) const {
    if (!HasZeros()) return make_uint2(8, 8);
    const uint2 words = WordsOf(stage, p_.weight_scales.groups_per_chunk + group, m, lane);
    const uint32_t byte = 0x4440 | static_cast<uint32_t>(lane / 4 % 4);
    return make_uint2(__byte_perm(words.x, 0, byte), __byte_perm(words.y, 0, byte));
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
  //   kCopiesInputs: whether they are copied stage by stage, by
  //   void Copy(at, stage);
  //   void Begin(warp): otherwise makes all of them;
  //   void Multiply(at, stage): adds what has landed;
  //   float4 Take(m, n): a fragment of what is added up of a group, which starts afresh.
  template <typename Products>
  __device__ void Multiply() {
    const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpSize, 0);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int num_stages = p_.layout.num_stages;
    Stage stage(warp, num_stages);
    Cursor at(num_chunks_, warp), ahead = at;  // ahead: of the next copy
    Boxes boxes;
    for (int i = lane; i < num_stages; i += kWarpSize) {
      InitBarrier(stage_full_ + stage.slot + i, 1 + (kLanesCopy<Products> ? kWarpSize : 0));
    }
    PublishBarriers();
    __syncwarp();
    for (int i = 0; i < num_stages; ++i) {
      CopyWeight(ahead, stage, lane, boxes);
      ahead.Next();
      stage.Next();
    }
    if constexpr (kNormed) FetchNorm(warp, lane);
    __syncthreads();  // the block's barriers are made
    WaitForPreviousKernel();
    LetNextKernelStart();
    Products products(*this, lane);
    products.Begin(warp);
    ahead = at;
    for (int i = 0; i < num_stages; ++i) {
      FinishCopies(products, ahead, stage);
      ahead.Next();
      stage.Next();
    }

    stage.parity = 0;
    while (IsInside(at)) {
      WaitBarrier(FullBarrier(stage), stage.parity);
      products.Multiply(at, stage);
      __syncwarp();  // all are done with the stage
      CopyWeight(ahead, stage, lane, boxes);
      FinishCopies(products, ahead, stage);
      ahead.Next();
      stage.Next();
      int group = at.group, part = at.chunk % kWarps;
      at.Next();
      if (at.group != group) {
        this->HandIn(group, part, lane, [&](int m, int n) { return products.Take(m, n); });
      }
    }
  }

  // Whether there is something to copy or to multiply.
  __device__ bool IsInside(const Cursor& at) const {
    return at.group < num_groups_;
  }

 private:
  static constexpr int kHalves = 2 * kRowTiles;          // of a group's tiles
  static constexpr int kRowsOfLane = (kHalves + 3) / 4;  // whose scales it copies

  // Whether the lanes copy something into every stage, which they then report to its barrier.
  template <typename Products>
  static constexpr bool kLanesCopy = kGrouped || Products::kCopiesInputs;

  // The rows of a group of tiles; those past the last tile are none.
  struct Boxes {
    int group = -1;
    int num_tiles;
    TileRows rows[kRowTiles];
    int scaled[kRowsOfLane];                   // rows whose scales this lane copies, and
    const unsigned char* scales[kRowsOfLane];  // where those of the first group lie
  };

  __device__ void FindRows(const Cursor& at, int lane, Boxes& boxes) const {
    boxes.group = at.group;
    boxes.num_tiles = NumTiles(at);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) boxes.rows[m] = RowsOf(at, m);
    if constexpr (kGrouped) {
      const WeightScales& scales = p_.weight_scales;
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i) {
        const int half = HalfOf(i, lane);
        const TileRows tile = RowsOf(at, half / 2);
        const int first = half % 2 == 0 ? tile.first : tile.second;
        boxes.scaled[i] = min(first + lane / 4, p_.num_outputs - 1);
        boxes.scales[i] = scales.scales + WordOf(int64_t{boxes.scaled[i]} * scales.scale_bytes());
      }
    }
  }
  // Lanes 4 g to 4 g + 3 copy those of the g-th rows of four halves of tiles, and of four more.
  __device__ static int HalfOf(int index, int lane) {
    return min(index * 4 + lane % 4, kHalves - 1);
  }

  // Starts the copies of a stage's part of a group's rows, codes and scales. Nothing past the last
  // tile, whose sums nobody takes; zeros past the ends of rows and weight.
  __device__ void CopyWeight(const Cursor& at, const Stage& stage, int lane, Boxes& boxes) {
    if (!IsInside(at)) return;
    if (at.group != boxes.group) FindRows(at, lane, boxes);
    if constexpr (kGrouped) CopyScales(at, stage, lane, boxes);
    if (!IsElected()) return;
    SharedBarrier* full = FullBarrier(stage);
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

  // Scales of 16 bits and zeros with their neighbours in a word of 4 bytes. Rows of scales are
  // multiples of 8 numbers.
  __device__ void CopyScales(const Cursor& at, const Stage& stage, int lane,
                             const Boxes& boxes) const {
    const WeightScales& s = p_.weight_scales;
    for (int group = 0; group < s.groups_per_chunk; ++group) {
      const int index = min(s.FirstGroup(at.chunk) + group, s.num_groups - 1);
      const int64_t first = int64_t{index} * p_.num_outputs;
      uint32_t* words = Set(stage, group) + lane / 4 * kHalves;
      uint32_t* zeros = words + s.groups_per_chunk * (Shape::kScaleBytes / 4);
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i) {
        CopyAsync4(words + HalfOf(i, lane), boxes.scales[i] + first * s.scale_bytes());
        if (HasZeros()) {
          CopyAsync4(zeros + HalfOf(i, lane), s.zeros + first + WordOf(boxes.scaled[i]));
        }
      }
    }
  }
  __device__ static int64_t WordOf(int64_t byte) {
    return byte / 4 * 4;
  }
  __device__ bool HasZeros() const {
    return kKind == WeightKind::kInt4 && p_.weight_scales.zeros != nullptr;
  }
  // [8 rows, halves of a group's tiles] words.
  __device__ uint32_t* Set(const Stage& stage, int index) const {
    unsigned char* first = shared_ + p_.layout.Scales() + stage.slot * p_.layout.scale_bytes;
    return reinterpret_cast<uint32_t*>(first + index * Shape::kScaleBytes);
  }
  __device__ uint2 WordsOf(const Stage& stage, int set, int m, int lane) const {
    return *reinterpret_cast<const uint2*>(Set(stage, set) + lane / 4 * kHalves + m * 2);
  }

  // Then all of a stage is under way.
  template <typename Products>
  __device__ void FinishCopies(const Products& products, const Cursor& at,
                               const Stage& stage) const {
    if (!IsInside(at)) return;
    if constexpr (Products::kCopiesInputs) products.Copy(at, stage);
    if constexpr (kLanesCopy<Products>) ArriveWithCopies(FullBarrier(stage));
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
  constexpr int kFirstFinisher = Block::kWarps * kWarpSize;
  if (threadIdx.x == kFirstFinisher) block.InitBarriers();
  if (threadIdx.x >= kFirstFinisher) {
    __syncthreads();
    block.Finish();
  } else {
    block.template Multiply<Products>();
  }
}

#endif

}  // namespace tidal
