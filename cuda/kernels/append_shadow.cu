// AppendShadow: a warp for each token and KV head reads the key from the cache and writes its codes
// and its scale (common/shadow_code.cuh).
#include "kernels/append_shadow.h"

#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/head_dims.h"
#include "common/paged_kv.cuh"
#include "common/shadow_code.cuh"

namespace tidal {
namespace {

constexpr int kWarpsPerBlock = 4;

template <typename Stored>
struct AppendShadowParams {
  const Stored* k_pages;
  float k_scale;         // of an fp8 cache
  const float* balance;  // [Hkv, D]
  const int32_t* positions;
  const int32_t* seq_idx;
  const int32_t* page_table;
  uint8_t* codes;
  __half* scales;
  int64_t num_tokens;
  int64_t max_pages;
  int num_kv_heads;
  int page_size;
};

// grid (ceil(T * Hkv / kWarpsPerBlock)).
template <typename Stored, int kHeadDim>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    AppendShadowKernel(const AppendShadowParams<Stored> p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  int64_t index = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (index >= p.num_tokens * p.num_kv_heads) return;
  int64_t token = index / p.num_kv_heads;
  int head = static_cast<int>(index - token * p.num_kv_heads);
  int32_t position = p.positions[token];
  if (position < 0) return;
  const int32_t* pages = p.page_table + p.seq_idx[token] * p.max_pages;
  int64_t row = PagedRow(pages, position, p.num_kv_heads, p.page_size) + head * p.page_size;
  ShadowKey<kHeadDim> key(p.k_pages + row * kHeadDim, p.k_scale, p.balance + head * kHeadDim);
  key.Store(p.codes, p.scales, row);
}

template <typename Stored>
AppendShadowParams<Stored> MakeParams(const AppendShadowArgs& args) {
  AppendShadowParams<Stored> p = {};
  p.k_pages = static_cast<const Stored*>(args.kv.k_pages.ptr);
  p.k_scale = args.kv.k_scale;
  p.balance = args.shadow.balance.data<float>();
  p.positions = args.positions.data<int32_t>();
  p.seq_idx = args.seq_idx.data<int32_t>();
  p.page_table = args.kv.page_table.data<int32_t>();
  p.codes = args.shadow.codes.data<uint8_t>();
  p.scales = static_cast<__half*>(args.shadow.scales.ptr);
  p.num_tokens = args.positions.dim(0);
  p.max_pages = args.kv.page_table.dim(1);
  p.num_kv_heads = static_cast<int>(args.kv.k_pages.dim(1));
  p.page_size = static_cast<int>(args.kv.k_pages.dim(2));
  return p;
}

template <typename Stored>
void Launch(const AppendShadowArgs& args, cudaStream_t stream) {
  AppendShadowParams<Stored> params = MakeParams<Stored>(args);
  LaunchShape shape = {.grid = static_cast<unsigned>(
                           CeilDiv(params.num_tokens * params.num_kv_heads, kWarpsPerBlock)),
                       .block = kWarpsPerBlock * kWarpSize};
  DispatchHeadDim<Stored>(args.kv.k_pages.dim(3), [&](auto head_dim) {
    LaunchOverlapped("append_shadow", AppendShadowKernel<Stored, head_dim()>, shape, stream,
                     params);
  });
}

}  // namespace

void LaunchAppendShadow(const AppendShadowArgs& args, cudaStream_t stream) {
  if (args.positions.dim(0) == 0) return;
  CheckHeadDim("append_shadow", args.kv.k_pages.dim(3), args.kv.k_pages.dtype);
  if (args.kv.k_pages.dtype == DType::kFloat8) {
    Launch<Float8>(args, stream);
    return;
  }
  DispatchHalf(args.kv.k_pages.dtype, "append_shadow",
               [&](auto tag) { Launch<typename decltype(tag)::Type>(args, stream); });
}

}  // namespace tidal
