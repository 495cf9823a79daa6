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

std::function<void(const TensorView&)> OpOf(BenchDevice& bench, const Projection& row, int64_t b) {
  RmsNormArgs norm = {.x = bench.Tensor(DType::kFloat32, {b, kHidden}),
                      .weight = bench.RandomHalf({kHidden}),
                      .out = bench.RandomHalf({b, kHidden}),
                      .eps = 1e-5f};
  LinearArgs linear = {.x = norm.out, .weight = {}, .bias = {}, .out = {}};
  if (row.op == "linear_o" || row.op == "linear_down") {
    linear.x = bench.RandomHalf({b, row.num_inputs});
    linear.out = bench.Tensor(DType::kFloat32, {b, kHidden});
    linear.output = LinearOutput::kAccumulate;
    return [=, &bench](const TensorView& weight) mutable {
      linear.weight = weight;
      bench.backend().Linear(linear);
    };
  }
  linear.out =
      bench.Tensor(row.op == "norm_lm_head" ? DType::kFloat32 : kDType, {b, row.num_outputs});
  if (row.op == "norm_lm_head") {
    return [=, &bench](const TensorView& weight) mutable {
      linear.weight = weight;
      bench.backend().NormLinear({norm, linear});
    };
  }
  if (row.op == "gate_up_silu_mul") {
    SiluMulArgs silu_mul = {.gate_up = linear.out, .out = bench.Tensor(kDType, {b, kIntermediate})};
    return [=, &bench](const TensorView& weight) mutable {
      linear.weight = weight;
      bench.backend().GateUpSiluMul({norm, linear, silu_mul});
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
  return [=, &bench](const TensorView& weight) mutable {
    linear.weight = weight;
    bench.backend().QkvRopeAppend({norm, linear, append});
  };
}

void Measure(BenchDevice& bench, const Projection& row, int64_t batch_size) {
  bench.Clear();
  int64_t bytes = row.num_outputs * row.num_inputs * 2;
  auto num_weights = static_cast<int64_t>(std::ceil(kBytesPerReplay / static_cast<double>(bytes)));
  std::vector<TensorView> weights;
  for (int64_t i = 0; i < num_weights; ++i) {
    weights.push_back(bench.RandomHalf({row.num_outputs, row.num_inputs}));
  }
  std::function<void(const TensorView&)> op = OpOf(bench, row, batch_size);
  auto step = [&] {
    for (const TensorView& weight : weights) op(weight);
  };
  double us = bench.TimeOfStep(step, num_weights);
  std::printf(
      "{\"op\": \"%s\", \"num_outputs\": %lld, \"num_inputs\": %lld, \"batch_size\": %lld, "
      "\"weights\": %lld, \"median_of\": %d, \"us\": %.2f, \"tb_per_s\": %.3f}\n",
      row.op.c_str(), static_cast<long long>(row.num_outputs),
      static_cast<long long>(row.num_inputs), static_cast<long long>(batch_size),
      static_cast<long long>(num_weights), bench.samples(), us,
      static_cast<double>(bytes) / us * 1e-6);
  std::fflush(stdout);
}

}  // namespace

void MeasureProjections(BenchDevice& bench, const std::string& filter) {
  for (int64_t batch_size : {1, 4, 8, 16, 32, 64}) {
    for (const Projection& row : Projections()) {
      if (row.op.find(filter) != std::string::npos) Measure(bench, row, batch_size);
    }
  }
}

}  // namespace tidal
