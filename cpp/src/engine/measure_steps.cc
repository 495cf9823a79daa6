// Decoder::MeasureSteps: the time of single decode steps over a cache filled with random values.
#include <algorithm>
#include <chrono>

#include "core/philox.h"
#include "engine/decoder_impl.h"
#include "tidal/error.h"

namespace tidal {
namespace {

constexpr uint64_t kSeed = 1;

void CheckBenchmark(const StepBenchmark& benchmark, const DecodeConfig& config) {
  auto rows = static_cast<int64_t>(benchmark.seq_lens.size());
  TIDAL_CHECK(rows >= 1, InvalidArgument, "seq_lens: got none, expected one per batch row");
  TIDAL_CHECK(rows <= config.max_batch_size, CapacityError, "batch: need ", rows,
              " rows, have max_batch_size ", config.max_batch_size, "; raise max_batch_size");
  for (int64_t seq_len : benchmark.seq_lens) {
    TIDAL_CHECK(seq_len >= 1, InvalidArgument, "seq_lens: got ", seq_len, ", expected >= 1");
    TIDAL_CHECK(seq_len <= config.max_seq_len, CapacityError, "seq_lens: ", seq_len,
                " tokens, have max_seq_len ", config.max_seq_len, "; raise max_seq_len");
  }
  TIDAL_CHECK(benchmark.steps >= 1, InvalidArgument, "steps: got ", benchmark.steps,
              ", expected >= 1");
  TIDAL_CHECK(benchmark.warmup >= 0, InvalidArgument, "warmup: got ", benchmark.warmup,
              ", expected >= 0");
}

// Sequences of random tokens, all but the last of which count as cached, and as a prompt.
std::vector<Sequence> FilledSequences(ModelRunner& runner, SequenceMaker& maker,
                                      const std::vector<int64_t>& seq_lens) {
  std::vector<Sequence> sequences;
  sequences.reserve(seq_lens.size());
  for (int64_t seq_len : seq_lens) {
    std::vector<int32_t> tokens(static_cast<size_t>(seq_len));
    for (size_t i = 0; i < tokens.size(); ++i) {
      auto position = static_cast<uint32_t>(i);
      uint32_t random = Philox(kSeed, position, static_cast<uint32_t>(sequences.size()));
      tokens[i] = static_cast<int32_t>(random % static_cast<uint64_t>(runner.model().vocab_size));
    }
    sequences.push_back(maker.Make(std::move(tokens), seq_len, runner.ScratchSampling()));
    sequences.back().cached = sequences.back().dense_len = seq_len - 1;
  }
  runner.FillCache(sequences, kSeed);
  return sequences;
}

}  // namespace

std::vector<double> Decoder::MeasureSteps(const StepBenchmark& benchmark) {
  CheckBenchmark(benchmark, config());
  auto pause = impl_->EnterBetweenPasses();
  std::vector<Sequence> sequences =
      FilledSequences(impl_->runner, impl_->sequences, benchmark.seq_lens);
  Impl::Unlocked unlocked(*impl_, pause.state);
  Batch batch = {.rows = {}, .plan = benchmark.plan};
  for (Sequence& sequence : sequences) batch.rows.push_back({.sequence = &sequence});

  std::vector<double> seconds;
  for (int64_t step = -benchmark.warmup; step < benchmark.steps; ++step) {
    // One token back, so that every step is the same step.
    for (Sequence& sequence : sequences) sequence.Rewind(sequence.dense_len);
    auto start = std::chrono::steady_clock::now();
    const Drawn drawn = impl_->runner.Run(batch);
    std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    if (step >= 0) seconds.push_back(elapsed.count());
    for (size_t i = 0; i < sequences.size(); ++i) {
      TIDAL_CHECK(drawn.tokens[i][0] >= 0, WeightsError, "step at ", sequences[i].tokens.size(),
                  " tokens: the logits hold a NaN or infinity, expected finite values; "
                  "check the weights, or try dtype float32");
      sequences[i].tokens.back() = drawn.tokens[i][0];
    }
  }
  return seconds;
}

}  // namespace tidal
