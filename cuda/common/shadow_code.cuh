// The codes of core/shadow_code.h as a warp makes them, bit for bit: lane l holds the dims from
// l * head_dim / 32 on.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/launch_config.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "core/shadow_code.h"

namespace tidal {

template <int kHeadDim>
class ShadowDims {
 public:
  static constexpr int kDims = kPaddedDim<kHeadDim> / kWarpSize;  // of a lane
  static constexpr int kLanes = kHeadDim / kDims;                 // others have zeros
  static_assert(kLanes * kDims == kHeadDim && (kDims == 2 || kDims == 4 || kDims == 8));

  // Loads a key or query [kHeadDim], which is divided or multiplied by its balance next.
  template <typename T>
  __device__ __forceinline__ explicit ShadowDims(const T* row) {
    if (IsInRow()) LoadFloats(row + FirstDim(), dims_);
  }

  // Whether the lane has dims of the row.
  __device__ __forceinline__ static bool IsInRow() {
    return kLanes == kWarpSize || threadIdx.x % kWarpSize < kLanes;
  }

  __device__ __forceinline__ static int FirstDim() {
    return static_cast<int>(threadIdx.x) % kWarpSize * kDims;
  }

  __device__ __forceinline__ void MultiplyBy(float scale) {
#pragma unroll
    for (int i = 0; i < kDims; ++i) dims_[i] = __fmul_rn(dims_[i], scale);
  }
  __device__ __forceinline__ void DivideBy(const float* balance) {
    if (!IsInRow()) return;
#pragma unroll
    for (int i = 0; i < kDims; ++i) dims_[i] = __fdiv_rn(dims_[i], balance[FirstDim() + i]);
  }
  __device__ __forceinline__ void MultiplyBy(const float* balance) {
    if (!IsInRow()) return;
#pragma unroll
    for (int i = 0; i < kDims; ++i) dims_[i] = __fmul_rn(dims_[i], balance[FirstDim() + i]);
  }

  // RotateForShadow. The order of the sums is the same.
  __device__ __forceinline__ void Rotate() {
    constexpr int kBlock = kHeadDim & -kHeadDim;
    static_assert(kBlock % kDims == 0, "whole lanes");
#pragma unroll
    for (int i = 0; i < kDims; ++i) dims_[i] = __fmul_rn(dims_[i], ShadowSign(FirstDim() + i));
#pragma unroll
    for (int distance = 1; distance < kDims; distance *= 2) {
#pragma unroll
      for (int i = 0; i < kDims; ++i) {
        if ((i & distance) != 0) continue;
        float a = dims_[i], b = dims_[i + distance];
        dims_[i] = __fadd_rn(a, b);
        dims_[i + distance] = __fsub_rn(a, b);
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < kBlock / kDims; lanes *= 2) {
      bool is_upper = (static_cast<int>(threadIdx.x) & lanes) != 0;
#pragma unroll
      for (int i = 0; i < kDims; ++i) {
        float other = __shfl_xor_sync(kFullWarp, dims_[i], lanes);
        dims_[i] = is_upper ? __fsub_rn(other, dims_[i]) : __fadd_rn(dims_[i], other);
      }
    }
    float norm = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(kBlock)));
#pragma unroll
    for (int i = 0; i < kDims; ++i) dims_[i] = __fmul_rn(dims_[i], norm);
  }

  // The largest magnitude of all lanes; NaN if a dim is a NaN or an infinity.
  __device__ __forceinline__ float Largest() const {
    float largest = 0.0f;
    bool is_finite = true;
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
      largest = fmaxf(largest, fabsf(dims_[i]));
      is_finite = is_finite && isfinite(dims_[i]);
    }
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, lanes));
    }
    return __all_sync(kFullWarp, is_finite) ? largest : __int_as_float(0x7fffffff);
  }

  // The code of dim FirstDim() + i in units of `step`.
  __device__ __forceinline__ int Code(int i, float step, float levels) const {
    if (!(step > 0.0f)) return 0;
    float code = rintf(__fdiv_rn(dims_[i], step));
    return static_cast<int>(fminf(fmaxf(code, -levels), levels));
  }

 private:
  float dims_[kDims] = {};
};

// A key's shadow in a warp.
template <int kHeadDim>
struct ShadowKey {
  __half scale;    // the same in all lanes
  uint32_t codes;  // the lane's, in its kDims / 2 low bytes

  // key_scale: of a number in the cache.
  template <typename Stored>
  __device__ __forceinline__ ShadowKey(const Stored* key, float key_scale, const float* balance)
      : codes(0) {
    ShadowDims<kHeadDim> dims(key);
    dims.MultiplyBy(key_scale);
    dims.DivideBy(balance);
    dims.Rotate();
    scale = __float2half_rn(__fdiv_rn(dims.Largest(), kShadowKeyLevels));
    float step = __half2float(scale);
#pragma unroll
    for (int i = 0; i < ShadowDims<kHeadDim>::kDims; ++i) {
      int code = dims.Code(i, step, kShadowKeyLevels) + kShadowCodeBias;
      codes |= static_cast<uint32_t>(code) << (4 * i);
    }
  }

  // Writes it as row `row` of the codes [rows, kHeadDim / 2] and scales [rows].
  __device__ __forceinline__ void Store(uint8_t* all_codes, __half* scales, int64_t row) const {
    int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    if (lane == 0) scales[row] = scale;
    if (!ShadowDims<kHeadDim>::IsInRow()) return;
    uint8_t* codes_of_row = all_codes + row * (kHeadDim / 2);
    if constexpr (ShadowDims<kHeadDim>::kDims == 8) {
      reinterpret_cast<uint32_t*>(codes_of_row)[lane] = codes;
    } else if constexpr (ShadowDims<kHeadDim>::kDims == 4) {
      reinterpret_cast<uint16_t*>(codes_of_row)[lane] = static_cast<uint16_t>(codes);
    } else {
      codes_of_row[lane] = static_cast<uint8_t>(codes);
    }
  }
};

// A query's codes, in shared memory. Those of the even dims stand in front.
template <int kHeadDim>
struct ShadowQueryCodes {
  alignas(16) int8_t codes[kHeadDim];
  int32_t sum;   // of the codes
  float factor;  // of a code

  // By a whole warp. The query's factor is multiplied by sm_scale.
  template <typename T>
  __device__ __forceinline__ void Encode(const T* query, const float* balance, float sm_scale) {
    constexpr int kDims = ShadowDims<kHeadDim>::kDims;
    ShadowDims<kHeadDim> dims(query);
    dims.MultiplyBy(balance);
    dims.Rotate();
    float step = __fdiv_rn(dims.Largest(), kShadowQueryLevels);
    int own_sum = 0;
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
      int code = dims.Code(i, step, kShadowQueryLevels);
      if (!dims.IsInRow()) continue;
      codes[i % 2 * (kHeadDim / 2) + (dims.FirstDim() + i) / 2] = static_cast<int8_t>(code);
      own_sum += code;
    }
    own_sum = __reduce_add_sync(kFullWarp, own_sum);
    if (threadIdx.x % kWarpSize == 0) {
      sum = own_sum;
      factor = __fmul_rn(step, sm_scale);
    }
  }

  // Stands for a head that is not there: its scores are 0, and nobody reads them.
  __device__ __forceinline__ void Clear() {
    for (int i = threadIdx.x % kWarpSize; i < kHeadDim; i += kWarpSize) codes[i] = 0;
    if (threadIdx.x % kWarpSize == 0) {
      sum = 0;
      factor = 0.0f;
    }
  }
};

}  // namespace tidal
