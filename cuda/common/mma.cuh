// Warp-wide matrix instructions on 16-bit tiles (PTX ISA: ldmatrix, movmatrix, mma.m16n8k16).
//
// Fragments, for lane l with g = l / 4 and t = l % 4; a register holds two neighbours along k (or
// n):
//   A [16 x 16]: a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8)
//   B [16 x 8]:  b0 (k = 2t, n = g), b1 (k = 2t + 8, n = g)
//   C [16 x 8]:  c0 (g, 2t), c1 (g, 2t + 1), c2 (g + 8, 2t), c3 (g + 8, 2t + 1), float32
// mma.m16n8k32 is the same on bytes: a register holds four neighbours along k, so 2t above is 4t
// and 2t + 8 is 4t + 16; C is int32. Tiles in shared memory are rows of kPaddedDim elements of 16
// or 8 bits in 16-byte chunks, swizzled by TileOffset.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/launch_config.h"

namespace tidal {

template <typename Element>
inline constexpr int kElementsOfChunk = 16 / static_cast<int>(sizeof(Element));
inline constexpr int kChunkElements = kElementsOfChunk<uint16_t>;

// Rows of a tile that span all banks together: 128 bytes or more.
template <int kHeadDim, typename Element>
inline constexpr int kRowsOfLine = kPaddedDim<kHeadDim> / kElementsOfChunk<Element> < 8 ? 2 : 1;

// Element offset of a 16-byte chunk of a row. The exclusive-or spreads one chunk column of 8
// consecutive rows over all 32 banks, which makes ldmatrix and the row-wise copies conflict-free.
template <int kHeadDim, typename Element = uint16_t>
__device__ __forceinline__ int TileOffset(int row, int chunk) {
  constexpr int kChunk = kElementsOfChunk<Element>, kRows = kRowsOfLine<kHeadDim, Element>;
  constexpr int kRow = kPaddedDim<kHeadDim>;
  static_assert(kRows * kRow % (8 * kChunk) == 0, "a line must span all banks");
  int line = row / kRows, chunk_of_line = row % kRows * (kRow / kChunk) + chunk;
  return line * (kRows * kRow) + ((chunk_of_line ^ (line & 7)) * kChunk);
}

// TileOffset(row, chunk + even_chunks) from TileOffset(row, chunk), for chunk 0 or 1 and an even
// number of chunks: the additions touch bits of their own, so one exclusive-or is all.
template <typename Element = uint16_t>
__device__ __forceinline__ int NextChunks(int tile_offset, int even_chunks) {
  return tile_offset ^ (even_chunks * kElementsOfChunk<Element>);
}

// TileOffset(row + rows, chunk) from TileOffset(row, chunk), for rows a multiple of a power of two
// > row, and whole lines.
template <int kHeadDim, typename Element = uint16_t>
__device__ __forceinline__ int NextRows(int tile_offset, int rows) {
  int lines = rows / kRowsOfLine<kHeadDim, Element>;
  return (tile_offset ^ ((lines & 7) * kElementsOfChunk<Element>)) + rows * kPaddedDim<kHeadDim>;
}

// Loads four 8 x 8 matrices; lane l passes the address of row l % 8 of matrix l / 8, and receives
// of matrix i in r[i] the elements (g, 2t) and (g, 2t + 1).
__device__ __forceinline__ void LoadMatrix4(uint32_t (&r)[4], const void* row) {
  auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed: r[i] holds the stored elements (2t, g) and (2t + 1, g).
__device__ __forceinline__ void LoadMatrix4Transposed(uint32_t (&r)[4], const void* row) {
  auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Transposes an 8 x 8 matrix held one register a lane: (g, 2t), (g, 2t + 1) become (2t, g), (2t +
// 1, g).
__device__ __forceinline__ uint32_t TransposeMatrix(uint32_t elements) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n"
               : "=r"(transposed)
               : "r"(elements));
  return transposed;
}

// Two floats rounded to T; `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t PackPair(float low, float high);
template <>
__device__ __forceinline__ uint32_t PackPair<__nv_bfloat16>(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t PackPair<__half>(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}

// c += a . b, [16 x 16] times [16 x 8].
template <typename T>
__device__ __forceinline__ void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1);
template <>
__device__ __forceinline__ void MultiplyAdd<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                           uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void MultiplyAdd<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a . b, [16 x 32] of uint8 times [32 x 8] of int8.
__device__ __forceinline__ void MultiplyAddCodes(int (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace tidal
