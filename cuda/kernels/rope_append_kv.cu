// RopeAppendKv: between the qkv projection and attention. Splits qkv, applies the RMSNorm of q and
// k if there is one, rotates q and k (rotate-half layout), appends k and v to the paged cache.
#include "kernels/rope_append_kv.h"

#include <type_traits>

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/elementwise.cuh"
#include "common/head_dims.h"
#include "common/paged_kv.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace tidal {
namespace {

constexpr int kWarpsPerBlock = 8;

template <typename T, typename Stored>
struct RopeAppendKvParams {
  const T* qkv;               // [T, Hq + 2 Hkv, D]
  const float* q_cos_sin;     // [T, D]
  const float* k_cos_sin;     // [T, D]
  const void* q_norm;         // T or float32: [D], or wide [Hq * D]; or null
  const void* k_norm;         // likewise
  bool is_norm_float;         // of float32
  bool is_norm_wide;          // over all heads of a token
  const int32_t* positions;   // [T]; -1 = idle
  const int32_t* seq_idx;     // [T]
  const int32_t* page_table;  // [B, max_pages]
  T* q;                       // [T, Hq, D]
  Stored* k_pages;            // [num_pages, Hkv, page_size, D]
  Stored* v_pages;
  float k_scale;  // of an fp8 cache
  float v_scale;
  float norm_eps;
  int64_t num_tokens;
  int64_t max_pages;
  int num_q_heads;
  int num_kv_heads;
  int page_size;
};

// One head of one token, held by a warp: lane l has elements [l * kPairs, (l + 1) * kPairs) of the
// first half and the same of the second, so that a rotation stays inside the lane. Lanes from
// kLanes on have zeros.
template <int kHeadDim>
struct HeadVector {
  static constexpr int kHalf = kHeadDim / 2;
  static constexpr int kPairs = (kHalf + kWarpSize - 1) / kWarpSize;
  static constexpr int kLanes = kHalf / kPairs;
  static_assert(kLanes * kPairs == kHalf);

  float low[kPairs] = {};
  float high[kPairs] = {};

  template <typename T>
  __device__ void Load(const T* source, int lane) {
    if (kLanes < kWarpSize && lane >= kLanes) return;
    LoadFloats<kPairs>(source + lane * kPairs, low);
    LoadFloats<kPairs>(source + kHalf + lane * kPairs, high);
  }

  template <typename T>
  __device__ void Store(T* destination, int lane) const {
    if (kLanes < kWarpSize && lane >= kLanes) return;
    StoreFloats<kPairs>(destination + lane * kPairs, low);
    StoreFloats<kPairs>(destination + kHalf + lane * kPairs, high);
  }

  // Divides a row of an fp8 cache by its scale. All of it becomes NaN if a number is not finite.
  __device__ void DivideForFloat8(float scale) {
    bool is_finite = true;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      is_finite = is_finite && isfinite(low[i]) && isfinite(high[i]);
    }
    is_finite = __all_sync(kFullWarp, is_finite);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      low[i] = is_finite ? __fdiv_rn(low[i], scale) : __int_as_float(0x7fffffff);
      high[i] = is_finite ? __fdiv_rn(high[i], scale) : __int_as_float(0x7fffffff);
    }
  }

  // A lane's part.
  __device__ float SumOfSquares() const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) sum += low[i] * low[i] + high[i] * high[i];
    return sum;
  }

  __device__ void Multiply(const HeadVector& weights, float scale) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      low[i] *= scale * weights.low[i];
      high[i] *= scale * weights.high[i];
    }
  }

  __device__ void Rotate(const float* cos_sin, int lane) {
    HeadVector angles;  // low: cosines, high: sines
    angles.Load(cos_sin, lane);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      RotatePair(low[i], high[i], angles.low[i], angles.high[i]);
    }
  }
};

// The norm of a head of q or k. A wide one is over all heads of its kind, whose numbers the warp
// reads beside its own.
template <int kHeadDim, typename T, typename Stored>
__device__ void Normalize(const RopeAppendKvParams<T, Stored>& p, int64_t token, int head,
                          HeadVector<kHeadDim>& vector, int lane) {
  bool is_q = head < p.num_q_heads;
  const void* norm = is_q ? p.q_norm : p.k_norm;
  if (norm == nullptr) return;
  int first = is_q ? 0 : p.num_q_heads, place = 0, count = kHeadDim;
  float sum = 0.0f;
  if (p.is_norm_wide) {
    int heads = is_q ? p.num_q_heads : p.num_kv_heads;
    const T* of_token = p.qkv + token * (p.num_q_heads + 2 * p.num_kv_heads) * kHeadDim;
    for (int other = first; other < first + heads; ++other) {
      HeadVector<kHeadDim> beside;
      beside.Load(of_token + other * kHeadDim, lane);
      sum += beside.SumOfSquares();
    }
    place = (head - first) * kHeadDim;
    count = heads * kHeadDim;
  } else {
    sum = vector.SumOfSquares();
  }
  float scale = 1.0f / sqrtf(WarpSum(sum) / static_cast<float>(count) + p.norm_eps);
  HeadVector<kHeadDim> weights;
  if (p.is_norm_float) {
    weights.Load(static_cast<const float*>(norm) + place, lane);
  } else {
    weights.Load(static_cast<const T*>(norm) + place, lane);
  }
  vector.Multiply(weights, scale);
}

// grid (ceil(T * (Hq + 2 Hkv) / kWarpsPerBlock)); a warp owns one head of one token: q heads, then
// k heads, then v heads.
template <typename T, typename Stored, int kHeadDim>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    RopeAppendKvKernel(const RopeAppendKvParams<T, Stored> p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  int lane = threadIdx.x % kWarpSize;
  int64_t index = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  int num_heads = p.num_q_heads + 2 * p.num_kv_heads;
  if (index >= p.num_tokens * num_heads) return;
  int64_t token = index / num_heads;
  int head = static_cast<int>(index - token * num_heads);
  int32_t position = p.positions[token];
  bool is_q = head < p.num_q_heads;
  bool is_v = head >= p.num_q_heads + p.num_kv_heads;

  HeadVector<kHeadDim> vector;
  if (position >= 0) {
    vector.Load(p.qkv + index * kHeadDim, lane);
    if (!is_v) {
      Normalize(p, token, head, vector, lane);
      vector.Rotate((is_q ? p.q_cos_sin : p.k_cos_sin) + token * kHeadDim, lane);
    }
  }
  if (is_q) {
    vector.Store(p.q + (token * p.num_q_heads + head) * kHeadDim, lane);
  } else if (position >= 0) {
    const int32_t* pages = p.page_table + p.seq_idx[token] * p.max_pages;
    int kv_head = head - p.num_q_heads - (is_v ? p.num_kv_heads : 0);
    int64_t row = PagedRow(pages, position, p.num_kv_heads, p.page_size) + kv_head * p.page_size;
    if constexpr (std::is_same_v<Stored, Float8>) {
      vector.DivideForFloat8(is_v ? p.v_scale : p.k_scale);
    }
    vector.Store((is_v ? p.v_pages : p.k_pages) + row * kHeadDim, lane);
  }
}

template <typename T, typename Stored>
RopeAppendKvParams<T, Stored> MakeParams(const RopeAppendKvArgs& args) {
  RopeAppendKvParams<T, Stored> p = {};
  p.qkv = static_cast<const T*>(args.qkv.ptr);
  p.k_cos_sin = args.cos_sin.data<float>();
  p.q_cos_sin = args.q_cos_sin ? args.q_cos_sin.data<float>() : p.k_cos_sin;
  p.q_norm = args.q_norm.ptr;
  p.k_norm = args.k_norm.ptr;
  p.is_norm_float = args.q_norm && args.q_norm.dtype == DType::kFloat32;
  p.is_norm_wide = args.q_norm && args.q_norm.numel() != args.q.dim(2);
  p.positions = args.positions.data<int32_t>();
  p.seq_idx = args.seq_idx.data<int32_t>();
  p.page_table = args.kv.page_table.data<int32_t>();
  p.q = static_cast<T*>(args.q.ptr);
  p.k_pages = static_cast<Stored*>(args.kv.k_pages.ptr);
  p.v_pages = static_cast<Stored*>(args.kv.v_pages.ptr);
  p.k_scale = args.kv.k_scale;
  p.v_scale = args.kv.v_scale;
  p.norm_eps = args.norm_eps;
  p.num_tokens = args.q.dim(0);
  p.max_pages = args.kv.page_table.dim(1);
  p.num_q_heads = static_cast<int>(args.q.dim(1));
  p.num_kv_heads = static_cast<int>(args.kv.k_pages.dim(1));
  p.page_size = static_cast<int>(args.kv.k_pages.dim(2));
  return p;
}

template <typename T, typename Stored>
void Launch(const RopeAppendKvArgs& args, cudaStream_t stream) {
  RopeAppendKvParams<T, Stored> params = MakeParams<T, Stored>(args);
  int64_t num_warps = params.num_tokens * (params.num_q_heads + 2 * params.num_kv_heads);
  LaunchShape shape = {.grid = static_cast<unsigned>(CeilDiv(num_warps, kWarpsPerBlock)),
                       .block = kWarpsPerBlock * kWarpSize};
  DispatchHeadDim<T>(args.q.dim(2), [&](auto head_dim) {
    LaunchOverlapped("rope_append_kv", RopeAppendKvKernel<T, Stored, head_dim()>, shape, stream,
                     params);
  });
}

}  // namespace

void LaunchRopeAppendKv(const RopeAppendKvArgs& args, cudaStream_t stream) {
  if (args.q.dim(0) == 0) return;
  CheckHeadDim("rope_append_kv", args.q.dim(2), args.q.dtype);
  DispatchHalf(args.q.dtype, "rope_append_kv", [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (args.kv.k_pages.dtype == DType::kFloat8) {
      Launch<T, Float8>(args, stream);
    } else {
      Launch<T, T>(args, stream);
    }
  });
}

}  // namespace tidal
