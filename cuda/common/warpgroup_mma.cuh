// Matrix products of a warpgroup, four warps together, by the tensor cores of compute capability
// 9.0 (PTX ISA, wgmma; only in code compiled for sm_90a). They run beside the warps that issue
// them.
//
// d += a . b with d [64 x N] float32 in registers, a [64 x 16] in shared memory or registers, b
// [16 x N] in shared memory. Warp w of the group holds rows 16w to 16w + 15 of d and a, spread as
// mma.m16n8k16 spreads them (common/mma.cuh): d[n * 4 + c] is element c of the 8-column tile n.
//
// Operands in shared memory are panels: rows of 64 16-bit elements, 128 bytes, in which the 16-byte
// chunk c of row r stands at c ^ (r % 8), the 128-byte swizzle of the copy engine
// (common/tensor_copy.cuh). A panel begins at a multiple of 1024 bytes, where that pattern does.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/shared_barrier.cuh"

namespace tidal {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupRows = 64;   // the M of every product
inline constexpr int kProductDepth = 16;    // the K
inline constexpr int kPanelElements = 64;   // of a row of a panel
inline constexpr int kPanelRowBytes = 128;  // of its place in shared memory
inline constexpr int kPanelAlignment = 1024;

// Element offset of a 16-byte chunk of a row of a panel.
__device__ __forceinline__ int PanelOffset(int row, int chunk) {
  return row * kPanelElements + ((chunk ^ (row & 7)) * 8);
}

// Names an operand to a product: where it begins, in 16-byte units, and its strides. One added to
// it is the same operand 16 bytes further.
using MatrixDescriptor = uint64_t;

__device__ __forceinline__ MatrixDescriptor Descriptor(const void* shared, int leading_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = 8 * kPanelRowBytes;  // the stride between groups of 8 rows
  uint64_t address = SharedAddress(shared) & 0x3ffff;
  return address >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 | (kEightRows >> 4) << 32 |
         kSwizzle128;
}

// Panels whose rows are rows of a, or columns of b: elements along a row are neighbours in the
// product's depth. The panels are what the depth is cut into.
__device__ __forceinline__ MatrixDescriptor RowsDescriptor(const void* shared) {
  return Descriptor(shared, 16);  // the leading stride is not used
}

// Panels of b whose rows are neighbours in the product's depth: N is along the rows and cut into
// panels, `panel_bytes` apart.
__device__ __forceinline__ MatrixDescriptor DepthDescriptor(const void* shared, int panel_bytes) {
  return Descriptor(shared, panel_bytes);
}

// What one product further in depth adds to a descriptor, within a panel.
inline constexpr int kNextRowsDepth = kProductDepth * 2 / 16;
inline constexpr int kNextDepthRows = kProductDepth * kPanelRowBytes / 16;

// Before the first product after other code has touched registers of d or a.
__device__ __forceinline__ void BeginProducts() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

// Closes a group: all products since the last commit.
__device__ __forceinline__ void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most kPending of the newest groups are still under way. This warp's part of the
// others is done, and it alone may take it for done.
template <int kPending>
__device__ __forceinline__ void WaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// The compiler does not see that products run on after they were issued. On both sides of that
// time, this keeps what is done with their registers on its own side.
template <int kCount>
__device__ __forceinline__ void PinRegisters(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void PinRegisters(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

#define TIDAL_D8(d, i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define TIDAL_D32(d, i) TIDAL_D8(d, i), TIDAL_D8(d, i + 8), TIDAL_D8(d, i + 16), TIDAL_D8(d, i + 24)
#define TIDAL_OPERANDS_0_31                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, "                                                                                      \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TIDAL_OPERANDS_32_63                                                                   \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, "                                                                                      \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define TIDAL_MULTIPLY_SHARED_N128(type)                                                    \
  asm volatile(                                                                             \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                          \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" TIDAL_OPERANDS_0_31 \
      ", " TIDAL_OPERANDS_32_63 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"                          \
      : TIDAL_D32(d, 0), TIDAL_D32(d, 32)                                                   \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define TIDAL_MULTIPLY_N128(type)                                                           \
  asm volatile(                                                                             \
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                            \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" TIDAL_OPERANDS_0_31 \
      ", " TIDAL_OPERANDS_32_63 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"            \
      : TIDAL_D32(d, 0), TIDAL_D32(d, 32)                                                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define TIDAL_MULTIPLY_N64(type)                                                           \
  asm volatile(                                                                            \
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" TIDAL_OPERANDS_0_31 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"                                     \
      : TIDAL_D32(d, 0)                                                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d (+)= a . b, N = 128; a and b named by RowsDescriptor. Unless `accumulate`, d starts at zero.
template <typename T>
__device__ __forceinline__ void MultiplyShared(float (&d)[64], MatrixDescriptor a,
                                               MatrixDescriptor b, bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    TIDAL_MULTIPLY_SHARED_N128("bf16");
  } else {
    TIDAL_MULTIPLY_SHARED_N128("f16");
  }
}

// d += a . b, N = kCount * 2; a in registers, b named by DepthDescriptor.
template <typename T, int kCount>
__device__ __forceinline__ void MultiplyRegisters(float (&d)[kCount], const uint32_t (&a)[4],
                                                  MatrixDescriptor b) {
  static_assert(kCount == 32 || kCount == 64);
  constexpr bool kIsBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kCount == 64 && kIsBFloat16) {
    TIDAL_MULTIPLY_N128("bf16");
  } else if constexpr (kCount == 64) {
    TIDAL_MULTIPLY_N128("f16");
  } else if constexpr (kIsBFloat16) {
    TIDAL_MULTIPLY_N64("bf16");
  } else {
    TIDAL_MULTIPLY_N64("f16");
  }
}

#undef TIDAL_D8
#undef TIDAL_D32
#undef TIDAL_OPERANDS_0_31
#undef TIDAL_OPERANDS_32_63
#undef TIDAL_MULTIPLY_SHARED_N128
#undef TIDAL_MULTIPLY_N128
#undef TIDAL_MULTIPLY_N64

// Registers a thread from now on; by all warps of a warpgroup. Those that the block was launched
// with are handed from groups that need few to groups that need many.
template <int kRegisters>
__device__ __forceinline__ void ReleaseRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void ClaimRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Barriers of some warps of a block, by number; 0 is that of __syncthreads. One completes when
// `num_threads` have come to it, in either way; those that only arrive do not wait.
__device__ __forceinline__ void SyncThreads(int barrier, int num_threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;\n" ::"r"(barrier), "r"(num_threads) : "memory");
}
__device__ __forceinline__ void ArriveThreads(int barrier, int num_threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;\n" ::"r"(barrier), "r"(num_threads) : "memory");
}

}  // namespace tidal
