// Sample: from a row of logits to the next token. Order of the steps and meaning: SampleArgs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "backend/cpu/ops.h"
#include "core/philox.h"

namespace tidal {
namespace {

constexpr float kNoLogit = -std::numeric_limits<float>::infinity();
// Gumbel noise lies in (-2.9, 16.7): u has 23 bits and a half step (core/philox.h).
constexpr float kMaxNoise = 17.0f;

struct Candidate {
  float value;  // logit / temperature
  int32_t token_id;
};

// Best first: higher value, then lower id.
bool Better(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.token_id < b.token_id);
}
// As a heap order: the best on top.
bool Worse(const Candidate& a, const Candidate& b) {
  return Better(b, a);
}

// Lowest id of the highest logit; -1 if the row holds a NaN or +inf, or nothing above -inf.
int32_t ArgMax(const float* logits, int64_t vocab_size) {
  float best = kNoLogit;
  int64_t best_id = -1;
  bool usable = true;
  for (int64_t i = 0; i < vocab_size; ++i) {
    // False for NaN too.
    usable &= logits[i] <= std::numeric_limits<float>::max();
    if (logits[i] > best) {
      best = logits[i];
      best_id = i;
    }
  }
  return usable ? static_cast<int32_t>(best_id) : -1;
}

// What a row's draw goes by, beside its logits.
struct RowInputs {
  SamplingRow sampling;
  const int32_t* history;  // [V], of the row's slot
  const uint8_t* biases;   // of the row's slot
  const int32_t* mask;     // [W]
  int32_t position;
};

void AddBiases(float* logits, const uint8_t* biases, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    TokenBias bias;
    std::memcpy(&bias, biases + i * static_cast<int64_t>(sizeof(bias)), sizeof(bias));
    logits[bias.token_id] += bias.bias;
  }
}

void Penalise(float* logits, int64_t vocab_size, const RowInputs& row) {
  const SamplingRow& sampling = row.sampling;
  for (int64_t i = 0; i < vocab_size; ++i) {
    const int32_t marks = row.history[i];
    if (marks == 0) continue;
    float value = logits[i];
    value =
        value > 0.0f ? value / sampling.repetition_penalty : value * sampling.repetition_penalty;
    const int32_t count = marks / kGeneratedMark;
    if (count > 0) {
      value -= sampling.frequency_penalty * static_cast<float>(count);
      value -= sampling.presence_penalty;
    }
    logits[i] = value;
  }
}

void Mask(float* logits, int64_t vocab_size, const int32_t* mask) {
  for (int64_t first = 0; first < vocab_size; first += kMaskWordBits) {
    const auto word = static_cast<uint32_t>(mask[first / kMaskWordBits]);
    if (word == ~uint32_t{0}) continue;
    const int64_t end = std::min(first + kMaskWordBits, vocab_size);
    for (int64_t i = first; i < end; ++i) {
      if ((word >> (i - first) & 1) == 0) logits[i] = kNoLogit;
    }
  }
}

// Keeps the smallest best-first prefix whose share of the probability of all candidates reaches
// top_p. Takes from a heap: a likely prefix is short, and sorting a whole vocabulary is not needed.
int64_t KeepTopP(Candidate* candidates, int64_t count, float top_p, float best) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += std::exp(candidates[i].value - best);
  std::make_heap(candidates, candidates + count, Worse);
  Candidate* end = candidates + count;
  double mass = 0.0;
  while (end != candidates && !(mass >= static_cast<double>(top_p) * total && mass > 0.0)) {
    std::pop_heap(candidates, end, Worse);
    --end;
    mass += std::exp(end->value - best);
  }
  // The taken ones lie at the back.
  const int64_t kept = candidates + count - end;
  std::copy(end, candidates + count, candidates);
  return kept;
}

int64_t KeepMinP(Candidate* candidates, int64_t count, float min_p, float best) {
  Candidate* end = std::remove_if(candidates, candidates + count, [&](const Candidate& c) {
    return !(std::exp(c.value - best) >= min_p);
  });
  return end - candidates;
}

int32_t Draw(const Candidate* candidates, int64_t count, uint64_t seed, int32_t position) {
  float best = kNoLogit;
  int32_t best_id = -1;
  for (int64_t i = 0; i < count; ++i) {
    const Candidate& candidate = candidates[i];
    // Most tokens cannot win whatever their noise: no logarithms for them.
    if (candidate.value + kMaxNoise < best) continue;
    const float noisy = candidate.value + GumbelNoise(seed, static_cast<uint32_t>(position),
                                                      static_cast<uint32_t>(candidate.token_id));
    if (noisy > best || (noisy == best && candidate.token_id < best_id)) {
      best = noisy;
      best_id = candidate.token_id;
    }
  }
  return best_id;
}

int32_t SampleRow(float* logits, int64_t vocab_size, const RowInputs& inputs,
                  Candidate* candidates) {
  const SamplingRow& row = inputs.sampling;
  // Before the penalties as well: they could turn a +inf into a NaN or hide it.
  if (ArgMax(logits, vocab_size) < 0) return -1;
  AddBiases(logits, inputs.biases, row.num_biases);
  if (UsesHistory(row)) Penalise(logits, vocab_size, inputs);
  if (row.has_mask != 0) Mask(logits, vocab_size, inputs.mask);
  const int32_t greedy = ArgMax(logits, vocab_size);
  if (greedy < 0 || row.temperature == 0.0f) return greedy;
  const float best = logits[greedy] / row.temperature;
  // So cold that the best overflows: the limit is greedy.
  if (!std::isfinite(best)) return greedy;
  int64_t count = 0;
  for (int64_t i = 0; i < vocab_size; ++i) {
    const float value = logits[i] / row.temperature;
    if (value > kNoLogit) candidates[count++] = {value, static_cast<int32_t>(i)};
  }
  if (row.top_k > 0 && row.top_k < count) {
    std::nth_element(candidates, candidates + row.top_k - 1, candidates + count, Better);
    count = row.top_k;
  }
  if (row.top_p < 1.0f) count = KeepTopP(candidates, count, row.top_p, best);
  if (row.min_p > 0.0f) count = KeepMinP(candidates, count, row.min_p, best);
  return Draw(candidates, count, row.seed, inputs.position);
}

}  // namespace

void CpuSample(CpuContext& context, const SampleArgs& args) {
  const int64_t num_rows = args.logits.dim(0);
  const int64_t vocab_size = args.logits.dim(1);
  // Candidates are 8 bytes: a pair of floats.
  Candidate* candidates =
      context.scratch.Take<Candidate>(Scratch::kThreads, context.num_threads * vocab_size);
  const int threads = context.ThreadsFor(4 * args.logits.numel());
  context.ParallelFor(threads, num_rows, [&](int64_t b) {
    const int32_t seq_len = args.seq_lens.data<int32_t>()[b];
    int32_t& token_id = args.token_ids.data<int32_t>()[b];
    token_id = 0;
    if (seq_len == 0) return;
    SamplingRow row;
    std::memcpy(&row, args.rows.data<uint8_t>() + b * static_cast<int64_t>(sizeof(row)),
                sizeof(row));
    int32_t* history = args.history.data<int32_t>() + row.slot * vocab_size;
    float* logits = args.logits.data<float>() + b * vocab_size;
    const bool changes = row.num_biases > 0 || UsesHistory(row) || row.has_mask != 0;
    if (changes && row.keeps_logits != 0) {
      float* copy = args.copies.data<float>() + b * vocab_size;
      std::copy_n(logits, vocab_size, copy);
      logits = copy;
    }
    const RowInputs inputs = {.sampling = row,
                              .history = history,
                              .biases = args.biases.data<uint8_t>() + row.slot * args.biases.dim(1),
                              .mask = args.masks.data<int32_t>() + b * args.masks.dim(1),
                              .position = seq_len};
    token_id = SampleRow(logits, vocab_size, inputs, candidates + ThreadIndex() * vocab_size);
    if (token_id >= 0 && UsesHistory(row)) history[token_id] += kGeneratedMark;
  });
}

}  // namespace tidal
