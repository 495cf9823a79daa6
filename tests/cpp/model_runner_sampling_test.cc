// ModelRunner and Sampler: what draws go by, and what is told of them beside the token.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "backend/memory_meter.h"
#include "decode/model_runner.h"
#include "decode/sampler.h"
#include "engine/sequence_maker.h"
#include "reading.h"
#include "throws.h"
#include "tidal/error.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class RunnerSampling : public DecoderTest {
 protected:
  void Open(const DecodeConfig& config) {
    runner_ = std::make_unique<ModelRunner>(model_, config, weights_, nullptr);
    maker_ = std::make_unique<SequenceMaker>(*runner_);
  }

  // A sequence whose prompt is read, but for its last token.
  Sequence Start(const Ints& prompt, const SamplingParams& params, int32_t slot) {
    Sequence sequence = maker_->Make(prompt, 200, runner_->ScratchSampling());
    SetSampling(params, model_.vocab_size, slot, sequence);
    const int64_t end = sequence.dense_len - 1;
    while (sequence.cached < end) runner_->Run({.rows = {NextChunk(*runner_, sequence, end)}});
    return sequence;
  }

  // Decodes `count` tokens.
  void Decode(Sequence& sequence, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      sequence.tokens.push_back(runner_->Run({{{.sequence = &sequence}}}).tokens[0][0]);
    }
  }

  // `logprobs` say what `logits` [vocab_size] hold of `token`.
  void ExpectLogprobs(const TokenLogprobs& logprobs, const float* logits, int32_t token) {
    const Values want = reference::LogSoftmax({logits, logits + model_.vocab_size});
    Ints order(static_cast<size_t>(model_.vocab_size));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return want[a] > want[b]; });
    EXPECT_NEAR(logprobs.logprob, want[token], 1e-4);
    EXPECT_EQ(order[static_cast<size_t>(logprobs.rank - 1)], token);
    order.resize(logprobs.top_ids.size());
    EXPECT_EQ(logprobs.top_ids, order);
    for (size_t i = 0; i < order.size(); ++i) {
      EXPECT_NEAR(logprobs.top_logprobs[i], want[order[i]], 1e-4);
    }
  }

  void ExpectLogprobs(const Drawn& drawn, size_t row, size_t num_top) {
    const auto vocab = static_cast<size_t>(model_.vocab_size);
    ASSERT_EQ(drawn.logprobs[row].size(), drawn.tokens[row].size());
    ASSERT_EQ(logits_[row].size(), drawn.tokens[row].size() * vocab);
    for (size_t i = 0; i < drawn.tokens[row].size(); ++i) {
      EXPECT_EQ(drawn.logprobs[row][i].top_ids.size(), num_top);
      ExpectLogprobs(drawn.logprobs[row][i], logits_[row].data() + i * vocab, drawn.tokens[row][i]);
    }
  }

  // The logits of the batch's rows go to logits_.
  Drawn Run(Batch batch) {
    logits_.clear();
    for (const BatchRow& row : batch.rows) {
      logits_.emplace_back(static_cast<size_t>(row.num_logits * model_.vocab_size));
    }
    for (size_t i = 0; i < logits_.size(); ++i) batch.rows[i].logits = logits_[i].data();
    return runner_->Run(batch);
  }

  // Changes logits in every way there is.
  static SamplingParams Changed() {
    SamplingParams params = Greedy(50);
    params.temperature = 1.5;
    params.repetition_penalty = 1.4;
    params.frequency_penalty = 0.7;
    params.presence_penalty = -0.4;
    params.logit_bias = {{3, 2.5}, {300, -4.0}};
    params.suppress_tokens = {7, 8, 9};
    params.no_repeat_ngram_size = 2;
    return params;
  }

  std::unique_ptr<ModelRunner> runner_;
  std::unique_ptr<SequenceMaker> maker_;
  std::vector<std::vector<float>> logits_;
};

// Steps, the end of a prompt's chunk, and a check of drafts; beside rows that want none.
TEST_P(RunnerSampling, LogprobsAreThoseOfTheModelsOwnLogits) {
  DecodeConfig config = Tidal();
  config.verify = true;
  config.draft_tokens = 6;
  Open(config);
  const Prompts prompts = MakePrompts({60, 33, 21});
  std::vector<Sequence> rows;
  for (int32_t i = 0; i < 3; ++i) {
    rows.push_back(Start(prompts[static_cast<size_t>(i)], i == 1 ? Greedy(50) : Changed(), i));
  }
  // A pass that is no step: one row reads two tokens.
  rows[2].tokens.push_back(5);
  Batch batch = {{{&rows[0], 1, 1, 1, 4}, {&rows[1], 1, 1, 1, 0}, {&rows[2], 2, 1, 1, 20}},
                 PlanId::kDense};
  Drawn drawn = Run(batch);
  const size_t num_top[] = {4, 0, 20};
  for (size_t i = 0; i < 3; ++i) ExpectLogprobs(drawn, i, num_top[i]);

  for (int64_t step = 0; step < 4; ++step) {
    for (size_t i = 0; i < 3; ++i) rows[i].tokens.push_back(drawn.tokens[i].back());
    batch = {{{&rows[0], 1, 1, 1, 4}, {&rows[1], 1, 1, 1}, {&rows[2], 1, 1, 1, 20}},
             step % 2 == 0 ? PlanId::kDecoder : PlanId::kDense};
    drawn = Run(batch);
    ExpectLogprobs(drawn, 0, 4);
    EXPECT_TRUE(drawn.logprobs[1].empty());
    ExpectLogprobs(drawn, 2, 20);
  }

  batch = {};
  for (Sequence& row : rows) {
    for (int32_t token : {11, 12, 13, 14, 15}) row.tokens.push_back(token);
    batch.rows.push_back({&row, 5, 5, 5, 2});
  }
  drawn = Run(batch);
  for (size_t i = 0; i < 3; ++i) ExpectLogprobs(drawn, i, 2);
}

// A prompt, all but its first token: in chunks, the last of which draws; more than there are rows
// for draws at once.
TEST_P(RunnerSampling, TokensThatThereAreAreScored) {
  Open(Dense());
  const Ints prompt = MakePrompts({40})[0];
  const auto vocab = static_cast<size_t>(model_.vocab_size);
  Sequence sequence = maker_->Make(prompt, 200, runner_->ScratchSampling());
  SetSampling(Changed(), model_.vocab_size, 0, sequence);
  std::vector<TokenLogprobs> scored;
  std::vector<float> logits;
  Drawn drawn;
  for (int64_t count : {17, 23}) {
    const int64_t followed = std::min<int64_t>(count, 39 - sequence.cached);
    drawn = Run({{{&sequence, count, followed < count, count, 3, followed}}});
    scored.insert(scored.end(), drawn.scored[0].begin(), drawn.scored[0].end());
    logits.insert(logits.end(), logits_[0].begin(), logits_[0].end());
  }
  ASSERT_EQ(scored.size(), 39u);
  for (size_t i = 0; i < 39; ++i)
    ExpectLogprobs(scored[i], logits.data() + i * vocab, prompt[i + 1]);
  ExpectLogprobs(drawn.logprobs[0][0], logits.data() + 39 * vocab, drawn.tokens[0][0]);

  // A step whose successor is known, whatever is drawn.
  sequence.tokens.push_back(8);
  sequence.tokens.push_back(9);
  drawn = Run({{{&sequence, 1, 1, 1, 2, 1}}});
  ExpectLogprobs(drawn.scored[0][0], logits_[0].data(), 9);
  ExpectLogprobs(drawn.logprobs[0][0], logits_[0].data(), drawn.tokens[0][0]);
}

TEST_P(RunnerSampling, AskingForLogprobsChangesNoDraw) {
  if (!is_cpu()) GTEST_SKIP() << "compares passes of different rows, equal bitwise only on the CPU";
  Open(Dense());
  const Prompts prompts = MakePrompts({40, 40});
  for (const bool asks : {false, true}) {
    Sequence plain = Start(prompts[0], Changed(), 0), beside = Start(prompts[1], Changed(), 1);
    Sequence alone = Start(prompts[0], Changed(), 2);
    Decode(alone, 12);
    for (int64_t i = 0; i < 12; ++i) {
      Batch batch = {{{.sequence = &plain}, {.sequence = &beside}}, PlanId::kDense};
      for (BatchRow& row : batch.rows)
        row.num_logprobs = asks ? std::optional<int64_t>(3) : std::nullopt;
      const Drawn drawn = runner_->Run(batch);
      plain.tokens.push_back(drawn.tokens[0][0]);
      beside.tokens.push_back(drawn.tokens[1][0]);
    }
    EXPECT_EQ(plain.tokens, alone.tokens);
  }
}

// The marks on the device follow the sequence's tokens, whatever became of them between passes.
TEST_P(RunnerSampling, DrawsGoByTheTokensTheSequenceHasNow) {
  Open(Dense());
  SamplingParams params = Greedy(50);
  params.frequency_penalty = 2.0;
  params.logit_bias = {{77, 60.0}, {78, 60.0}};  // one or the other, whichever came less often
  const Ints prompt = MakePrompts({30})[0];
  for (int32_t often : {77, 78}) {
    Sequence sequence = Start(prompt, params, 0);
    Decode(sequence, 12);
    // Six tokens are taken back, and as many others take their place.
    sequence.tokens.resize(36);
    sequence.tokens.insert(sequence.tokens.end(), 6, often);
    sequence.Rewind(35);
    EXPECT_EQ(runner_->Run({{{&sequence, 7, 1}}}).tokens[0][0], 77 + 78 - often);
  }

  // The next owner of a slot finds nothing of the last.
  SamplingParams heavy = Greedy(50);
  heavy.repetition_penalty = 2.0;
  Sequence next = Start(MakePrompts({20}, 3)[0], heavy, 0);
  Sequence same = Start(MakePrompts({20}, 3)[0], heavy, 3);
  Decode(next, 10);
  Decode(same, 10);
  EXPECT_EQ(next.tokens, same.tokens);
}

TEST_P(RunnerSampling, AMaskOfTheBatchAllowsWhatEachDrawMayGive) {
  Open(Dense());
  const auto words = static_cast<size_t>(NumMaskWords(model_.vocab_size));
  auto only = [&](std::vector<uint32_t>& masks, size_t draw, int32_t id) {
    masks[draw * words + static_cast<size_t>(id / 32)] |= 1u << (id % 32);
  };
  Sequence free = Start(MakePrompts({20})[0], Greedy(9), 0);
  Sequence bound = Start(MakePrompts({20})[0], Greedy(9), 1);
  std::vector<uint32_t> masks(words, 0);
  only(masks, 0, 77);
  Batch batch = {{{.sequence = &free}, {.sequence = &bound, .allowed = masks}}, PlanId::kDense};
  const Drawn drawn = runner_->Run(batch);
  EXPECT_NE(drawn.tokens[0][0], 77);
  EXPECT_EQ(drawn.tokens[1][0], 77);

  for (int32_t token : {77, 4, 5}) bound.tokens.push_back(token);
  masks.assign(3 * words, 0);
  for (size_t draw = 0; draw < 3; ++draw) only(masks, draw, static_cast<int32_t>(100 + draw));
  only(masks, 2, 200);
  batch = {{{.sequence = &bound, .num_tokens = 3, .num_draws = 3, .allowed = masks}},
           PlanId::kDense};
  const Ints got = runner_->Run(batch).tokens[0];
  EXPECT_EQ(got[0], 100);
  EXPECT_EQ(got[1], 101);
  EXPECT_TRUE(got[2] == 102 || got[2] == 200) << got[2];

  bound.tokens.push_back(6);
  batch.rows[0].num_tokens = batch.rows[0].num_draws = 1;
  EXPECT_TRUE(Throws<InvalidArgument>([&] { runner_->Run(batch); },
                                      {"row 0", "words of masks", std::to_string(words)}));
}

INSTANTIATE_TEST_SUITE_P(Backends, RunnerSampling, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

// Counts the bytes of every upload and lets nothing else through.
class CountingUploads final : public MemoryMeter {
 public:
  explicit CountingUploads(const Backend& backend) : MemoryMeter(backend) {}
  void Upload(const TensorView& dst, const void*) override { sizes_.push_back(dst.bytes()); }
  std::vector<int64_t> Take() { return std::exchange(sizes_, {}); }

 private:
  std::vector<int64_t> sizes_;
};

TEST(SamplerUploads, WhatIsNotAskedForOrHasNotChangedStaysWhereItIs) {
  constexpr int64_t kVocab = 320;
  const std::unique_ptr<Backend> cpu = MakeBackend(BackendOptions{});
  CountingUploads backend(*cpu);
  SamplingSlots slots(backend, kVocab, 4);
  Sampler sampler(backend, slots, 4, 4);
  PagePool pool(16, 1);
  Sequence sequence = {.id = 5,
                       .tokens = {1, 2, 3},
                       .cached = 2,
                       .pages = SequencePages(pool, 4),
                       .inv_freq = {},
                       .sampling = {}};
  const BatchRow row = {.sequence = &sequence};
  auto draw = [&](int32_t token) {
    slots.Prepare(sequence, sequence.cached + 1);
    sampler.SetRows(std::vector<DrawRow>{{.row = &row}});
    slots.MarkDrawn(sequence, {&token, 1});
    sequence.tokens.push_back(token);
    ++sequence.cached;
    return backend.Take();
  };
  const int64_t parameters = sizeof(SamplingRow), mask = kVocab / 8, history = 4 * kVocab;
  using Sizes = std::vector<int64_t>;

  SamplingParams params;
  SetSampling(params, kVocab, 0, sequence);
  EXPECT_EQ(draw(4), (Sizes{parameters}));
  EXPECT_EQ(draw(5), Sizes{});

  params.suppress_tokens = {9};
  params.logit_bias = {{4, 1.0}, {6, 2.0}};
  sequence.id = 6;
  SetSampling(params, kVocab, 0, sequence);
  EXPECT_EQ(draw(4), (Sizes{2 * sizeof(TokenBias), mask, parameters}));
  EXPECT_EQ(draw(5), Sizes{});

  params.presence_penalty = 1.0;
  params.no_repeat_ngram_size = 2;
  sequence.id = 7;
  SetSampling(params, kVocab, 0, sequence);
  EXPECT_EQ(draw(1), (Sizes{2 * sizeof(TokenBias), history, mask, parameters}));
  EXPECT_EQ(draw(3), (Sizes{mask})) << "the draw has marked itself; other pairs are there now";
  sequence.tokens.back() = 2;  // not what was drawn
  EXPECT_EQ(draw(3), (Sizes{history, mask}));
}

}  // namespace
}  // namespace tidal::test
