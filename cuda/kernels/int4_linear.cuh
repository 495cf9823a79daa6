// The product of up to four tokens with an int4 weight, by the tensor cores' integers: their bytes
// take three instructions for 8 codes, where numbers of 16 bits take seven and twice the mmas
// (coded_linear.cuh).
//
// A token's inputs of a chunk become integers of 23 bits under a power of two that is theirs, so
// what is lost is at most 2^-22 of the largest: nothing of bfloat16, where none is smaller by 2^14.
// They are written as three digits to the base of 256 from -128 to 127. A token has four columns of
// an mma: its digits, highest first, and the lowest again. The sums of a chunk are exact; times the
// scales they are added up in float32.
#pragma once

#include <cstdint>

#include "kernels/coded_block.cuh"

namespace tidal {

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// For CodedBlock::Multiply; of at most 2 kPairs tokens, and scales of whole chunks.
template <typename T, typename Epilogue, bool kNormed, int kPairs>
class DigitProducts {
 public:
  using Block = CodedBlock<T, Epilogue, kNormed, kTileTokens, WeightKind::kInt4>;
  using Cursor = typename Block::Cursor;
  using Stage = typename Block::Stage;
  using Rows = typename Block::Rows;
  using Scales = typename Block::Scales;
  static constexpr uint32_t kStageArrivals = 0;

  __device__ DigitProducts(const Block& block, int lane)
      : b_(block), lane_(lane), codes_(lane / 4 * Block::kRowBytes + lane % 4 * 16) {
    int column = lane / 4, digit = min(column % 4, kDigits - 1);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      digits_[pair] =
          PlaceOfToken(pair * 2 + column / 4) + digit * kChunk + lane % 4 * 32 + digit % 2 * 16;
      factors_[pair] = PlaceOfToken(pair * 2 + lane % 4 / 2) + kDigits * kChunk + lane % 2 * 8;
    }
  }

  __device__ void Begin(const Cursor&, const Stage&, int warp) const {
    MakeInputs(warp);
    __syncwarp();
    if (lane_ == 0) Arrive(b_.InputsMade());
    WaitBarrier(b_.InputsMade(), 0);
  }

  __device__ void Copy(const Cursor&, const Stage&) const {}

  __device__ void Multiply(const Cursor& at, const Stage& stage, const Rows&,
                           const Scales& scales) {
    const unsigned char* inputs = InputsOf(at.chunk);
    uint2 digits[kPairs][4];
    float2 factors[kPairs];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 x = *reinterpret_cast<const uint4*>(inputs + (digits_[pair] ^ (half * 16)));
        digits[pair][2 * half] = make_uint2(x.x, x.y);
        digits[pair][2 * half + 1] = make_uint2(x.z, x.w);
      }
      factors[pair] = *reinterpret_cast<const float2*>(inputs + factors_[pair]);
    }
    const unsigned char* codes = b_.CodesOf(stage) + codes_;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (!b_.HasTile(at, m)) break;
      const auto* place = reinterpret_cast<const uint4*>(codes + m * 2 * Block::kBoxBytes);
      const uint4 low = place[0], high = place[Block::kBoxBytes / 16];
      int sums[kPairs][4] = {};
#pragma unroll
      for (int run = 0; run < 4; ++run) {
        MultiplyRun(Reader::Run(low, run), Reader::Run(high, run), run, digits, sums);
      }
      AddChunk(m, sums, factors, scales);
    }
  }

  // Lanes 4 g to 4 g + 3 hold of row g the upper digits of a token, its lowest one, and the same of
  // the next token; a fragment has two tokens a lane.
  __device__ float4 Take(int m, int) {
    float2 token[kPairs];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      float2& total = totals_[m][pair];
      token[pair] = make_float2(__fadd_rn(total.x, __shfl_xor_sync(kFullWarp, total.x, 1)),
                                __fadd_rn(total.y, __shfl_xor_sync(kFullWarp, total.y, 1)));
      total = float2();
    }
    float2 first = token[lane_ % 2 * (kPairs - 1)];
    float2 second =
        make_float2(__shfl_xor_sync(kFullWarp, first.x, 2), __shfl_xor_sync(kFullWarp, first.y, 2));
    return make_float4(first.x, second.x, first.y, second.y);
  }

 private:
  using Reader = WeightReader<T, WeightKind::kInt4>;
  static constexpr int kRowTiles = Block::kRowTiles;
  static constexpr int kRunsOfToken = kChunk / 8;

  // --- inputs: [chunks, T], each 128 bytes of each digit, and two factors of each half of them ---

  __device__ unsigned char* InputsOf(int chunk) const {
    return b_.MadeInputs() + chunk * b_.p_.num_tokens * kDigitBytes;
  }
  // Past the last token that again: nobody takes the sums.
  __device__ int PlaceOfToken(int token) const {
    return min(token, b_.p_.num_tokens - 1) * kDigitBytes;
  }

  // Makes those of this warp's chunks: half a warp a token, 8 neighbouring inputs a lane. With a
  // norm each warp has some (FitsNorm).
  __device__ void MakeInputs(int warp) const {
    const int run = lane_ % kRunsOfToken;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int token = pair * 2 + lane_ / kRunsOfToken;
      const bool is_there = token < b_.p_.num_tokens;
      float squares = 0.0f;
      for (int chunk = warp; chunk < b_.num_chunks_; chunk += Block::kWarps) {
        float values[8] = {};
        int input = chunk * kChunk + run * 8;
        if (is_there && input < b_.p_.num_inputs) ReadInputs(token, input, values, squares);
        const int exponent = LargestExponent(values);
        int numbers[8];
        uint32_t sum = 0;  // of what is no number anything
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          numbers[i] = ToInteger(values[i], UnitsOfOne(exponent));
          sum += static_cast<uint32_t>(numbers[i]);
        }
        sum = SumOfToken(sum);
        if (!is_there) continue;
        unsigned char* target = InputsOf(chunk) + token * kDigitBytes;
        WriteDigits(numbers, target, run);
        if (run == 0) {
          WriteFactors(exponent, static_cast<int>(sum), target + kDigits * kChunk);
        }
      }
      if constexpr (kNormed) {
        squares = SumOfToken(squares);
        if (is_there && run == 0) *b_.SquaresOf(warp, token) = squares;
      }
    }
  }

  __device__ void ReadInputs(int token, int input, float (&values)[8], float& squares) const {
    if constexpr (kNormed) {
      alignas(16) T rounded[8];
      FoldNorm(b_.p_.hidden + int64_t{token} * b_.p_.num_inputs + input, b_.p_.norm_weight + input,
               rounded, squares);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = ToFloat32(rounded[i]);
    } else {
      LoadFloats<8>(b_.p_.x + int64_t{token} * b_.p_.num_inputs + input, values);
    }
  }

  template <typename Number>
  __device__ static Number SumOfToken(Number value) {
#pragma unroll
    for (int distance = 1; distance < kRunsOfToken; distance *= 2) {
      value += __shfl_xor_sync(kFullWarp, value, distance);
    }
    return value;
  }

  // The exponent of the largest of a token's inputs of a chunk, as float32 has it; kNoNumber of
  // infinities too.
  __device__ static int LargestExponent(const float (&values)[8]) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
#pragma unroll
    for (int distance = 1; distance < kRunsOfToken; distance *= 2) {
      largest = max(largest, __shfl_xor_sync(kFullWarp, largest, distance));
    }
    return static_cast<int>(largest >> 23);
  }

  // By what inputs are multiplied, 2^(21 - exponent without its bias): below 2^22 then. The unit,
  // of which they are so many, is 1 / that.
  __device__ static float UnitsOfOne(int exponent) {
    return __int_as_float((kFloatBias * 2 + 21 - max(exponent, kLeastExponent)) << 23);
  }
  __device__ static int ToInteger(float value, float units) {
    constexpr float kIntegers = 12582912.0f;  // 1.5 * 2^23, whose last bits count by 1
    return __float_as_int(__fmaf_rn(value, units, kIntegers)) - __float_as_int(kIntegers);
  }

  // The sums of a chunk times the scale are what the lanes of even columns have, upper digits of
  // which the second counts by one, times 256 units, and what those of odd ones have, the lowest
  // digit times 257, times a unit / 257. A factor beside that is the sum of the inputs, which the
  // zeros multiply.
  __device__ static void WriteFactors(int exponent, int sum, unsigned char* target) {
    float unit = __int_as_float((max(exponent, kLeastExponent) - 21) << 23);
    if (exponent == kNoNumber) unit = __int_as_float(0x7fffffff);
    *reinterpret_cast<float4*>(target) =
        make_float4(unit * 256.0f, static_cast<float>(sum) / 256.0f, unit / 257.0f, 0.0f);
  }

  // The digits of 8 neighbours: those of even ones in a register, and those of odd ones.
  __device__ static void WriteDigits(const int (&numbers)[8], unsigned char* target, int run) {
    constexpr uint32_t kHalves = 0x00808080;
    uint32_t digits[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      digits[i] = (static_cast<uint32_t>(numbers[i]) + kHalves) ^ kHalves;
    }
#pragma unroll
    for (int digit = 0; digit < kDigits; ++digit) {
      const int byte = kDigits - 1 - digit;
      const int place =
          digit * kChunk + run / 4 * 32 + ((run / 2 % 2) ^ (digit % 2)) * 16 + run % 2 * 8;
      *reinterpret_cast<uint2*>(target + place) =
          make_uint2(BytesOf(byte, digits[0], digits[2], digits[4], digits[6]),
                     BytesOf(byte, digits[1], digits[3], digits[5], digits[7]));
    }
  }
  __device__ static uint32_t BytesOf(int byte, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const auto pick = static_cast<uint32_t>(byte | (byte + 4) << 4);
    return __byte_perm(__byte_perm(a, b, pick), __byte_perm(c, d, pick), kLowerHalves);
  }

  // --- products ---

  // Adds 8 codes of a row of each half times as many inputs: even ones, then odd ones.
  __device__ static void MultiplyRun(uint32_t low, uint32_t high, int run,
                                     const uint2 (&digits)[kPairs][4], int (&sums)[kPairs][4]) {
    constexpr uint32_t kEven = 0x0f0f0f0f;
    const uint32_t codes[4] = {low & kEven, high & kEven, low >> 4 & kEven, high >> 4 & kEven};
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      MultiplyAddCodes(sums[pair], codes, {digits[pair][run].x, digits[pair][run].y});
    }
  }

  __device__ void AddChunk(int m, const int (&sums)[kPairs][4], const float2 (&factors)[kPairs],
                           const Scales& scales) {
    const auto zero_low = static_cast<float>(scales.zero[m][0]);
    const auto zero_high = static_cast<float>(scales.zero[m][1]);
    b_.WithScales([&](auto read) {
      const float low = read(scales.scale[m][0]), high = read(scales.scale[m][1]);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const float2& factor = factors[pair];
        const auto sum_low = static_cast<float>(sums[pair][0] * 256 + sums[pair][1]);
        const auto sum_high = static_cast<float>(sums[pair][2] * 256 + sums[pair][3]);
        float2& total = totals_[m][pair];
        total.x = __fmaf_rn(__fmaf_rn(-zero_low, factor.y, sum_low), low * factor.x, total.x);
        total.y = __fmaf_rn(__fmaf_rn(-zero_high, factor.y, sum_high), high * factor.x, total.y);
      }
    });
  }

  static constexpr int kFloatBias = 127, kNoNumber = 255;
  static constexpr int kLeastExponent = 22;  // units stay normal numbers
  static_assert(kDigitBytes % 32 == 0, "digits_ are told apart by a bit");
  static_assert(2 * kPairs <= kMaxDigitTokens);

  const Block& b_;
  int lane_, codes_;                       // codes: the lane's place in a tile
  int digits_[kPairs], factors_[kPairs];   // likewise in a chunk's inputs
  float2 totals_[kRowTiles][kPairs] = {};  // of rows of both halves
};

#endif

template <typename T, typename Epilogue, bool kNormed, int kPairs>
__global__ void __launch_bounds__(SkinnyShape<kTileTokens, WeightKind::kInt4>::kThreads, 1)
    Int4LinearKernel(const __grid_constant__ SkinnyParams<T> params,
                     const __grid_constant__ Epilogue epilogue,
                     const __grid_constant__ CUtensorMap weight) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  RunCodedBlock<DigitProducts<T, Epilogue, kNormed, kPairs>>(params, epilogue, weight,
                                                             shared_bytes);
#endif
}

}  // namespace tidal
