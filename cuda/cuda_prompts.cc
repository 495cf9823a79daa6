// Attention of prompts, and of few tokens of a row, on CUDA: which kernel does it.
#include <algorithm>

#include "backend/check_args.h"
#include "common/dispatch.h"
#include "cuda_backend.h"
#include "cuda_dtypes.h"
#include "kernels/attention_few_queries.h"
#include "kernels/attention_prefill.h"
#include "kernels/decode_pages.h"

namespace tidal {

void CudaBackend::AttentionPrefill(const AttentionPrefillArgs& args) {
  Enter();
  Check(args);
  CheckSameDType("attention_prefill", {&args.q, &args.out});
  CheckCacheDType("attention_prefill", args.q, args.kv);
  if (batch_invariant_ ? in_step_ : HasFewQueries(args)) {
    LaunchAttentionFewQueries(args, ScratchFor(args.q, args.kv), stream());
  } else if (PrefillByCudnn(args)) {
    return;
  } else if (args.kv.k_pages.dtype == DType::kFloat8) {
    PrefillDecoded(args);
  } else {
    LaunchAttentionPrefill(args, ScratchFor(args.q, args.kv), stream());
  }
}

bool CudaBackend::PrefillByCudnn(const AttentionPrefillArgs& args) {
  // Plans are made when they are first asked for, and a recorded step may not wait for that. They
  // know scores of sm_scale * q.k alone.
  const AttentionRule& rule = args.rule;
  if (!cudnn_attention_ || in_step_) return false;
  if (rule.window > 0 || rule.softcap != 0.0f || rule.sinks) return false;
  TIDAL_CHECK(args.kv.k_pages.dtype != DType::kFloat8, UnsupportedError,
              "prefill_attention: cuDNN was asked for, but the cache is fp8");
  TIDAL_CHECK(cudnn_attention_->Run(args), UnsupportedError,
              "prefill_attention: cuDNN was asked for, but ", cudnn_attention_->problem());
  return true;
}

// Decodes the cache first: for 4,096 tokens behind 131,072 that is about 1 % of the attention (8 KV
// heads of 128, by the bytes).
void CudaBackend::PrefillDecoded(const AttentionPrefillArgs& args) {
  const TensorView& pages = args.kv.k_pages;
  const int64_t num_rows = args.kv.seq_lens.dim(0);
  const int64_t pages_of_row = CeilDiv(args.max_seq_len, pages.dim(2));
  if (num_rows == 0 || pages_of_row == 0) return;
  const int64_t row_bytes =
      DecodedRowBytes(args.max_seq_len, pages.dim(1), pages.dim(2), pages.dim(3));
  void* memory = Grow(decoded_pages_, row_bytes, kDecodedPagesPurpose);
  const int64_t most = decoded_pages_.bytes() / row_bytes;
  for (int64_t row = 0; row < num_rows; row += most) {
    const int64_t count = std::min(most, num_rows - row);
    AttentionPrefillArgs part = args;
    part.q_starts = args.q_starts.Rows(row, count + 1);
    part.kv.page_table = args.kv.page_table.Rows(row, count);
    part.kv.seq_lens = args.kv.seq_lens.Rows(row, count);
    part.kv = LaunchDecodePages(part, pages_of_row, memory, stream());
    LaunchAttentionPrefill(part, ScratchFor(part.q, part.kv), stream());
  }
}

}  // namespace tidal
