// The product of a few tokens with a weight in codes, which become numbers of 16 bits on the way to
// the tensor cores (coded_block.cuh).
//
// Inside an mma the order of the inputs does not matter as long as both sides agree. Of a chunk
// each of the four lanes of a row takes 32 neighbouring inputs, with loads of 16 bytes, and reads
// the tokens' inputs accordingly. Where scales change within a chunk, mmas must not mix their
// groups: there a step is 32 neighbouring inputs for all four.
#pragma once

#include <cstdint>

#include "kernels/coded_block.cuh"

namespace tidal {

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// For CodedBlock::Multiply.
template <typename T, typename Epilogue, bool kNormed, int kTokens, WeightKind kKind>
class NumberProducts {
 public:
  using Block = CodedBlock<T, Epilogue, kNormed, SkinnyShape<kTokens, kKind>>;
  using Cursor = typename Block::Cursor;
  using Stage = typename Block::Stage;
  static constexpr bool kCopiesInputs = !kNormed;

  __device__ NumberProducts(const Block& block, int lane)
      : b_(block), lane_(lane), row_(lane / 4), quarter_(lane % 4) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      int run = IsSpread() ? quarter_ * 4 + step : step * 4 + quarter_;
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        int token = min(n * kTileTokens + row_, b_.p_.num_tokens - 1);
        places_[step][n] = PlaceOfRun(run, token);
      }
    }
  }

  __device__ void Begin(int warp) {
    if constexpr (kNormed) b_.HandInSquares(warp, lane_, MakeInputs(warp));
  }

  // Starts the copies of all tokens' inputs, 16 bytes a lane.
  __device__ void Copy(const Cursor& at, const Stage& stage) const {
    constexpr int kRuns = kChunkBytes / 16, kRows = kWarpSize / kRuns;
    int index = lane_ % kRuns, input = at.FirstInput() + index * 8;
    bool inside = input < b_.p_.num_inputs;
    for (int token = lane_ / kRuns; token < b_.p_.num_tokens; token += kRows) {
      const T* source = b_.p_.x + int64_t{token} * b_.p_.num_inputs + input;
      CopyAsync16(b_.InputsOf(stage) + PlaceOfRun(index, token), inside ? source : b_.p_.x, inside);
    }
  }

  __device__ void Multiply(const Cursor& at, const Stage& stage) {
    const unsigned char* inputs = kNormed ? NormedInputs(at.chunk) : b_.InputsOf(stage);
    const unsigned char* codes = b_.CodesOf(stage) + row_ * Block::kRowBytes;
    Inputs x[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) LoadInputs(inputs, places_[step], x[step]);
    if (IsSpread()) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if (b_.HasTile(at, m)) {
          MultiplyChunk(codes + m * 2 * kBoxBytes, ZerosOf(stage, 0, m), x, sums_[m]);
        }
      }
      if constexpr (kGrouped) AddGroup(stage, 0);
    } else {
      const int steps = kSteps / b_.p_.weight_scales.groups_per_chunk;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          MultiplyStepInTurn(codes + m * 2 * kBoxBytes, step, ZerosOf(stage, step / steps, m),
                             x[step], sums_[m]);
        }
        if ((step + 1) % steps == 0) AddGroup(stage, step / steps);
      }
    }
  }

  __device__ float4 Take(int m, int n) {
    if constexpr (!kGrouped) return TakePart(sums_[m][n]);
    float4 total = totals_[m][n];
    totals_[m][n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    return total;
  }

 private:
  using Reader = WeightReader<T, kKind>;
  static constexpr int kRowTiles = Block::kRowTiles, kTokenTiles = Block::kTokenTiles;
  static constexpr int kBoxBytes = Block::kBoxBytes;
  static constexpr bool kGrouped = Block::kGrouped;
  static constexpr int kSteps = kChunk / kStepInputs;  // of a stage
  using Sums = TileSums[kTokenTiles];
  using Inputs = uint4[kTokenTiles];  // 8 of each of a lane's tokens

  // [T, 128] inputs of a chunk, as in a stage.
  __device__ unsigned char* NormedInputs(int chunk) const {
    return b_.MadeInputs() + chunk * b_.p_.num_tokens * kChunkBytes;
  }

  // Whether a lane takes 32 neighbouring inputs of a chunk.
  __device__ bool IsSpread() const {
    return !kGrouped || b_.p_.weight_scales.groups_per_chunk == 1;
  }

  // Where a token's index-th run of 8 inputs of a chunk lies. Copied runs stay together, and the
  // loads of 8 lanes, four runs of two tokens, meet in no bank, spread or in turn.
  __device__ static int PlaceOfRun(int index, int token) {
    int column = (index % 8) ^ (index / 8) ^ (token % 2 * 6);
    return token * kChunkBytes + index / 8 * 128 + column * 16;
  }

  __device__ static void LoadInputs(const unsigned char* inputs, const int (&places)[kTokenTiles],
                                    Inputs& x) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      x[n] = *reinterpret_cast<const uint4*>(inputs + places[n]);
      if constexpr (!kNormed) x[n] = Reader::Order(x[n]);
    }
  }

  // What is subtracted of the codes of a tile's rows in both halves, two in a register.
  __device__ uint2 ZerosOf(const Stage& stage, int group, int m) const {
    if constexpr (kKind != WeightKind::kInt4) return uint2();
    const uint2 zeros = b_.ZerosOf(stage, group, m, lane_);
    return make_uint2(Int4Ops<T>::kIntegers + zeros.x * 0x00010001u,
                      Int4Ops<T>::kIntegers + zeros.y * 0x00010001u);
  }

  // All of a chunk, a lane's 32 neighbouring inputs. codes: its row of a tile.
  __device__ void MultiplyChunk(const unsigned char* codes, const uint2& zeros,
                                const Inputs (&x)[kSteps], Sums& sums) const {
    constexpr int kRuns = Reader::kRunsOfLoad, kLoads = kSteps / kRuns;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const unsigned char* place = codes + Reader::Place(row_, quarter_ * kLoads + load) * 16;
      uint4 low = *reinterpret_cast<const uint4*>(place);
      uint4 high = *reinterpret_cast<const uint4*>(place + kBoxBytes);
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        MultiplyRows(Reader::Decode(Reader::Run(low, i), zeros.x),
                     Reader::Decode(Reader::Run(high, i), zeros.y), x[load * kRuns + i], sums);
      }
    }
  }

  // 32 neighbouring inputs of a chunk, of which a lane takes 8.
  __device__ void MultiplyStepInTurn(const unsigned char* codes, int step, const uint2& zeros,
                                     const Inputs& x, Sums& sums) const {
    using Codes = typename Reader::Codes;
    int byte = (step * 4 + quarter_) * static_cast<int>(sizeof(Codes));
    const unsigned char* place = codes + Reader::Place(row_, byte / 16) * 16 + byte % 16;
    const auto* low = reinterpret_cast<const Codes*>(place);
    const auto* high = reinterpret_cast<const Codes*>(place + kBoxBytes);
    MultiplyRows(Reader::Decode(*low, zeros.x), Reader::Decode(*high, zeros.y), x, sums);
  }

  __device__ static void MultiplyRows(const uint4& low, const uint4& high, const Inputs& x,
                                      Sums& sums) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) MultiplyStep<T>(low, high, x[n], sums[n]);
  }

  // Adds what is summed up of a chunk's group of inputs to the totals, scaled, and starts afresh.
  __device__ void AddGroup(const Stage& stage, int group) {
    float2 scales[kRowTiles];
    b_.ReadScales(stage, group, lane_, scales);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const float low = scales[m].x, high = scales[m].y;
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        float4 part = TakePart(sums_[m][n]);
        float4& total = totals_[m][n];
        total = make_float4(__fmaf_rn(part.x, low, total.x), __fmaf_rn(part.y, low, total.y),
                            __fmaf_rn(part.z, high, total.z), __fmaf_rn(part.w, high, total.w));
      }
    }
  }

  // Hidden states times norm weights, of this warp's chunks, which are those it multiplies
  // (FitsNorm); what the norm divides by is the same
  // for a whole row and multiplies the results. Returns the sum of this lane's squares.
  __device__ float MakeInputs(int warp) const {
    int token = lane_ / 4;
    float squares = 0.0f;
    for (int chunk = warp; chunk < b_.num_chunks_; chunk += Block::kWarps) {
      if (token >= b_.p_.num_tokens) break;
      float of_chunk = 0.0f;
      const float* hidden = b_.p_.hidden + int64_t{token} * b_.p_.num_inputs + chunk * kChunk;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        int index = i * 4 + lane_ % 4;
        auto* target = reinterpret_cast<uint4*>(NormedInputs(chunk) + PlaceOfRun(index, token));
        FoldNorm(hidden + index * 8, b_.p_.norm_weight + chunk * kChunk + index * 8,
                 reinterpret_cast<T*>(target), of_chunk);
        *target = Reader::Order(*target);
      }
      squares = __fadd_rn(squares, of_chunk);
    }
    __syncwarp();  // another lane takes them
    return squares;
  }

  const Block& b_;
  int lane_, row_, quarter_;         // row and quarter of the inputs that are the lane's
  int places_[kSteps][kTokenTiles];  // of its inputs; of the last token past that
  TileSums sums_[kRowTiles][kTokenTiles] = {};
  float4 totals_[kRowTiles][kTokenTiles] = {};  // of groups of inputs, scaled; if kGrouped
};

#endif

template <typename T, typename Epilogue, bool kNormed, int kTokens, WeightKind kKind>
__global__ void __launch_bounds__(SkinnyShape<kTokens, kKind>::kThreads, 1)
    CodedLinearKernel(const __grid_constant__ SkinnyParams<T> params,
                      const __grid_constant__ Epilogue epilogue,
                      const __grid_constant__ CUtensorMap weight) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  RunCodedBlock<NumberProducts<T, Epilogue, kNormed, kTokens, kKind>>(params, epilogue, weight,
                                                                      shared_bytes);
#endif
}

}  // namespace tidal
