// The paged cache as kernels see it: where the K and V of a token lie (backend/op_args.h, PagedKv).
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "backend/op_args.h"
#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "tidal/error.h"

namespace tidal {

// Stored: the type of the cache's numbers, a 16-bit one or Float8.
template <typename Stored>
struct PagedKvView {
  const Stored* k;            // [num_pages * Hkv * page_size, D]: one row for each token and head
  const Stored* v;            // likewise
  const int32_t* page_table;  // [B, max_pages]
  const int32_t* seq_lens;    // [B]
  int max_pages;
  int num_kv_heads;
  int page_shift;  // log2(page_size)

  // Row of k and v that holds `token` < seq_len. Fits 32 bits (checked by MakePagedKvView); its
  // element offset does not, so multiply as int64_t.
  __device__ __forceinline__ int Row(int batch, int kv_head, int token) const {
    return RowInPage(Page(batch, token), kv_head, token);
  }

  // The same in two steps, between which the first one's latency can pass: the page...
  __device__ __forceinline__ int Page(int batch, int token) const {
    // From L2: read before WaitForPreviousKernel, the L1 might still hold the last step's table.
    return __ldcg(page_table + int64_t{batch} * max_pages + (token >> page_shift));
  }
  // ...and the token's row in it.
  __device__ __forceinline__ int RowInPage(int page, int kv_head, int token) const {
    int slot = token & ((1 << page_shift) - 1);
    return ((page * num_kv_heads + kv_head) << page_shift) + slot;
  }
};

// The row of k_pages and v_pages for KV head 0 of the token at `position`; that of head h is h *
// page_size further. `pages`: the sequence's page table.
__device__ __forceinline__ int64_t PagedRow(const int32_t* pages, int position, int num_kv_heads,
                                            int page_size) {
  int page = position / page_size;
  return int64_t{pages[page]} * num_kv_heads * page_size + position - page * page_size;
}

// Tokens of one CopyTokens call, whose rows are 4 KB at head_dim 128.
template <typename Stored>
inline constexpr int kCopyTokens = 32 / static_cast<int>(sizeof(Stored));

// Calls copy(target, source, present) for each 16-byte chunk that this lane is to copy of
// kCopyTokens tokens' rows of K or V: element `source` of the cache to element `target` of a
// swizzled tile (TileOffset). `row`: of token lane % kCopyTokens, from PagedKvView::Row, or -1: not
// present. One lane looks up each token; the row reaches the lanes that copy it by shuffle, so
// whole warps call this.
template <typename Stored, int kHeadDim, typename Copy>
__device__ __forceinline__ void ForEachChunk(int row, const Copy& copy) {
  constexpr int kChunk = kElementsOfChunk<Stored>, kChunks = kPaddedDim<kHeadDim> / kChunk;
  constexpr int kTokensPerPass = kWarpSize / kChunks;
  int lane = threadIdx.x % kWarpSize;
  int chunk = lane % kChunks;
  int first_target = TileOffset<kHeadDim, Stored>(lane / kChunks, chunk);
  constexpr int kPasses = kCopyTokens<Stored> / kTokensPerPass;
#pragma unroll(kPasses < 8 ? kPasses : 8)  // more addresses would leave others no registers
  for (int pass = 0; pass < kPasses; ++pass) {
    int token = pass * kTokensPerPass + lane / kChunks;
    int token_row = __shfl_sync(kFullWarp, row, token);
    int64_t source = int64_t{max(token_row, 0)} * kHeadDim + chunk * kChunk;
    int target = NextRows<kHeadDim, Stored>(first_target, pass * kTokensPerPass);
    if (kPaddedDim<kHeadDim> == kHeadDim || chunk < kHeadDim / kChunk) {
      copy(target, source, token_row >= 0);
    }
  }
}

// One warp starts the copies of kCopyTokens tokens' K and V into tiles in shared memory, as
// ForEachChunk lays them out; of a row -1 nothing is read, and the token's K and V are zeros.
// `policy`: none, or an L2 policy.
template <typename Stored, int kHeadDim, typename... Policy>
__device__ __forceinline__ void CopyTokens(Stored* key, Stored* value, const Stored* k,
                                           const Stored* v, int row, Policy... policy) {
  ForEachChunk<Stored, kHeadDim>(row, [&](int target, int64_t source, bool present) {
    CopyAsync16(key + target, k + source, present, policy...);
    CopyAsync16(value + target, v + source, present, policy...);
  });
}

// The same of K or V alone.
template <typename Stored, int kHeadDim, typename... Policy>
__device__ __forceinline__ void CopyRows(Stored* tile, const Stored* cache, int row,
                                         Policy... policy) {
  ForEachChunk<Stored, kHeadDim>(row, [&](int target, int64_t source, bool present) {
    CopyAsync16(tile + target, cache + source, present, policy...);
  });
}

template <typename Stored>
PagedKvView<Stored> MakePagedKvView(const char* op, const PagedKv& kv) {
  constexpr int64_t kMinPageSize = 8, kMaxPageSize = 256;
  int64_t page_size = kv.k_pages.dim(2);
  TIDAL_CHECK(page_size >= kMinPageSize && page_size <= kMaxPageSize &&
                  std::has_single_bit(static_cast<uint64_t>(page_size)),
              UnsupportedError, op, ": page_size ", page_size,
              " on CUDA; expected a power of two from ", kMinPageSize, " to ", kMaxPageSize);
  int64_t num_rows = kv.k_pages.dim(0) * kv.k_pages.dim(1) * page_size;
  TIDAL_CHECK(num_rows <= std::numeric_limits<int32_t>::max(), UnsupportedError, op,
              ": a cache of ", kv.k_pages.dim(0), " pages x ", kv.k_pages.dim(1), " KV heads x ",
              page_size, " tokens on CUDA; expected at most 2^31 - 1 rows (set num_pages lower)");
  return {.k = static_cast<const Stored*>(kv.k_pages.ptr),
          .v = static_cast<const Stored*>(kv.v_pages.ptr),
          .page_table = kv.page_table.data<int32_t>(),
          .seq_lens = kv.seq_lens.data<int32_t>(),
          .max_pages = static_cast<int>(kv.page_table.dim(1)),
          .num_kv_heads = static_cast<int>(kv.k_pages.dim(1)),
          .page_shift = std::countr_zero(static_cast<uint64_t>(page_size))};
}

}  // namespace tidal
