// Verified decoding: the tokens of dense decoding, whatever the drafts are worth.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <span>

#include "decode/token_rules.h"
#include "reference.h"
#include "tidal/decoder.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

// A verified token and the one of a dense step may differ where rounding decides: on CUDA a pass
// over drafts runs other kernels (several queries a row, cuBLASLt by the number of tokens) than a
// step. So there tokens are judged by dense logits, teacher-forced along the verified tokens: each
// must be the one these draw, or within rounding of it. The CPU, which has no such rounding, is
// held to both rules.
class VerifiedDecoding : public DecoderTest {
 protected:
  DecodeConfig Verified(int64_t draft_tokens = 0) const {
    DecodeConfig config = Tidal();
    config.verify = true;
    config.draft_tokens = draft_tokens;
    return config;
  }

  // Whatever drafts, each so many tokens at most; the text for a dense plan as well.
  std::vector<DecodeConfig> Ways(const std::vector<int64_t>& draft_tokens) const {
    std::vector<DecodeConfig> ways;
    for (int64_t count : draft_tokens) {
      for (Drafts drafts : {Drafts::kTidal, Drafts::kNgram, Drafts::kBoth}) {
        ways.push_back(Verified(count));
        ways.back().drafts = drafts;
      }
      ways.push_back(ways.back());
      ways.back().select_layers.clear();
    }
    return ways;
  }

  static SamplingParams Drawn(int64_t max_new_tokens, uint64_t seed) {
    SamplingParams params = Greedy(max_new_tokens);
    params.temperature = 0.8;
    params.seed = seed;
    return params;
  }

  // Every token is the draw of dense logits after the tokens before it, or within rounding of it:
  // the logits of both tokens may be off by the tolerance, relative to the largest logit.
  void ExpectDenseDraws(Decoder& dense, const Ints& prompt, const SamplingParams& params,
                        const Ints& tokens) {
    if (tokens.empty()) return;
    Ints text = prompt;
    text.insert(text.end(), tokens.begin(), tokens.end() - 1);
    const auto prompt_len = static_cast<int64_t>(prompt.size());
    const auto logits = DecodeLogits(dense, text, prompt_len);
    double size = 0.0;
    for (float logit : logits) size = std::max(size, std::abs(static_cast<double>(logit)));
    const double penalty = params.repetition_penalty;
    double bound = 2 * ToleranceFor(Op::kLogits, GetParam().dtype).rel * size;
    bound *= std::max(penalty, 1 / penalty);
    if (params.temperature > 0) bound /= params.temperature;

    const auto vocab = static_cast<size_t>(model_.vocab_size);
    Ints history(vocab, 0);
    for (int32_t token : prompt) history[static_cast<size_t>(token)] = 1;
    const TokenRules rules(params, model_.vocab_size);
    Values biases(vocab, 0.0);
    for (const TokenBias& bias : rules.biases()) biases[bias.token_id] = bias.bias;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const auto before = std::span(text).first(prompt.size() + i);
      const auto row = logits.begin() + static_cast<std::ptrdiff_t>(i * vocab);
      const auto token = static_cast<size_t>(tokens[i]);
      const Values scores =
          reference::DrawScores({.logits = {row, row + static_cast<std::ptrdiff_t>(vocab)},
                                 .history = history,
                                 .biases = biases,
                                 .banned = Banned(rules.MaskAfter(before, prompt_len)),
                                 .temperature = params.temperature,
                                 .top_k = params.top_k,
                                 .top_p = params.top_p,
                                 .min_p = params.min_p,
                                 .repetition_penalty = penalty,
                                 .frequency_penalty = params.frequency_penalty,
                                 .presence_penalty = params.presence_penalty,
                                 .seed = params.seed,
                                 .position = static_cast<uint32_t>(prompt.size() + i)});
      const double best = *std::max_element(scores.begin(), scores.end());
      EXPECT_LE(best - scores[token], bound) << "token " << i;
      num_judged_ += 1;
      num_best_ += best == scores[token];
      history[token] += 2;
    }
  }

  static Ints Banned(const std::vector<uint32_t>& mask) {
    Ints banned;
    for (int32_t id = 0; id < static_cast<int32_t>(32 * mask.size()); ++id) {
      if ((mask[static_cast<size_t>(id / 32)] >> (id % 32) & 1) == 0) banned.push_back(id);
    }
    return banned;
  }

  // The same call, verified and dense.
  void ExpectDenseTokens(const DecodeConfig& config, const Prompts& prompts,
                         const std::vector<SamplingParams>& params) {
    const auto dense = Make(Dense()), verified = Make(config);
    const auto want = Finish(*dense->Start(prompts, params));
    const auto got = Finish(*verified->Start(prompts, params));
    for (size_t i = 0; i < prompts.size(); ++i) {
      SCOPED_TRACE(::testing::Message() << "prompt " << i);
      EXPECT_EQ(got[i].finish_reason, want[i].finish_reason);
      EXPECT_EQ(got[i].token_ids.size(), want[i].token_ids.size());
      if (is_cpu()) {
        EXPECT_EQ(got[i].token_ids, want[i].token_ids);
      }
      ExpectDenseDraws(*dense, prompts[i], params[i], got[i].token_ids);
    }
    EXPECT_EQ(verified->num_free_pages(), verified->config().num_pages);
    EXPECT_EQ(verified->num_free_rows(), verified->config().max_batch_size);
  }

  // Rounding decides now and then only.
  void TearDown() override { EXPECT_GE(num_best_, 0.85 * num_judged_); }

 private:
  double num_judged_ = 0, num_best_ = 0;
};

TEST_P(VerifiedDecoding, WritesWhatDenseDecodingWrites) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    SCOPED_TRACE(seed);
    weights_ = TinyModel(model_, seed);
    Prompts prompts = MakePrompts({150, 40, 33, 7}, seed);
    if (seed > 2) prompts = KnowFewTokens(prompts, seed);
    for (DecodeConfig config : Ways({Ints{0, 1, 3, 7, 16, 64}[seed]})) {
      config.token_budget = Ints{2, 8, 32}[seed % 3];
      for (const SamplingParams& params : {Greedy(50), Drawn(50, seed)}) {
        ExpectDenseTokens(config, prompts, std::vector(4, params));
      }
    }
  }
}

TEST_P(VerifiedDecoding, WritesItForAnyModelAndPlan) {
  std::vector<ModelConfig> models(3, TinyConfig());
  models[0].num_q_heads = models[0].num_kv_heads = 3;
  models[1].num_q_heads = 8;
  models[1].num_kv_heads = 1;
  models[2] = OddConfig();
  if (!is_cpu()) models.pop_back();
  for (const ModelConfig& model : models) {
    model_ = model;
    weights_ = TinyModel(model, 3);
    Prompts prompts = MakePrompts({100, 61, 5});
    for (Ints& prompt : prompts) {
      for (int32_t& token : prompt) token %= static_cast<int32_t>(model.vocab_size);
    }
    for (Granularity granularity :
         {Granularity::kKvHead, Granularity::kHead, Granularity::kLayer}) {
      DecodeConfig config = Verified(5);
      config.granularity = granularity;
      config.token_budget = 16;
      ExpectDenseTokens(config, prompts, std::vector(3, Greedy(40)));
    }
  }
}

TEST_P(VerifiedDecoding, KeepsSomeDraftsAndRejectsSome) {
  const auto result = Generate(*Make(Verified()), MakePrompts({150}), Greedy(100))[0];
  const Verification& counts = result.verification;
  EXPECT_GT(counts.accepted_tokens, 10);
  EXPECT_GT(counts.drafted_tokens, counts.accepted_tokens + 5);
  // Every token but the prompt's successor is a kept draft or was drawn after the kept ones.
  EXPECT_EQ(counts.accepted_tokens + counts.dense_passes, 99);
  EXPECT_LT(counts.dense_passes, 90);
}

TEST_P(VerifiedDecoding, CountsNothingElsewhere) {
  const auto plain = Generate(*Make(Tidal()), MakePrompts({150}), Greedy(20))[0].verification;
  EXPECT_EQ(plain.drafted_tokens + plain.accepted_tokens + plain.dense_passes, 0);
  // Within the budget steps are dense: nothing is drafted.
  const auto brief = Generate(*Make(Verified()), MakePrompts({10}), Greedy(20))[0].verification;
  EXPECT_EQ(brief.drafted_tokens, 0);
  EXPECT_EQ(brief.dense_passes, 19);
  // Nor is it by a decoder that is dense anyway.
  DecodeConfig config = Dense();
  config.verify = true;
  ExpectDenseTokens(config, MakePrompts({150, 10}), std::vector(2, Greedy(20)));
}

TEST_P(VerifiedDecoding, AppliesEverySamplingParameter) {
  if (!is_cpu()) GTEST_SKIP() << "on CUDA rounding moves tokens across the cuts of top-k and top-p";
  const Prompts prompts = KnowFewTokens(MakePrompts({80, 90, 100, 110}));
  std::vector<SamplingParams> params;
  for (uint64_t seed = 0; seed < 4; ++seed) params.push_back(Drawn(60, seed));
  params[0].top_k = 5;
  params[1].top_p = 0.7;
  params[2].min_p = 0.1;
  params[3].temperature = 2.0;
  for (const DecodeConfig& config : Ways({0, 7})) ExpectDenseTokens(config, prompts, params);
}

// The penalty looks at the tokens before the drawn one: no drafts, and not those drawn in vain.
TEST_P(VerifiedDecoding, PenalisesTokensOnlyOnceTheyStand) {
  const Prompts prompts = MakePrompts({80, 90, 100, 20});
  std::vector<SamplingParams> params = {Greedy(60), Drawn(60, 1), Drawn(60, 2), Greedy(60)};
  params[0].repetition_penalty = 1.5;
  params[1].repetition_penalty = 3.0;  // beside it rows without one
  params[3].repetition_penalty = 0.7;
  for (const DecodeConfig& config : Ways({0, 1, 9})) ExpectDenseTokens(config, prompts, params);
}

TEST_P(VerifiedDecoding, HoldsToEveryRuleOfItsTokens) {
  const Prompts prompts = MakePrompts({80, 90, 100, 20});
  std::vector<SamplingParams> params = {Greedy(60), Drawn(60, 1), Drawn(60, 2), Greedy(60)};
  for (int32_t id = 0; id < 320; id += 3) params[0].allowed_token_ids.push_back(id);
  params[0].no_repeat_ngram_size = 2;
  params[1].frequency_penalty = 1.2;
  params[1].presence_penalty = 0.5;
  params[1].logit_bias = {{17, 3.0}, {200, 4.0}, {5, -100.0}};
  params[2].bad_words = {{3}, {200, 7}, {17, 17}, {200, 200}};
  params[2].logit_bias = {{17, 4.0}, {200, 4.0}};
  for (int32_t id = 0; id < 316; ++id) params[3].stop_token_ids.push_back(id);
  params[3].min_new_tokens = 25;
  params[3].repetition_penalty = 0.7;
  params[3].suppress_tokens = {317};
  for (const DecodeConfig& config : Ways({0, 1, 9})) ExpectDenseTokens(config, prompts, params);
  for (size_t i = 0; i < 4; ++i) ExpectDenseTokens(Verified(), {prompts[i]}, {params[i]});
}

TEST_P(VerifiedDecoding, StopTokensEndWhereTheyStand) {
  const auto decoder = Make(Verified(9));
  // One at a time: then, on CUDA too, the passes are the same up to the end.
  for (const Ints& prompt : MakePrompts({80, 90})) {
    const Ints all = Generate(*decoder, {prompt}, Greedy(40))[0].token_ids;
    for (size_t at : {0, 1, 2, 3, 10, 25}) {
      SamplingParams params = Greedy(40);
      params.stop_token_ids = {all[at]};
      const auto result = Generate(*decoder, {prompt}, params)[0];
      const auto end = std::find(all.begin(), all.end(), all[at]) + 1;
      EXPECT_EQ(result.token_ids, Ints(all.begin(), end));
      EXPECT_EQ(result.finish_reason, FinishReason::kStop);
    }
  }
}

TEST_P(VerifiedDecoding, DraftsNeverPassTheEnd) {
  for (int64_t new_tokens : {1, 2, 3, 5, 12}) {
    for (const DecodeConfig& config : Ways({16})) {
      ExpectDenseTokens(config, MakePrompts({500, 40, 511 - 11}),
                        {Greedy(new_tokens), Greedy(13 - new_tokens), Greedy(12)});
    }
  }
  for (DecodeConfig config : Ways({16})) {
    config.num_pages = 32;  // for one sequence of 512 tokens, to the last slot
    ExpectDenseTokens(config, MakePrompts({500}), {Greedy(12)});
  }
}

TEST_P(VerifiedDecoding, RowsHaveNoSayInEachOther) {
  if (!is_cpu()) GTEST_SKIP() << "on CUDA a batch row equals the row alone to rounding only";
  const Prompts prompts = MakePrompts({150, 90, 31, 2});
  const auto decoder = Make(Verified());
  const auto together = Generate(*decoder, prompts, Greedy(50));
  for (size_t i = 0; i < prompts.size(); ++i) {
    const auto alone = Generate(*decoder, {prompts[i]}, Greedy(50))[0];
    EXPECT_EQ(alone.token_ids, together[i].token_ids);
    // Rounds begin and end together, so how many are drafted is not a row's own affair.
    EXPECT_GT(together[i].verification.accepted_tokens, 0);
  }
}

TEST_P(VerifiedDecoding, GivesItsTokensOneByOne) {
  const auto decoder = Make(Verified(8));
  const Prompts prompts = MakePrompts({150, 90});
  const auto want = Generate(*decoder, prompts, Greedy(50));
  const auto generation = decoder->Start(prompts, std::vector(2, Greedy(50)));
  std::vector<Ints> seen(2);
  while (!generation->done()) {
    std::vector<int> count(2, 0);
    for (const TokenEvent& event : generation->Advance()) {
      const auto sequence = static_cast<size_t>(event.sequence);
      EXPECT_EQ(++count[sequence], 1);
      seen[sequence].push_back(event.token_id);
      EXPECT_EQ(generation->results()[sequence].token_ids, seen[sequence]);
    }
    // Between any two tokens a sequence may be stopped, and then has no more.
    if (seen[0].size() == 20) generation->Stop(0, FinishReason::kStop);
  }
  EXPECT_EQ(seen[0], Ints(want[0].token_ids.begin(), want[0].token_ids.begin() + 20));
  // From there on the other one is alone, which on CUDA rounds otherwise.
  if (is_cpu()) {
    EXPECT_EQ(seen[1], want[1].token_ids);
  }
  EXPECT_EQ(seen[1].size(), 50u);
  ExpectDenseDraws(*Make(Dense()), prompts[1], Greedy(50), seen[1]);
  EXPECT_EQ(decoder->num_free_pages(), decoder->config().num_pages);
}

TEST_P(VerifiedDecoding, SeveralMayRunInterleaved) {
  const auto decoder = Make(Verified());
  const Prompts prompts = MakePrompts({100, 40, 150});
  SamplingParams params = Greedy(40);
  params.repetition_penalty = 1.3;
  std::vector<Ints> want;  // of each call alone
  for (const Ints& prompt : prompts) {
    want.push_back(Generate(*decoder, {prompt}, params)[0].token_ids);
  }
  std::vector<std::unique_ptr<Generation>> calls;
  for (const Ints& prompt : prompts) calls.push_back(decoder->Start({prompt}, {params}));
  FinishInTurns(calls);
  ExpectAnswers(calls, want);
}

TEST_P(VerifiedDecoding, ANanEndsItsSequenceAtTheSameToken) {
  if (!is_cpu()) GTEST_SKIP() << "compares the tokens before the NaN, equal only on the CPU";
  const Prompts prompts = MakePrompts({60, 70, 80});
  const auto clean = Generate(*Make(Dense()), prompts, Greedy(30));
  for (size_t at : {0, 1, 2, 5, 11}) {
    SCOPED_TRACE(at);
    TinyModel spoiled = weights_;
    const int32_t bad = clean[1].token_ids[at];
    Values& table = spoiled.tensor("model.embed_tokens.weight").values;
    std::fill_n(table.begin() + bad * model_.hidden_size, model_.hidden_size, NAN);
    std::swap(spoiled, weights_);
    for (const DecodeConfig& config : Ways({1, 4, 16})) {
      const auto params = std::vector(3, Greedy(30));
      const auto want = Finish(*Make(Dense())->Start(prompts, params));
      const auto got = Finish(*Make(config)->Start(prompts, params));
      for (size_t i = 0; i < prompts.size(); ++i) {
        EXPECT_EQ(got[i].token_ids, want[i].token_ids);
        EXPECT_EQ(got[i].finish_reason, want[i].finish_reason);
        EXPECT_EQ(got[i].error, want[i].error);
      }
    }
    std::swap(spoiled, weights_);
  }
}

// The same where tokens are known to rounding only: a NaN goes in with one token's embedding.
TEST_P(VerifiedDecoding, ANanEndsOnlyTheSequencesThatMeetIt) {
  const Prompts prompts = MakePrompts({60, 70, 80});
  const auto dense = Make(Dense());
  const int32_t bad = Generate(*dense, prompts, Greedy(30))[1].token_ids[5];
  Values& table = weights_.tensor("model.embed_tokens.weight").values;
  std::fill_n(table.begin() + bad * model_.hidden_size, model_.hidden_size, NAN);
  for (const DecodeConfig& config : Ways({1, 4, 16})) {
    const auto decoder = Make(config);
    const auto results = Generate(*decoder, prompts, Greedy(30));
    for (size_t i = 0; i < prompts.size(); ++i) {
      SCOPED_TRACE(::testing::Message() << "prompt " << i << ", drafts " << config.draft_tokens);
      const Ints& tokens = results[i].token_ids;
      const bool met = std::count(prompts[i].begin(), prompts[i].end(), bad) > 0;
      const auto at = std::find(tokens.begin(), tokens.end(), bad);
      if (met) {
        EXPECT_TRUE(tokens.empty());
        EXPECT_EQ(results[i].finish_reason, FinishReason::kError);
      } else if (tokens.size() == 30) {
        EXPECT_LE(std::distance(at, tokens.end()), 1);  // drawn last, never read
        EXPECT_EQ(results[i].finish_reason, FinishReason::kLength);
      } else {
        EXPECT_EQ(std::distance(at, tokens.end()), 1);
        EXPECT_EQ(results[i].finish_reason, FinishReason::kError);
        EXPECT_FALSE(results[i].error.empty());
      }
      ExpectDenseDraws(*dense, prompts[i], Greedy(30), tokens);
    }
    EXPECT_EQ(decoder->num_free_pages(), decoder->config().num_pages);
  }
}

// Verified draws with some seeds and dense draws with others, as two samples of one distribution.
TEST_P(VerifiedDecoding, KeepsTheDistribution) {
  constexpr int64_t kVocab = 16, kSeeds = 1200;
  model_.vocab_size = kVocab;
  weights_ = TinyModel(model_, 8);
  Ints prompt = MakePrompts({40})[0];
  for (int32_t& token : prompt) token %= kVocab;
  // Counts of the fourth token, which follows drafts kept and drafts rejected.
  auto histogram = [&](const DecodeConfig& config, uint64_t first_seed) {
    const auto decoder = Make(config);
    std::vector<double> counts(kVocab, 0.0);
    for (uint64_t seed = first_seed; seed < first_seed + kSeeds; seed += 4) {
      std::vector<SamplingParams> params;
      for (uint64_t i = 0; i < 4; ++i) {
        params.push_back(Drawn(4, seed + i));
        params.back().temperature = 3.0;
      }
      const auto results = Finish(*decoder->Start(Prompts(4, prompt), params));
      for (const auto& result : results) counts[static_cast<size_t>(result.token_ids[3])] += 1.0;
    }
    return counts;
  };
  DecodeConfig config = Verified(2);
  config.token_budget = 4;
  const auto verified = histogram(config, 0), dense = histogram(Dense(), 100'000);
  double chi_squared = 0.0;
  int freedom = -1;
  for (size_t i = 0; i < kVocab; ++i) {
    const double both = verified[i] + dense[i];
    if (both == 0.0) continue;
    const double difference = verified[i] - dense[i];
    chi_squared += difference * difference / both;
    ++freedom;
  }
  EXPECT_GE(freedom, 6) << "too narrow a distribution to say anything";
  // Mean freedom, variance 2 freedom: three deviations.
  EXPECT_LT(chi_squared, freedom + 3.0 * std::sqrt(2.0 * freedom));
}

INSTANTIATE_TEST_SUITE_P(Backends, VerifiedDecoding, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
