#include <cmath>
#include <cstdio>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "rows.h"

namespace tidal {
namespace {

// A matrix product of a layer with what is fused to it.
struct Projection {
  std::string op;
  int64_t num_outputs;
  int64_t num_inputs;
};

std::vector<Projection> Projections() {
  return {{"qkv_rope_append", (kQHeads + 2 * kKvHeads) * kHeadDim, kHidden},
          {"linear_o", kHidden, kQHeads * kHeadDim},
          {"gate_up_silu_mul", 2 * kIntermediate, kHidden},
          {"linear_down", kHidden, kIntermediate},
          {"norm_lm_head", kVocab, kHidden}};
}

// How a weight is kept.
struct Kept {
  const char* name;
  WeightCodes codes = WeightCodes::kNone;
  int64_t group_size = 0;  // 0: all inputs
  bool quantizes_inputs = false;
};
constexpr Kept kKept[] = {{"16 bit"},
                          {"float8", WeightCodes::kFloat8},
                          {"float8, groups of 128", WeightCodes::kFloat8, 128},
                          {"int4, groups of 128", WeightCodes::kInt4, 128}};
// float8 without rounded inputs is not among them: a decoder decodes such a weight first, for which
// it has reserved memory, and here it would go through the kernels for few tokens.
constexpr Kept kKeptForPrompts[] = {
    {"16 bit"},
    {"float8, inputs too", WeightCodes::kFloat8, 0, true},
    {"float8, inputs too, groups of 128", WeightCodes::kFloat8, 128, true}};
constexpr const char* kPromptOp = "prompt_linear";

// A random weight: any bits are codes.
Weight MakeWeight(BenchDevice& bench, const Projection& row, const Kept& kept) {
  const int64_t outputs = row.num_outputs, inputs = row.num_inputs;
  if (kept.codes == WeightCodes::kNone) return bench.RandomHalf({outputs, inputs});
  const int64_t row_bytes = kept.codes == WeightCodes::kInt4 ? inputs / 2 : inputs;
  const TensorView bits = bench.RandomHalf({outputs, row_bytes / 2});
  Weight weight(TensorView(bits.ptr, DType::kUInt8, {outputs, row_bytes}));
  weight.codes = kept.codes;
  weight.group_size = kept.group_size == 0 ? inputs : kept.group_size;
  const DType scale_dtype = kept.quantizes_inputs ? DType::kFloat32 : kDType;
  weight.scales = bench.Random(scale_dtype, {inputs / weight.group_size, outputs});
  return weight;
}

std::function<void(const Weight&)> OpOf(BenchDevice& bench, const Projection& row, int64_t b) {
  RmsNormArgs norm = {.x = bench.Tensor(DType::kFloat32, {b, kHidden}),
                      .weight = bench.RandomHalf({kHidden}),
                      .out = bench.RandomHalf({b, kHidden}),
                      .eps = 1e-5f};
  LinearArgs linear = {.x = norm.out, .weight = {}, .bias = {}, .out = {}};
  if (row.op == "linear_o" || row.op == "linear_down") {
    linear.x = bench.RandomHalf({b, row.num_inputs});
    linear.out = bench.Tensor(DType::kFloat32, {b, kHidden});
    linear.output = LinearOutput::kAccumulate;
    return [=, &bench](const Weight& weight) mutable {
      linear.weight = weight;
      bench.backend().Linear(linear);
    };
  }
  linear.out =
      bench.Tensor(row.op == "norm_lm_head" ? DType::kFloat32 : kDType, {b, row.num_outputs});
  if (row.op == "norm_lm_head") {
    return [=, &bench](const Weight& weight) mutable {
      linear.weight = weight;
      bench.backend().NormLinear({norm, linear});
    };
  }
  if (row.op == "gate_up_silu_mul") {
    GateMulArgs gate_mul = {.gate_up = linear.out, .out = bench.Tensor(kDType, {b, kIntermediate})};
    return [=, &bench](const Weight& weight) mutable {
      linear.weight = weight;
      bench.backend().GateUpMul({norm, linear, gate_mul});
    };
  }
  std::vector<int32_t> rows(static_cast<size_t>(b));
  std::iota(rows.begin(), rows.end(), 0);
  TensorView ids = bench.Ints(rows, {b});
  TensorView table = bench.Ints(rows, {b, 1});
  RopeAppendKvArgs append = {
      .qkv = linear.out,
      .cos_sin = bench.Tensor(DType::kFloat32, {b, kHeadDim}),
      .q_norm = {},
      .k_norm = {},
      .positions = ids,
      .seq_idx = ids,
      .q = bench.Tensor(kDType, {b, kQHeads, kHeadDim}),
      .kv = {.k_pages = bench.Tensor(kDType, {b, kKvHeads, kPageSize, kHeadDim}),
             .v_pages = bench.Tensor(kDType, {b, kKvHeads, kPageSize, kHeadDim}),
             .page_table = table,
             .seq_lens = ids}};
  return [=, &bench](const Weight& weight) mutable {
    linear.weight = weight;
    bench.backend().QkvRopeAppend({norm, linear, append});
  };
}

void Measure(BenchDevice& bench, const Projection& row, const Kept& kept, int64_t batch_size) {
  bench.Clear();
  const Weight first = MakeWeight(bench, row, kept);
  const int64_t bytes = first.data.bytes() + (first.is_coded() ? first.scales.bytes() : 0);
  auto num_weights = static_cast<int64_t>(std::ceil(kBytesPerReplay / static_cast<double>(bytes)));
  std::vector<Weight> weights = {first};
  for (int64_t i = 1; i < num_weights; ++i) weights.push_back(MakeWeight(bench, row, kept));
  std::function<void(const Weight&)> op = OpOf(bench, row, batch_size);
  auto step = [&] {
    for (const Weight& weight : weights) op(weight);
  };
  double us = bench.TimeOfStep(step, num_weights);
  std::printf(
      "{\"op\": \"%s\", \"weight\": \"%s\", \"num_outputs\": %lld, \"num_inputs\": %lld, "
      "\"batch_size\": %lld, "
      "\"weights\": %lld, \"median_of\": %d, \"us\": %.2f, \"tb_per_s\": %.3f}\n",
      row.op.c_str(), kept.name, static_cast<long long>(row.num_outputs),
      static_cast<long long>(row.num_inputs), static_cast<long long>(batch_size),
      static_cast<long long>(num_weights), bench.samples(), us,
      static_cast<double>(bytes) / us * 1e-6);
  std::fflush(stdout);
}

// A product of a prompt alone.
void MeasurePrompt(BenchDevice& bench, const Projection& row, const Kept& kept,
                   int64_t num_tokens) {
  bench.Clear();
  const LinearArgs linear = {.x = bench.RandomHalf({num_tokens, row.num_inputs}),
                             .weight = MakeWeight(bench, row, kept),
                             .bias = {},
                             .out = bench.Tensor(kDType, {num_tokens, row.num_outputs}),
                             .quantizes_inputs = kept.quantizes_inputs};
  const double us = bench.MedianTime([&] { bench.backend().Linear(linear); }, 10);
  const double flop =
      2.0 * static_cast<double>(num_tokens) * static_cast<double>(row.num_outputs * row.num_inputs);
  std::printf(
      "{\"op\": \"%s\", \"weight\": \"%s\", \"num_outputs\": %lld, \"num_inputs\": %lld, "
      "\"num_tokens\": %lld, \"median_of\": %d, \"us\": %.2f, \"tflops\": %.1f}\n",
      kPromptOp, kept.name, static_cast<long long>(row.num_outputs),
      static_cast<long long>(row.num_inputs), static_cast<long long>(num_tokens), bench.samples(),
      us, flop / us * 1e-6);
  std::fflush(stdout);
}

}  // namespace

void MeasurePromptProducts(BenchDevice& bench, const std::string& filter) {
  if (std::string(kPromptOp).find(filter) == std::string::npos) return;
  for (int64_t num_tokens : {128, 512, 4096}) {
    for (const Projection& row : Projections()) {
      if (row.num_outputs == kVocab) continue;  // few tokens of a prompt ask for logits
      for (const Kept& kept : kKeptForPrompts) MeasurePrompt(bench, row, kept, num_tokens);
    }
  }
}

void MeasureProjections(BenchDevice& bench, const std::string& filter) {
  for (int64_t batch_size : {1, 4, 8, 16, 32, 64}) {
    for (const Projection& row : Projections()) {
      if (row.op.find(filter) == std::string::npos) continue;
      for (const Kept& kept : kKept) Measure(bench, row, kept, batch_size);
    }
  }
}

}  // namespace tidal
