#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "rows.h"

namespace tidal {
namespace {

// One layer's attention over the tokens [first, end) of a prompt, `chunk` at a time.
struct PromptRow {
  int64_t first;
  int64_t end;
  int64_t chunk;
  int64_t page_size = kPageSize;

  // Tokens that all queries see together.
  double visible() const {
    auto sum = [](int64_t n) { return 0.5 * static_cast<double>(n) * static_cast<double>(n + 1); };
    return sum(end) - sum(first);
  }
};

// Dense bfloat16 products reach this on an H200 (cuBLASLt, 8192^3): what shares are given of.
constexpr double kMatmulTflops = 790;

std::vector<PromptRow> PromptRows(int64_t default_chunk) {
  constexpr int64_t kPrompt = 32768;
  std::vector<PromptRow> rows = {{kPrompt - 8192, kPrompt, 8192}, {0, kPrompt, kPrompt}};
  for (int64_t chunk : {default_chunk, 4 * default_chunk}) rows.push_back({0, kPrompt, chunk});
  for (int64_t page_size : {8, 16, 128}) rows.push_back({0, kPrompt, 8192, page_size});
  rows.push_back({0, default_chunk, default_chunk});
  return rows;
}

// One chunk of each length behind each context.
std::vector<PromptRow> RowsBehind() {
  std::vector<PromptRow> rows;
  for (int64_t first : {16384, 65536, 131072}) {
    for (int64_t chunk : {16, 64, 128, 256, 384, 448, 512, 544, 640, 1024, 1152, 2048, 4096}) {
      rows.push_back({first, first + chunk, chunk});
    }
  }
  return rows;
}

// The calls of one layer, on pages in random order.
std::vector<AttentionPrefillArgs> Chunks(BenchDevice& bench, const PromptRow& row) {
  int64_t num_pages = (row.end + row.page_size - 1) / row.page_size;
  PagedKv kv = {.k_pages = bench.RandomHalf({num_pages, kKvHeads, row.page_size, kHeadDim}),
                .v_pages = bench.RandomHalf({num_pages, kKvHeads, row.page_size, kHeadDim}),
                .page_table = bench.PageTable(1, num_pages),
                .seq_lens = {}};
  TensorView q = bench.RandomHalf({row.chunk, kQHeads, kHeadDim});
  TensorView out = bench.Tensor(kDType, {row.chunk, kQHeads, kHeadDim});
  std::vector<AttentionPrefillArgs> chunks;
  for (int64_t begin = row.first; begin < row.end; begin += row.chunk) {
    int64_t seq_len = std::min(begin + row.chunk, row.end), count = seq_len - begin;
    kv.seq_lens = bench.Ints({static_cast<int32_t>(seq_len)}, {1});
    chunks.push_back({.q = q.Rows(0, count),
                      .q_starts = bench.Ints({0, static_cast<int32_t>(count)}, {2}),
                      .kv = kv,
                      .rule = {.sm_scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim))},
                      .out = out.Rows(0, count),
                      .max_q_len = count,
                      .max_seq_len = seq_len});
  }
  return chunks;
}

struct Kernel {
  BenchDevice& bench;
  std::string name;
};

void Measure(const char* op, const Kernel& kernel, const PromptRow& row) {
  BenchDevice& bench = kernel.bench;
  bench.Clear();
  std::vector<AttentionPrefillArgs> chunks = Chunks(bench, row);
  auto prompt = [&] {
    for (const AttentionPrefillArgs& chunk : chunks) bench.backend().AttentionPrefill(chunk);
  };
  prompt();  // plans are made
  double us = bench.MedianTime(prompt, 2);
  double tflops = 4.0 * kQHeads * kHeadDim * row.visible() / us * 1e-6;
  std::printf(
      "{\"op\": \"%s\", \"kernel\": \"%s\", \"num_q_heads\": %lld, "
      "\"num_kv_heads\": %lld, \"head_dim\": %lld, \"first\": %lld, \"seq_len\": %lld, "
      "\"chunk\": %lld, \"page_size\": %lld, \"median_of\": %d, \"us\": %.1f, "
      "\"tflop_per_s\": %.1f, \"of_matmul\": %.3f}\n",
      op, kernel.name.c_str(), static_cast<long long>(kQHeads), static_cast<long long>(kKvHeads),
      static_cast<long long>(kHeadDim), static_cast<long long>(row.first),
      static_cast<long long>(row.end), static_cast<long long>(row.chunk),
      static_cast<long long>(row.page_size), bench.samples(), us, tflops, tflops / kMatmulTflops);
  std::fflush(stdout);
}

void MeasurePrompts(BenchDevice& bench) {
  BenchDevice cudnn(
      {.device = bench.backend().info().device, .prefill_attention = PrefillAttention::kCudnn},
      bench.samples());
  const std::string with = cudnn.backend().info().prefill_attention;
  bool has_cudnn = with.rfind("cuDNN", 0) == 0;
  for (const PromptRow& row : PromptRows(bench.backend().info().prefill_chunk)) {
    Measure("attention_prefill", {bench, bench.backend().info().prefill_attention}, row);
    if (has_cudnn) Measure("attention_prefill", {cudnn, with}, row);
  }
}

void MeasureBehind(BenchDevice& bench) {
  BenchDevice unsplit({.device = bench.backend().info().device, .batch_invariant = true},
                      bench.samples());
  for (const PromptRow& row : RowsBehind()) {
    Measure("attention_prefill_behind", {bench, bench.backend().info().prefill_attention}, row);
    Measure("attention_prefill_behind", {unsplit, "own kernel, batch-invariant"}, row);
  }
}

}  // namespace

void MeasurePromptAttention(BenchDevice& bench, const std::string& filter) {
  auto is_wanted = [&](const char* op) {
    return std::string(op).find(filter) != std::string::npos;
  };
  if (is_wanted("attention_prefill")) MeasurePrompts(bench);
  if (is_wanted("attention_prefill_behind")) MeasureBehind(bench);
}

}  // namespace tidal
