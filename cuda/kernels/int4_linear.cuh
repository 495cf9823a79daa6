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
template <typename T, typename Epilogue, bool kNormed, int kPairs, typename Shape>
class DigitProducts {
 public:
  using Block = CodedBlock<T, Epilogue, kNormed, Shape>;
  using Cursor = typename Block::Cursor;
  using Stage = typename Block::Stage;
  static constexpr bool kCopiesInputs = false;

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

  __device__ void Begin(int warp) const {
    MakeInputs(warp);
    __syncwarp();
    if (lane_ == 0) Arrive(b_.InputsMade());
    WaitBarrier(b_.InputsMade(), 0);
  }

  __device__ void Multiply(const Cursor& at, const Stage& stage) {
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
    float2 scales[kRowTiles];
    b_.ReadScales(stage, 0, lane_, scales);
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
      AddChunk(m, sums, factors, b_.ZerosOf(stage, 0, m, lane_), scales[m]);
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
    float2 first = lane_ % 2 == 0 ? token[0] : token[kPairs - 1];
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

  // Eight neighbouring inputs of a token as they are read; zeros where there are none.
  struct RawInputs {
    alignas(16) float hidden[8];  // if kNormed
    alignas(16) T numbers[8];     // the inputs, or the norm's weights
  };

  // Makes those of this warp's chunks: half a warp a token, 8 neighbouring inputs a lane; of one
  // token each half has chunks of its own. With a norm each warp has some (FitsNorm).
  __device__ void MakeInputs(int warp) const {
    const int half = lane_ / kRunsOfToken, run = lane_ % kRunsOfToken;
    const bool is_alone = b_.p_.num_tokens == 1;
    const int step = is_alone ? 2 * Block::kWarps : Block::kWarps;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int token = is_alone ? 0 : pair * 2 + half;
      const int first = is_alone ? half * Block::kWarps : 0;
      float squares = 0.0f;
      RawInputs next;
      ReadInputs(token, warp + first, run, next);
      for (int chunk = warp; chunk < b_.num_chunks_; chunk += step) {
        float values[8];
        TakeInputs(next, values, squares);
        ReadInputs(token, chunk + step + first, run, next);
        MakeChunk(token, chunk + first, run, values);
      }
      if constexpr (kNormed) {
        squares = SumOfToken(squares);
        if (is_alone) squares += __shfl_xor_sync(kFullWarp, squares, kRunsOfToken);
        if (token < b_.p_.num_tokens && run == 0) *b_.SquaresOf(warp, token) = squares;
      }
    }
  }

  __device__ bool IsThere(int token, int chunk) const {
    return token < b_.p_.num_tokens && chunk < b_.num_chunks_;
  }

  __device__ void ReadInputs(int token, int chunk, int run, RawInputs& inputs) const {
    const int input = chunk * kChunk + run * 8;
    inputs = RawInputs();
    if (!IsThere(token, chunk) || input >= b_.p_.num_inputs) return;
    const int64_t place = int64_t{token} * b_.p_.num_inputs + input;
    if constexpr (kNormed) {
      CopyVec<4>(b_.p_.hidden + place, inputs.hidden);
      CopyVec<4>(b_.p_.hidden + place + 4, inputs.hidden + 4);
      CopyVec<8>(b_.p_.norm_weight + input, inputs.numbers);
    } else {
      CopyVec<8>(b_.p_.x + place, inputs.numbers);
    }
  }

  __device__ void TakeInputs(const RawInputs& inputs, float (&values)[8], float& squares) const {
    if constexpr (kNormed) {
      alignas(16) T rounded[8];
      FoldNorm(inputs.hidden, inputs.numbers, rounded, squares);
      LoadFloats<8>(rounded, values);
    } else {
      LoadFloats<8>(inputs.numbers, values);
    }
  }

  __device__ void MakeChunk(int token, int chunk, int run, const float (&values)[8]) const {
    const int exponent = LargestExponent(values);
    uint32_t numbers[8];
    uint32_t sum = 0 - 8 * kZero;  // of what is no number anything
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      numbers[i] = ToInteger(values[i], UnitsOfOne(exponent));
      sum += numbers[i];
    }
    sum = SumOfToken(sum);
    if (!IsThere(token, chunk)) return;
    unsigned char* target = InputsOf(chunk) + token * kDigitBytes;
    WriteDigits(numbers, target, run);
    if (run == 0) WriteFactors(exponent, static_cast<int>(sum), target + kDigits * kChunk);
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
    float largest = fabsf(values[0]);
#pragma unroll
    for (int i = 1; i < 8; ++i) largest = LargerOrNan(largest, fabsf(values[i]));
#pragma unroll
    for (int distance = 1; distance < kRunsOfToken; distance *= 2) {
      largest = LargerOrNan(largest, __shfl_xor_sync(kFullWarp, largest, distance));
    }
    return static_cast<int>(__float_as_uint(largest) >> 23);
  }
  __device__ static float LargerOrNan(float a, float b) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
  }

  // By what inputs are multiplied, 2^(21 - exponent without its bias): below 2^22 then. The unit,
  // of which they are so many, is 1 / that.
  __device__ static float UnitsOfOne(int exponent) {
    return __int_as_float((kFloatBias * 2 + 21 - max(exponent, kLeastExponent)) << 23);
  }
  // Returns kZero + the integer.
  __device__ static uint32_t ToInteger(float value, float units) {
    constexpr float kIntegers = 12582912.0f;  // 1.5 * 2^23, whose last bits count by 1
    return __float_as_uint(__fmaf_rn(value, units, kIntegers));
  }
  static constexpr uint32_t kZero = 0x4b400000;  // the bits of that number

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
  __device__ static void WriteDigits(const uint32_t (&numbers)[8], unsigned char* target, int run) {
    uint32_t even[kDigits], odd[kDigits];
    DigitsOf(numbers[0], numbers[2], numbers[4], numbers[6], even);
    DigitsOf(numbers[1], numbers[3], numbers[5], numbers[7], odd);
#pragma unroll
    for (int digit = 0; digit < kDigits; ++digit) {
      const int place =
          digit * kChunk + run / 4 * 32 + ((run / 2 % 2) ^ (digit % 2)) * 16 + run % 2 * 8;
      *reinterpret_cast<uint2*>(target + place) = make_uint2(even[digit], odd[digit]);
    }
  }
  // A number's bytes and half of 256 in each, less these halves, are its digits.
  __device__ static void DigitsOf(uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                  uint32_t (&digits)[kDigits]) {
    constexpr uint32_t kHalves = 0x80808080, kShift = (kHalves & 0xffffff) - kZero;
    const uint32_t low = __byte_perm(a + kShift, b + kShift, 0x5140);
    const uint32_t high = __byte_perm(c + kShift, d + kShift, 0x5140);
    digits[2] = __byte_perm(low, high, kLowerHalves) ^ kHalves;
    digits[1] = __byte_perm(low, high, kUpperHalves) ^ kHalves;
    digits[0] = __byte_perm(__byte_perm(a + kShift, b + kShift, 0x62),
                            __byte_perm(c + kShift, d + kShift, 0x62), kLowerHalves) ^
                kHalves;
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

  // zeros, scales: of both halves of the m-th tile.
  __device__ void AddChunk(int m, const int (&sums)[kPairs][4], const float2 (&factors)[kPairs],
                           const uint2& zeros, const float2& scales) {
    const auto zero_low = static_cast<float>(zeros.x), zero_high = static_cast<float>(zeros.y);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const float2& factor = factors[pair];
      const auto sum_low = static_cast<float>(sums[pair][0] * 256 + sums[pair][1]);
      const auto sum_high = static_cast<float>(sums[pair][2] * 256 + sums[pair][3]);
      float2& total = totals_[m][pair];
      total.x = __fmaf_rn(__fmaf_rn(-zero_low, factor.y, sum_low), scales.x * factor.x, total.x);
      total.y = __fmaf_rn(__fmaf_rn(-zero_high, factor.y, sum_high), scales.y * factor.x, total.y);
    }
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

template <typename T, typename Epilogue, bool kNormed, int kPairs, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    Int4LinearKernel(const __grid_constant__ SkinnyParams<T> params,
                     const __grid_constant__ Epilogue epilogue,
                     const __grid_constant__ CUtensorMap weight) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  RunCodedBlock<DigitProducts<T, Epilogue, kNormed, kPairs, Shape>>(params, epilogue, weight,
                                                                    shared_bytes);
#endif
}

}  // namespace tidal
