// Microseconds per op of a decode step, through the Backend seam, as a decode step calls them:
// attention and selection, and the projections of Llama-3.1-8B; and of attention over prompts.
//
// Every row of a decode step runs one op on many caches (or weights) in turn, more than the L2
// holds, recorded as one step; the time is that of several replays queued back to back, divided by
// the ops in them, launch gaps included. Rows of prompts queue all chunks of one layer's attention
// one by one, with the engine's own kernel and, where it is installed, with cuDNN. Medians of
// `--samples` such measurements. Random data. One JSON line per row on stdout.
//
//   bench_ops [--samples 20] [--filter TEXT]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace tidal {
namespace {

struct Shape {
  std::string name;  // "gqa", "mha"
  int64_t num_q_heads;
  int64_t num_kv_heads;
};

struct Row {
  std::string op;
  Shape shape;
  int64_t batch_size;
  int64_t seq_len;
  int64_t token_budget = 0;
  Granularity granularity = Granularity::kKvHead;
  // select_top_k: below 1 an adaptive budget. attention_sparse: below 1 sets as such a budget might
  // leave them, of RaggedSize() positions.
  float top_p_mass = 1.0f;
  SetSizes set_sizes = SetSizes::kEqual;  // as the op is told
};

// Between 64 and token_budget, mostly few, now and then all: for 4096, 819 on average.
int64_t RaggedSize(int64_t set, int64_t token_budget) {
  constexpr int64_t kShares[] = {64, 32, 16, 8, 1, 32, 64, 4, 16, 2};
  return std::max<int64_t>(64, token_budget / kShares[set % std::ssize(kShares)]);
}

constexpr int64_t kHeadDim = 128;
constexpr int64_t kPageSize = 64;
constexpr DType kDType = DType::kBFloat16;
constexpr double kBytesPerReplay = 1.5e9;  // many times any L2
constexpr int64_t kMaxCaches = 32;

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

// A matrix product of a layer with what is fused to it.
struct Projection {
  std::string op;
  int64_t num_outputs;
  int64_t num_inputs;
};

// Llama-3.1-8B.
constexpr int64_t kHidden = 4096, kIntermediate = 14336, kQHeads = 32, kKvHeads = 8;
constexpr int64_t kVocab = 128256;

std::vector<Projection> Projections() {
  return {{"qkv_rope_append", (kQHeads + 2 * kKvHeads) * kHeadDim, kHidden},
          {"linear_o", kHidden, kQHeads * kHeadDim},
          {"gate_up_silu_mul", 2 * kIntermediate, kHidden},
          {"linear_down", kHidden, kIntermediate},
          {"norm_lm_head", kVocab, kHidden}};
}

std::vector<Row> Rows() {
  const Shape gqa = {"gqa", 32, 8}, mha = {"mha", 32, 32};
  std::vector<Row> rows;
  for (int64_t n : {10240, 32768, 131072}) rows.push_back({"attention_full", gqa, 1, n});
  for (int64_t n : {10240, 102400}) rows.push_back({"attention_full", mha, 1, n});
  rows.push_back({"attention_full", gqa, 8, 32768});
  rows.push_back({"attention_select", gqa, 1, 131072});
  rows.push_back({"select_top_k", gqa, 1, 131072, 1024});
  rows.push_back({"select_top_k", mha, 1, 102400, 1024, Granularity::kHead});
  rows.push_back({"select_top_k", gqa, 1, 131072, 4096});
  rows.push_back({"select_top_k", gqa, 1, 131072, 4096, Granularity::kKvHead, 0.98f});
  for (int64_t b : {1, 8}) rows.push_back({"attention_sparse", gqa, b, 131072 / b, 1024});
  for (int64_t b : {1, 8}) {
    rows.push_back({"attention_sparse", gqa, b, 131072 / b, 819});
    for (SetSizes sizes : {SetSizes::kEqual, SetSizes::kRagged}) {
      rows.push_back(
          {"attention_sparse", gqa, b, 131072 / b, 4096, Granularity::kKvHead, 0.98f, sizes});
    }
  }
  for (int64_t k : {256, 1024, 4096}) rows.push_back({"attention_sparse", mha, 1, 102400, k});
  return rows;
}

std::vector<PromptRow> PromptRows(int64_t default_chunk) {
  constexpr int64_t kPrompt = 32768;
  std::vector<PromptRow> rows = {{kPrompt - 8192, kPrompt, 8192}, {0, kPrompt, kPrompt}};
  for (int64_t chunk : {default_chunk, 4 * default_chunk}) rows.push_back({0, kPrompt, chunk});
  for (int64_t page_size : {16, 128}) rows.push_back({0, kPrompt, 8192, page_size});
  rows.push_back({0, default_chunk, default_chunk});
  return rows;
}

// One device buffer filled with random 16-bit floats; every cache is a window of it at its own
// offset.
class Bench {
 public:
  Bench(const Device& device, int samples,
        PrefillAttention prefill_attention = PrefillAttention::kOwn)
      : samples_(samples) {
    backend_ = MakeBackend({.device = device, .prefill_attention = prefill_attention});
  }

  BackendInfo info() const { return backend_->info(); }

  // The first line of the output: what the rows were measured on.
  void ReportDevice() const {
    std::string name = backend_->info().name, hardware;
    for (const DeviceStatus& status : ListDevices()) {
      if (status.name == name) hardware = status.hardware;
    }
    std::printf(
        "{\"benchmark\": \"bench_ops\", \"device\": \"%s\", \"dtype\": \"%s\", "
        "\"page_size\": %lld}\n",
        hardware.c_str(), DTypeName(kDType), static_cast<long long>(kPageSize));
  }

  void Run(const Row& row) {
    buffers_.clear();
    int64_t pages_per_row = (row.seq_len + kPageSize - 1) / kPageSize;
    int64_t num_pages = pages_per_row * row.batch_size;
    int64_t cache_bytes = 2 * num_pages * kPageSize * row.shape.num_kv_heads * kHeadDim * 2;
    int64_t read_bytes =
        row.op == "attention_sparse" ? 4 * kHeadDim * NumSelected(row) : cache_bytes;
    // Caches of sparse rows need not be whole: few of them already leave the L2 cold.
    auto wanted =
        static_cast<int64_t>(std::ceil(kBytesPerReplay / static_cast<double>(read_bytes)));
    int64_t num_caches = std::clamp<int64_t>(wanted, 4, kMaxCaches);
    int64_t memory = backend_->info().free_bytes / 2;
    num_caches = std::max<int64_t>(1, std::min(num_caches, memory / cache_bytes));

    Inputs in = MakeInputs(row, num_pages, pages_per_row, num_caches);
    std::function<void(int64_t)> op = OpOf(row, in);
    auto step = [&] {
      for (int64_t i = 0; i < num_caches; ++i) op(i);
    };
    backend_->RunStep({.batch_size = ++step_id_, .sparse = false}, step);
    backend_->RunStep({.batch_size = step_id_, .sparse = false}, step);
    Report(row, num_caches, read_bytes, Measure(step, num_caches));
  }

  void Run(const PromptRow& row) {
    buffers_.clear();
    std::vector<AttentionPrefillArgs> chunks = Chunks(row);
    auto prompt = [&] {
      for (const AttentionPrefillArgs& chunk : chunks) backend_->AttentionPrefill(chunk);
    };
    prompt();  // plans are made
    double us = MedianTime(prompt, 2);
    double tflops = 4.0 * kQHeads * kHeadDim * row.visible() / us * 1e-6;
    std::printf(
        "{\"op\": \"attention_prefill\", \"kernel\": \"%s\", \"num_q_heads\": %lld, "
        "\"num_kv_heads\": %lld, \"head_dim\": %lld, \"first\": %lld, \"seq_len\": %lld, "
        "\"chunk\": %lld, \"page_size\": %lld, \"median_of\": %d, \"us\": %.1f, "
        "\"tflop_per_s\": %.1f, \"of_matmul\": %.3f}\n",
        backend_->info().prefill_attention.c_str(), static_cast<long long>(kQHeads),
        static_cast<long long>(kKvHeads), static_cast<long long>(kHeadDim),
        static_cast<long long>(row.first), static_cast<long long>(row.end),
        static_cast<long long>(row.chunk), static_cast<long long>(row.page_size), samples_, us,
        tflops, tflops / kMatmulTflops);
    std::fflush(stdout);
  }

  void Run(const Projection& row, int64_t batch_size) {
    buffers_.clear();
    int64_t bytes = row.num_outputs * row.num_inputs * 2;
    auto num_weights =
        static_cast<int64_t>(std::ceil(kBytesPerReplay / static_cast<double>(bytes)));
    std::vector<TensorView> weights;
    for (int64_t i = 0; i < num_weights; ++i) {
      weights.push_back(RandomHalf({row.num_outputs, row.num_inputs}));
    }
    std::function<void(const TensorView&)> op = OpOf(row, batch_size);
    auto step = [&] {
      for (const TensorView& weight : weights) op(weight);
    };
    backend_->RunStep({.batch_size = ++step_id_, .sparse = false}, step);
    backend_->RunStep({.batch_size = step_id_, .sparse = false}, step);
    double us = Measure(step, num_weights);
    std::printf(
        "{\"op\": \"%s\", \"num_outputs\": %lld, \"num_inputs\": %lld, \"batch_size\": %lld, "
        "\"weights\": %lld, \"median_of\": %d, \"us\": %.2f, \"tb_per_s\": %.3f}\n",
        row.op.c_str(), static_cast<long long>(row.num_outputs),
        static_cast<long long>(row.num_inputs), static_cast<long long>(batch_size),
        static_cast<long long>(num_weights), samples_, us, static_cast<double>(bytes) / us * 1e-6);
    std::fflush(stdout);
  }

 private:
  struct Inputs {
    std::vector<PagedKv> caches;
    TensorView q, out, scores, lse, token_idx, num_selected;
  };

  TensorView Tensor(DType dtype, std::initializer_list<int64_t> shape) {
    TensorView view(nullptr, dtype, shape);
    buffers_.push_back(backend_->Allocate(view.bytes(), "benchmark data"));
    view.ptr = buffers_.back().data();
    return view;
  }

  // Positions in all sets of an attention_sparse row.
  static int64_t NumSelected(const Row& row) {
    int64_t total = 0;
    for (int64_t set = 0; set < row.batch_size * row.shape.num_kv_heads; ++set) {
      total += row.top_p_mass < 1.0f ? RaggedSize(set, row.token_budget) : row.token_budget;
    }
    return total;
  }

  // Random normal values; a block of them repeated, since generation is slower than the device.
  TensorView RandomHalf(std::initializer_list<int64_t> shape) {
    TensorView view = Tensor(kDType, shape);
    constexpr int64_t kBlock = (int64_t{1} << 22) + 7;  // odd: repeats do not line up with pages
    if (noise_.empty()) {
      std::mt19937 engine(1);
      std::normal_distribution<float> normal;
      for (int64_t i = 0; i < kBlock; ++i) noise_.push_back(FromFloat<BFloat16>(normal(engine)));
    }
    for (int64_t begin = 0; begin < view.numel(); begin += kBlock) {
      int64_t count = std::min(kBlock, view.numel() - begin);
      TensorView part(view.data<BFloat16>() + begin, kDType, {count});
      backend_->Upload(part, noise_.data());
    }
    return view;
  }

  TensorView Ints(const std::vector<int32_t>& values, std::initializer_list<int64_t> shape) {
    TensorView view = Tensor(DType::kInt32, shape);
    backend_->Upload(view, values.data());
    return view;
  }

  Inputs MakeInputs(const Row& row, int64_t num_pages, int64_t pages_per_row, int64_t num_caches) {
    std::mt19937 engine(2);
    int64_t b = row.batch_size, hq = row.shape.num_q_heads, hkv = row.shape.num_kv_heads;
    Inputs in;
    std::vector<int32_t> pages(static_cast<size_t>(num_pages));
    for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>(i);
    std::shuffle(pages.begin(), pages.end(), engine);
    TensorView page_table = Ints(pages, {b, pages_per_row});
    std::vector<int32_t> lens(static_cast<size_t>(b), static_cast<int32_t>(row.seq_len));
    TensorView seq_lens = Ints(lens, {b});
    for (int64_t i = 0; i < num_caches; ++i) {
      TensorView k = RandomHalf({num_pages, hkv, kPageSize, kHeadDim});
      TensorView v = RandomHalf({num_pages, hkv, kPageSize, kHeadDim});
      in.caches.push_back(
          {.k_pages = k, .v_pages = v, .page_table = page_table, .seq_lens = seq_lens});
    }
    in.q = RandomHalf({b, hq, kHeadDim});
    in.out = Tensor(kDType, {b, hq, kHeadDim});
    in.scores = Tensor(DType::kFloat32, {b, hq, row.seq_len});
    in.lse = Tensor(DType::kFloat32, {b, hq});
    if (row.token_budget > 0) {
      int64_t sets = NumSets(row.granularity, hq, hkv);
      if (row.op == "attention_sparse") sets = hkv;
      in.token_idx = Ints(RandomSets(b * sets, row.token_budget, row.seq_len, engine),
                          {b, sets, row.token_budget});
      std::vector<int32_t> counts(static_cast<size_t>(b * sets),
                                  static_cast<int32_t>(row.token_budget));
      for (size_t set = 0; row.top_p_mass < 1.0f && set < counts.size(); ++set) {
        counts[set] = static_cast<int32_t>(RaggedSize(static_cast<int64_t>(set), row.token_budget));
      }
      in.num_selected = Ints(counts, {b, sets});
    }
    // Real scores and lse for select_top_k.
    backend_->AttentionSelect({.attention = Attention(in, 0), .scores = in.scores, .lse = in.lse});
    return in;
  }

  // The calls of one layer, on pages in random order.
  std::vector<AttentionPrefillArgs> Chunks(const PromptRow& row) {
    int64_t num_pages = (row.end + row.page_size - 1) / row.page_size;
    std::vector<int32_t> pages(static_cast<size_t>(num_pages));
    std::iota(pages.begin(), pages.end(), 0);
    std::mt19937 engine(3);
    std::shuffle(pages.begin(), pages.end(), engine);
    PagedKv kv = {.k_pages = RandomHalf({num_pages, kKvHeads, row.page_size, kHeadDim}),
                  .v_pages = RandomHalf({num_pages, kKvHeads, row.page_size, kHeadDim}),
                  .page_table = Ints(pages, {1, num_pages}),
                  .seq_lens = {}};
    TensorView q = RandomHalf({row.chunk, kQHeads, kHeadDim});
    TensorView out = Tensor(kDType, {row.chunk, kQHeads, kHeadDim});
    std::vector<AttentionPrefillArgs> chunks;
    for (int64_t begin = row.first; begin < row.end; begin += row.chunk) {
      int64_t seq_len = std::min(begin + row.chunk, row.end), count = seq_len - begin;
      kv.seq_lens = Ints({static_cast<int32_t>(seq_len)}, {1});
      chunks.push_back({.q = q.Rows(0, count),
                        .q_starts = Ints({0, static_cast<int32_t>(count)}, {2}),
                        .kv = kv,
                        .sm_scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim)),
                        .out = out.Rows(0, count),
                        .max_q_len = count,
                        .max_seq_len = seq_len});
    }
    return chunks;
  }

  static std::vector<int32_t> RandomSets(int64_t num_sets, int64_t budget, int64_t seq_len,
                                         std::mt19937& engine) {
    std::vector<int32_t> all(static_cast<size_t>(seq_len)), sets;
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
    for (int64_t set = 0; set < num_sets; ++set) {
      std::vector<int32_t> chosen;
      std::sample(all.begin(), all.end(), std::back_inserter(chosen), budget, engine);
      sets.insert(sets.end(), chosen.begin(), chosen.end());
    }
    return sets;
  }

  static AttentionArgs Attention(const Inputs& in, int64_t cache) {
    return {.q = in.q,
            .kv = in.caches[static_cast<size_t>(cache)],
            .sm_scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim)),
            .out = in.out};
  }

  std::function<void(int64_t)> OpOf(const Row& row, const Inputs& in) {
    if (row.op == "attention_full") {
      return [&](int64_t i) { backend_->AttentionFull(Attention(in, i)); };
    }
    if (row.op == "attention_select") {
      return [&](int64_t i) {
        backend_->AttentionSelect(
            {.attention = Attention(in, i), .scores = in.scores, .lse = in.lse});
      };
    }
    if (row.op == "attention_sparse") {
      return [&](int64_t i) {
        backend_->AttentionSparse({.attention = Attention(in, i),
                                   .token_idx = in.token_idx,
                                   .num_selected = in.num_selected,
                                   .set_sizes = row.set_sizes,
                                   .dense_len = 0});
      };
    }
    return [&](int64_t) {
      backend_->SelectTopK({.scores = in.scores,
                            .lse = in.lse,
                            .seq_lens = in.caches[0].seq_lens,
                            .num_kv_heads = row.shape.num_kv_heads,
                            .granularity = row.granularity,
                            .pooling = Pooling::kSum,
                            .sink_tokens = 1,
                            .recent_tokens = 1,
                            .top_p_mass = row.top_p_mass,
                            .min_tokens = 64,
                            .token_idx = in.token_idx,
                            .num_selected = in.num_selected});
    };
  }

  std::function<void(const TensorView&)> OpOf(const Projection& row, int64_t b) {
    RmsNormArgs norm = {.x = Tensor(DType::kFloat32, {b, kHidden}),
                        .weight = RandomHalf({kHidden}),
                        .out = RandomHalf({b, kHidden}),
                        .eps = 1e-5f};
    LinearArgs linear = {.x = norm.out, .weight = {}, .bias = {}, .out = {}};
    if (row.op == "linear_o" || row.op == "linear_down") {
      linear.x = RandomHalf({b, row.num_inputs});
      linear.out = Tensor(DType::kFloat32, {b, kHidden});
      linear.output = LinearOutput::kAccumulate;
      return [=, this](const TensorView& weight) mutable {
        linear.weight = weight;
        backend_->Linear(linear);
      };
    }
    linear.out = Tensor(row.op == "norm_lm_head" ? DType::kFloat32 : kDType, {b, row.num_outputs});
    if (row.op == "norm_lm_head") {
      return [=, this](const TensorView& weight) mutable {
        linear.weight = weight;
        backend_->NormLinear({norm, linear});
      };
    }
    if (row.op == "gate_up_silu_mul") {
      SiluMulArgs silu_mul = {.gate_up = linear.out, .out = Tensor(kDType, {b, kIntermediate})};
      return [=, this](const TensorView& weight) mutable {
        linear.weight = weight;
        backend_->GateUpSiluMul({norm, linear, silu_mul});
      };
    }
    std::vector<int32_t> rows(static_cast<size_t>(b));
    std::iota(rows.begin(), rows.end(), 0);
    TensorView ids = Ints(rows, {b});
    TensorView table = Ints(rows, {b, 1});
    RopeAppendKvArgs append = {.qkv = linear.out,
                               .cos_sin = Tensor(DType::kFloat32, {b, kHeadDim}),
                               .q_norm = {},
                               .k_norm = {},
                               .positions = ids,
                               .seq_idx = ids,
                               .q = Tensor(kDType, {b, kQHeads, kHeadDim}),
                               .kv = {.k_pages = Tensor(kDType, {b, kKvHeads, kPageSize, kHeadDim}),
                                      .v_pages = Tensor(kDType, {b, kKvHeads, kPageSize, kHeadDim}),
                                      .page_table = table,
                                      .seq_lens = ids}};
    return [=, this](const TensorView& weight) mutable {
      linear.weight = weight;
      backend_->QkvRopeAppend({norm, linear, append});
    };
  }

  void Wait() {
    float ignored[1];
    TensorView first = buffers_.front().bytes() >= 4
                           ? TensorView(buffers_.front().data(), DType::kFloat32, {1})
                           : TensorView();
    backend_->Download(ignored, first);
  }

  double Measure(const std::function<void()>& step, int64_t ops_per_step) {
    auto replay = [&] { backend_->RunStep({.batch_size = step_id_, .sparse = false}, step); };
    return MedianTime(replay, 10) / static_cast<double>(ops_per_step);
  }

  // Microseconds of one call of `work`, `repeats` of them queued back to back.
  double MedianTime(const std::function<void()>& work, int repeats) {
    constexpr int kWarmUp = 2;
    std::vector<double> us;
    for (int sample = 0; sample < samples_ + kWarmUp; ++sample) {
      Wait();
      auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < repeats; ++i) work();
      Wait();
      std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
      if (sample >= kWarmUp) us.push_back(elapsed.count() / repeats);
    }
    std::nth_element(us.begin(), us.begin() + samples_ / 2, us.end());
    return us[static_cast<size_t>(samples_ / 2)];
  }

  void Report(const Row& row, int64_t num_caches, int64_t bytes, double us) const {
    std::printf(
        "{\"op\": \"%s\", \"shape\": \"%s\", \"num_q_heads\": %lld, \"num_kv_heads\": %lld, "
        "\"head_dim\": %lld, \"batch_size\": %lld, \"seq_len\": %lld, \"token_budget\": %lld, "
        "\"top_p_mass\": %.2f, \"set_sizes\": \"%s\", \"caches\": %lld, \"median_of\": %d, "
        "\"us\": %.2f, \"tb_per_s\": %.3f}\n",
        row.op.c_str(), row.shape.name.c_str(), static_cast<long long>(row.shape.num_q_heads),
        static_cast<long long>(row.shape.num_kv_heads), static_cast<long long>(kHeadDim),
        static_cast<long long>(row.batch_size), static_cast<long long>(row.seq_len),
        static_cast<long long>(row.token_budget), static_cast<double>(row.top_p_mass),
        row.set_sizes == SetSizes::kRagged ? "ragged" : "equal", static_cast<long long>(num_caches),
        samples_, us, row.op == "select_top_k" ? 0.0 : static_cast<double>(bytes) / us * 1e-6);
    std::fflush(stdout);
  }

  int samples_;
  std::unique_ptr<Backend> backend_;
  std::vector<Buffer> buffers_;
  std::vector<BFloat16> noise_;
  int64_t step_id_ = 0;
};

}  // namespace
}  // namespace tidal

int main(int argc, char** argv) {
  int samples = 20;
  std::string filter;
  for (int i = 1; i + 1 < argc; i += 2) {
    std::string option = argv[i], value = argv[i + 1];
    if (option == "--samples") samples = std::stoi(value);
    if (option == "--filter") filter = value;
  }
  try {
    const tidal::Device device = {tidal::DeviceType::kCuda, 0};
    tidal::Bench bench(device, samples);
    bench.ReportDevice();
    if (std::string("attention_prefill").find(filter) != std::string::npos) {
      std::vector<tidal::PromptRow> rows = tidal::PromptRows(bench.info().prefill_chunk);
      tidal::Bench cudnn(device, samples, tidal::PrefillAttention::kCudnn);
      bool has_cudnn = cudnn.info().prefill_attention.rfind("cuDNN", 0) == 0;
      for (const tidal::PromptRow& row : rows) {
        bench.Run(row);
        if (has_cudnn) cudnn.Run(row);
      }
    }
    for (const tidal::Row& row : tidal::Rows()) {
      if (row.op.find(filter) != std::string::npos) bench.Run(row);
    }
    for (int64_t batch_size : {1, 4, 8, 16}) {
      for (const tidal::Projection& row : tidal::Projections()) {
        if (row.op.find(filter) != std::string::npos) bench.Run(row, batch_size);
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_ops: %s\n", error.what());
    return 1;
  }
}
