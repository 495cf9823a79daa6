#include "kernels/decode_pages.h"

#include "common/check.h"
#include "common/dispatch.h"
#include "common/float8.cuh"
#include "common/score_rule.cuh"

namespace tidal {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct DecodePagesParams {
  const Float8* k;            // [num_pages, page_numbers]
  const Float8* v;            // likewise
  const int32_t* page_table;  // [B, max_pages]
  const int32_t* seq_lens;    // [B]
  const int32_t* q_starts;    // [B + 1]
  T* decoded_k;               // [B * pages_of_row, page_numbers]
  T* decoded_v;               // likewise
  int32_t* decoded_table;     // [B, pages_of_row]
  int64_t page_numbers;       // of K or V, of all heads
  int64_t max_pages;
  int page_size;
  int window;
};

// Four codes in a row. Of one that is NaN all are (decode_warp.cuh).
template <typename T>
__device__ __forceinline__ uint2 DecodeFour(uint32_t codes) {
  if (HasFloat8Nan(codes)) return make_uint2(0x7fff7fffu, 0x7fff7fffu);
  uint32_t even = DecodeFloat8Pair<T>(codes << 8), odd = DecodeFloat8Pair<T>(codes);
  return make_uint2(__byte_perm(even, odd, kLowerHalves), __byte_perm(even, odd, kUpperHalves));
}

// grid (pages_of_row, B, 2): a block decodes K or V of one page.
template <typename T>
__global__ void __launch_bounds__(kThreads) DecodePagesKernel(const DecodePagesParams<T> p) {
  int page = blockIdx.x, row = blockIdx.y;
  bool is_v = blockIdx.z == 1;
  int64_t target = int64_t{row} * gridDim.x + page;
  if (threadIdx.x == 0 && !is_v) p.decoded_table[target] = static_cast<int32_t>(target);
  int seq_len = p.seq_lens[row], first_token = page * p.page_size;
  // Where the first tile of tokens begins that the first query sees any of.
  int first_position = seq_len - (p.q_starts[row + 1] - p.q_starts[row]);
  int begin = max(first_position - p.window + 1, 0) / kPromptTokens * kPromptTokens;
  if (first_token >= seq_len || first_token + p.page_size <= begin) return;
  int64_t source = p.page_table[row * p.max_pages + page];
  auto from = reinterpret_cast<const uint4*>((is_v ? p.v : p.k) + source * p.page_numbers);
  auto to = reinterpret_cast<uint4*>((is_v ? p.decoded_v : p.decoded_k) + target * p.page_numbers);
  for (int64_t i = threadIdx.x; i < p.page_numbers / 16; i += kThreads) {
    uint4 codes = from[i];
    uint2 a = DecodeFour<T>(codes.x), b = DecodeFour<T>(codes.y);
    uint2 c = DecodeFour<T>(codes.z), d = DecodeFour<T>(codes.w);
    to[2 * i] = make_uint4(a.x, a.y, b.x, b.y);
    to[2 * i + 1] = make_uint4(c.x, c.y, d.x, d.y);
  }
}

}  // namespace

PagedKv LaunchDecodePages(const AttentionPrefillArgs& args, int64_t pages_of_row, void* memory,
                          cudaStream_t stream) {
  const PagedKv& kv = args.kv;
  const DType dtype = args.q.dtype;
  const int64_t num_rows = kv.seq_lens.dim(0), num_pages = num_rows * pages_of_row;
  PagedKv decoded = kv;
  decoded.k_pages.dtype = decoded.v_pages.dtype = dtype;
  decoded.k_pages.shape[0] = decoded.v_pages.shape[0] = num_pages;
  decoded.k_pages.ptr = memory;
  decoded.v_pages.ptr = static_cast<char*>(memory) + decoded.k_pages.bytes();
  decoded.page_table = TensorView(static_cast<char*>(decoded.v_pages.ptr) + decoded.v_pages.bytes(),
                                  DType::kInt32, {num_rows, pages_of_row});
  DispatchHalf(dtype, "decode_pages", [&](auto tag) {
    using T = typename decltype(tag)::Type;
    DecodePagesParams<T> params = {
        .k = kv.k_pages.data<Float8>(),
        .v = kv.v_pages.data<Float8>(),
        .page_table = kv.page_table.data<int32_t>(),
        .seq_lens = kv.seq_lens.data<int32_t>(),
        .q_starts = args.q_starts.data<int32_t>(),
        .decoded_k = static_cast<T*>(decoded.k_pages.ptr),
        .decoded_v = static_cast<T*>(decoded.v_pages.ptr),
        .decoded_table = decoded.page_table.data<int32_t>(),
        .page_numbers = kv.k_pages.dim(1) * kv.k_pages.dim(2) * kv.k_pages.dim(3),
        .max_pages = kv.page_table.dim(1),
        .page_size = static_cast<int>(kv.k_pages.dim(2)),
        .window = PromptWindow(args.rule)};
    dim3 grid(static_cast<unsigned>(pages_of_row), static_cast<unsigned>(num_rows), 2);
    DecodePagesKernel<T><<<grid, kThreads, 0, stream>>>(params);
    TIDAL_LAUNCH_CHECK("decode_pages");
  });
  return decoded;
}

}  // namespace tidal
