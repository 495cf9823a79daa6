// The tokens of one split of a row's cache, their pages looked up once and kept in shared memory.
//
// For kernels that read so little of a token that it is done with before a look into the page table
// is back, which under full load takes as long as any other load.
#pragma once

#include <cstdint>

#include "common/decode_split.cuh"
#include "common/paged_kv.cuh"

namespace tidal {

struct SplitPages {
  static constexpr int kCount = 2048;  // those behind them are looked up each time
  int32_t pages[kCount];
};

template <typename Stored>
class SplitTokens {
 public:
  // By all threads of the block.
  __device__ __forceinline__ SplitTokens(const PagedKvView<Stored>& kv, int batch, int kv_head,
                                         SplitSpan span, SplitPages& shared)
      : kv_(kv),
        batch_(batch),
        kv_head_(kv_head),
        pages_(shared.pages),
        first_page_(span.begin >> kv.page_shift) {
    int count = min(((span.end - 1) >> kv.page_shift) - first_page_ + 1, SplitPages::kCount);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      shared.pages[i] = kv.Page(batch, (first_page_ + i) << kv.page_shift);
    }
    __syncthreads();
  }

  // As of AttendedTokens: all tokens of the row are attended to.
  __device__ __forceinline__ int Position(int i) const { return i; }

  // The row of k and v of a position in the split; -1 of position -1.
  __device__ __forceinline__ int Row(int position) const {
    if (position < 0) return -1;
    int index = (position >> kv_.page_shift) - first_page_;
    int page = index < SplitPages::kCount ? pages_[index] : kv_.Page(batch_, position);
    return kv_.RowInPage(page, kv_head_, position);
  }

 private:
  const PagedKvView<Stored>& kv_;
  int batch_;
  int kv_head_;
  const int32_t* pages_;
  int first_page_;
};

}  // namespace tidal
