#include "kernels/decode_weight.h"

#include <algorithm>

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/float8.cuh"
#include "common/vec.cuh"
#include "kernels/weight_codes.cuh"

namespace tidal {
namespace {

constexpr int kThreads = 256;
constexpr int kCodes = 8;  // of one thread: neighbours in a row

struct DecodeParams {
  const unsigned char* codes;
  const unsigned char* scales;  // [G, N]
  const uint8_t* zeros;         // [G, N] or null
  DType scale_dtype;
  int64_t num_outputs;
  int64_t num_inputs;  // a multiple of kCodes
  int64_t group_size;  // likewise, or all inputs
};

template <bool kInt4>
__device__ __forceinline__ void ReadCodes(const unsigned char* codes, int zero,
                                          float (&values)[kCodes]) {
  if constexpr (kInt4) {
    uint32_t packed = *reinterpret_cast<const uint32_t*>(codes);
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      values[i] = static_cast<float>(static_cast<int>((packed >> (4 * i)) & 0xfu) - zero);
    }
  } else {
    uint2 packed = *reinterpret_cast<const uint2*>(codes);
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      uint32_t word = i < 4 ? packed.x : packed.y;
      values[i] = DecodeFloat8({static_cast<uint8_t>(word >> (8 * (i % 4)))});
    }
  }
}

// One thread for every kCodes codes, several rounds.
template <typename T, bool kInt4>
__global__ void __launch_bounds__(kThreads) DecodeWeightKernel(DecodeParams p, T* out) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  int64_t per_row = p.num_inputs / kCodes, count = per_row * p.num_outputs;
  int scale_bytes = p.scale_dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    int64_t row = i / per_row, input = (i - row * per_row) * kCodes;
    int64_t place = input / p.group_size * p.num_outputs + row;
    float scale = ReadScale(p.scales + place * scale_bytes, p.scale_dtype);
    int zero = p.zeros == nullptr ? 8 : p.zeros[place];
    float values[kCodes];
    ReadCodes<kInt4>(p.codes + i * (kInt4 ? kCodes / 2 : kCodes), zero, values);
#pragma unroll
    for (int k = 0; k < kCodes; ++k) values[k] = __fmul_rn(values[k], scale);
    StoreFloats(out + i * kCodes, values);
  }
}

}  // namespace

void LaunchDecodeWeight(const Weight& weight, const TensorView& out, cudaStream_t stream) {
  DecodeParams params = {.codes = static_cast<const unsigned char*>(weight.data.ptr),
                         .scales = static_cast<const unsigned char*>(weight.scales.ptr),
                         .zeros = static_cast<const uint8_t*>(weight.zeros.ptr),
                         .scale_dtype = weight.scales.dtype,
                         .num_outputs = weight.num_outputs(),
                         .num_inputs = weight.num_inputs(),
                         .group_size = weight.group_size};
  constexpr int64_t kMaxBlocks = 132 * 16;
  int64_t blocks = std::min(CeilDiv(out.numel() / kCodes, kThreads), kMaxBlocks);
  LaunchShape shape = {.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(kThreads)};
  DispatchHalf(out.dtype, "decode_weight", [&](auto tag) {
    using T = typename decltype(tag)::Type;
    auto* numbers = static_cast<T*>(out.ptr);
    if (weight.codes == WeightCodes::kInt4) {
      LaunchOverlapped("decode_weight", DecodeWeightKernel<T, true>, shape, stream, params,
                       numbers);
    } else {
      LaunchOverlapped("decode_weight", DecodeWeightKernel<T, false>, shape, stream, params,
                       numbers);
    }
  });
}

}  // namespace tidal
