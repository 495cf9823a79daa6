#include "decode/shadow_balance.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/float16.h"
#include "core/float8.h"
#include "core/philox.h"
#include "decode/chunk_pass.h"
#include "decode/transformer.h"
#include "model/rope.h"

namespace tidal {
namespace {

constexpr uint64_t kSeed = 1;

// A tensor of any float type, fp8 as it is stored, or of int8 rows with scales, on the host.
std::vector<float> Fetch(Backend& backend, const TensorView& view, const TensorView& scales = {}) {
  std::vector<char> bytes(static_cast<size_t>(view.bytes()));
  backend.Download(bytes.data(), view);
  std::vector<float> values(static_cast<size_t>(view.numel()));
  if (scales) {
    const std::vector<float> factors = Fetch(backend, scales);
    const size_t row = values.size() / factors.size();
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(static_cast<int8_t>(bytes[i])) * factors[i / row];
    }
    return values;
  }
  auto widen = [&](const auto* source) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = ToFloat(source[i]);
  };
  switch (view.dtype) {
    case DType::kBFloat16:
      widen(reinterpret_cast<const BFloat16*>(bytes.data()));
      break;
    case DType::kFloat16:
      widen(reinterpret_cast<const Float16*>(bytes.data()));
      break;
    case DType::kFloat8:
      widen(reinterpret_cast<const Float8*>(bytes.data()));
      break;
    default:
      widen(reinterpret_cast<const float*>(bytes.data()));
      break;
  }
  return values;
}

// Sums of squares by KV head and channel.
class ChannelSquares {
 public:
  ChannelSquares(int64_t num_kv_heads, int64_t head_dim)
      : head_dim_(head_dim), sums_(static_cast<size_t>(num_kv_heads * head_dim), 0.0) {}

  void Add(int64_t kv_head, const float* row) {
    for (int64_t d = 0; d < head_dim_; ++d) {
      sums_[static_cast<size_t>(kv_head * head_dim_ + d)] += static_cast<double>(row[d]) * row[d];
    }
    ++num_rows_;
  }

  double Mean(size_t channel) const {
    return sums_[channel] * static_cast<double>(sums_.size()) /
           (static_cast<double>(num_rows_) * static_cast<double>(head_dim_));
  }

 private:
  int64_t head_dim_;
  int64_t num_rows_ = 0;  // of all heads
  std::vector<double> sums_;
};

// Factors are rounded to an eighth of an octave, so that what a pass rounds, which depends on its
// chunks and on the device, as a rule changes none. 1 for a channel that tells nothing: one that is
// 0 throughout, or not finite.
std::vector<float> Factors(const ChannelSquares& keys, const ChannelSquares& queries,
                           int64_t count) {
  std::vector<float> factors(static_cast<size_t>(count), 1.0f);
  for (size_t channel = 0; channel < factors.size(); ++channel) {
    // The means are squares, so the fourth root of their ratio.
    double octaves = 0.25 * std::log2(keys.Mean(channel) / queries.Mean(channel));
    if (!std::isfinite(octaves)) continue;
    factors[channel] = static_cast<float>(std::exp2(std::round(8.0 * octaves) / 8.0));
  }
  return factors;
}

class Measurement {
 public:
  Measurement(Backend& backend, PagedKvCache& cache, const BalanceInputs& inputs)
      : backend_(backend),
        model_(inputs.model),
        transformer_(backend, inputs.model, inputs.weights, cache, inputs.rope_scaling),
        buffers_(inputs.buffers),
        num_tokens_(inputs.num_tokens),
        chunk_(inputs.chunk),
        sequence_({.id = 0,
                   .tokens = {},
                   .pages = SequencePages(cache.pool(), inputs.num_tokens),
                   .inv_freq = ComputeRope(inputs.model, inputs.num_tokens).inv_freq,
                   .sampling = {}}) {
    auto count = static_cast<size_t>(model_.num_layers);
    queries_.resize(count, ChannelSquares(model_.num_kv_heads, model_.head_dim));
    for (int64_t i = 0; i < num_tokens_; ++i) {
      uint32_t random = Philox(kSeed, static_cast<uint32_t>(i), 0);
      sequence_.tokens.push_back(
          static_cast<int32_t>(random % static_cast<uint64_t>(model_.vocab_size)));
    }
  }

  ShadowBalance Run() {
    Pass pass;
    for (int64_t begin = 0; begin < num_tokens_; begin += chunk_) {
      int64_t end = std::min(num_tokens_, begin + chunk_);
      pass = buffers_.passes.Take({end - begin, 1});
      pass.max_q_len = end - begin;
      pass.max_seq_len = end;
      const PassRow row = {&sequence_, begin, end - begin};
      buffers_.inputs.Write({&row, 1}, pass);
      ChunkPass(backend_, transformer_, pass,
                [&](int64_t layer) { AddQueries(pass, queries_[static_cast<size_t>(layer)]); });
    }
    ShadowBalance balance;
    for (int64_t layer = 0; layer < model_.num_layers; ++layer) {
      balance.push_back(Factors(Keys(transformer_.Cache(layer, pass)),
                                queries_[static_cast<size_t>(layer)], model_.kv_size()));
    }
    return balance;
  }

 private:
  void AddQueries(const Pass& pass, ChannelSquares& squares) {
    std::vector<float> q = Fetch(backend_, pass.q);
    for (int64_t i = 0; i < pass.q.dim(0) * model_.num_q_heads; ++i) {
      squares.Add(i % model_.num_q_heads / model_.group_size(),
                  &q[static_cast<size_t>(i * model_.head_dim)]);
    }
  }

  ChannelSquares Keys(const PagedKv& kv) {
    ChannelSquares squares(model_.num_kv_heads, model_.head_dim);
    const int64_t page_size = kv.k_pages.dim(2);
    int64_t first = 0;
    for (int32_t page : sequence_.pages.pages()) {
      const TensorView scales = kv.k_scales ? kv.k_scales.Rows(page, 1) : TensorView();
      std::vector<float> k = Fetch(backend_, kv.k_pages.Rows(page, 1), scales);
      for (float& value : k) value *= kv.k_scale;
      for (int64_t head = 0; head < model_.num_kv_heads; ++head) {
        for (int64_t slot = 0; slot < page_size && first + slot < num_tokens_; ++slot) {
          squares.Add(head, &k[static_cast<size_t>((head * page_size + slot) * model_.head_dim)]);
        }
      }
      first += page_size;
    }
    return squares;
  }

  Backend& backend_;
  const ModelConfig& model_;
  Transformer transformer_;
  RunnerBuffers& buffers_;
  int64_t num_tokens_;
  int64_t chunk_;
  Sequence sequence_;
  std::vector<ChannelSquares> queries_;  // of every layer, so far
};

}  // namespace

PagedKvCache MakeBalancePages(Backend& backend, const ModelConfig& model,
                              const DecodeConfig& config) {
  int64_t num_pages = (NumBalanceTokens(config) + config.page_size - 1) / config.page_size;
  return PagedKvCache(backend, model, config.kv_dtype, num_pages, config.page_size,
                      "measuring the shadow");
}

ShadowBalance MeasureShadowBalance(Backend& backend, PagedKvCache& cache,
                                   const BalanceInputs& inputs) {
  return Measurement(backend, cache, inputs).Run();
}

}  // namespace tidal
