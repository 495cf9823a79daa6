// Logprobs: log-probabilities of a row's token and of its most likely ones. Meaning: LogprobsArgs.
#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/cpu/ops.h"

namespace tidal {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// Returns the logarithm of the sum of exp(logits).
double LogSumExp(const float* logits, int64_t vocab_size) {
  const double most = *std::max_element(logits, logits + vocab_size);
  double sum = 0.0;
  for (int64_t i = 0; i < vocab_size; ++i) sum += std::exp(static_cast<double>(logits[i]) - most);
  return most + std::log(sum);
}

// Returns 1 for the most likely token; the lower id of equals comes first.
int32_t RankOf(const float* logits, int64_t vocab_size, int64_t token_id) {
  const float value = logits[token_id];
  int32_t rank = 1;
  for (int64_t i = 0; i < vocab_size; ++i) {
    rank += logits[i] > value || (logits[i] == value && i < token_id) ? 1 : 0;
  }
  return rank;
}

// Writes the `count` most likely tokens' logits to `values`, and their ids.
void FindMostLikely(const float* logits, int64_t vocab_size, int64_t count, float* values,
                    int32_t* ids) {
  std::fill_n(values, count, kMinusInf);
  std::fill_n(ids, count, -1);
  if (count == 0) return;
  for (int64_t i = 0; i < vocab_size; ++i) {
    int64_t place = count - 1;
    if (!(logits[i] > values[place])) continue;  // ids ascend, so an equal one comes later
    for (; place > 0 && logits[i] > values[place - 1]; --place) {
      values[place] = values[place - 1];
      ids[place] = ids[place - 1];
    }
    values[place] = logits[i];
    ids[place] = static_cast<int32_t>(i);
  }
}

}  // namespace

void CpuLogprobs(CpuContext& context, const LogprobsArgs& args) {
  const int64_t num_rows = args.rows.dim(0), vocab_size = args.logits.dim(1);
  const int64_t width = args.logprobs.dim(1);
  const int threads = context.ThreadsFor(8 * num_rows * vocab_size);
  context.ParallelFor(threads, num_rows, [&](int64_t r) {
    const int32_t b = args.rows.data<int32_t>()[r];
    const int32_t token_id = args.token_ids.data<int32_t>()[r];
    const float* logits = args.logits.data<float>() + b * vocab_size;
    float* values = args.logprobs.data<float>() + r * width;
    int32_t* ids = args.ids.data<int32_t>() + r * width;
    values[0] = token_id < 0 ? kMinusInf : logits[token_id];
    ids[0] = token_id < 0 ? 0 : RankOf(logits, vocab_size, token_id);
    FindMostLikely(logits, vocab_size, width - 1, values + 1, ids + 1);
    const double lse = LogSumExp(logits, vocab_size);
    for (int64_t i = 0; i < width; ++i) {
      if (values[i] > kMinusInf) values[i] = static_cast<float>(values[i] - lse);
    }
  });
}

}  // namespace tidal
