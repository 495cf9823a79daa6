// Generation: calls, their sequences, when they end, and what they leave to their neighbours.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "throws.h"
#include "tidal/decoder.h"
#include "tidal/error.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class Generations : public DecoderTest {
 protected:
  // A row of NaN for one token: whoever reads it has no usable logits.
  void Spoil(int32_t token) {
    Values& table = weights_.tensor("model.embed_tokens.weight").values;
    std::fill_n(table.begin() + token * model_.hidden_size, model_.hidden_size, NAN);
  }

  static SamplingParams Drawn(int64_t max_new_tokens, uint64_t seed) {
    SamplingParams params = Greedy(max_new_tokens);
    params.temperature = 1.0;
    params.seed = seed;
    return params;
  }
};

TEST_P(Generations, ResultsTellWhatHappened) {
  const auto decoder = Make(Tidal());
  const Prompts prompts = MakePrompts({3, 100});
  const auto results = Generate(*decoder, prompts, Greedy(8));
  ASSERT_EQ(results.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(results[i].token_ids.size(), 8u);
    EXPECT_EQ(results[i].finish_reason, FinishReason::kLength);
    EXPECT_EQ(results[i].error, "");
    EXPECT_EQ(results[i].prompt_tokens, static_cast<int64_t>(prompts[i].size()));
    EXPECT_GT(results[i].time_to_first_token_s, 0.0);
    EXPECT_GE(results[i].decode_s, 0.0);
  }
}

TEST_P(Generations, EventsAreTheTokensInOrder) {
  const auto decoder = Make(Dense());
  const auto generation = decoder->Start(MakePrompts({3, 100, 64}), std::vector(3, Greedy(6)));
  std::vector<Ints> seen(3);
  while (!generation->done()) {
    for (const TokenEvent& event : generation->Advance()) {
      seen[static_cast<size_t>(event.sequence)].push_back(event.token_id);
    }
  }
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(seen[i], generation->results()[i].token_ids);
  EXPECT_TRUE(generation->Advance().empty()) << "nothing happens once done";
}

TEST_P(Generations, PrefillGoesChunkByChunk) {
  const auto decoder = Make(Dense());  // chunks of 64
  const auto generation = decoder->Start(MakePrompts({130, 20}), std::vector(2, Greedy(2)));
  Ints done;
  while (generation->prefill_progress().tokens_done < 150) {
    EXPECT_EQ(generation->prefill_progress().tokens_total, 150);
    generation->Advance();
    done.push_back(static_cast<int32_t>(generation->prefill_progress().tokens_done));
  }
  EXPECT_EQ(done, (Ints{20, 84, 148, 150})) << "the short one first";
}

TEST_P(Generations, ShortPromptsAreReadTogether) {
  const auto decoder = Make(Dense());  // chunks of 64
  const auto generation = decoder->Start(MakePrompts({20, 9, 15, 12}), std::vector(4, Greedy(2)));
  EXPECT_EQ(generation->Advance().size(), 4u) << "56 tokens in one pass";
  EXPECT_EQ(generation->prefill_progress().tokens_done, 56);
}

// More than there are rows or pages for wait in line.
TEST_P(Generations, AllAreServedInTheEnd) {
  if (!is_cpu()) GTEST_SKIP() << "compares batch rows with rows alone, bitwise only on the CPU";
  DecodeConfig config = Tidal();
  config.num_pages = 20;
  const auto decoder = Make(config);
  const Prompts prompts = MakePrompts({100, 7, 150, 60, 33, 90, 1, 20, 77});
  const auto together = Generate(*decoder, prompts, Greedy(25));
  for (size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(Generate(*decoder, {prompts[i]}, Greedy(25))[0].token_ids, together[i].token_ids);
  }
  EXPECT_EQ(decoder->num_free_pages(), 20);
}

// Nobody has to wait for tokens to make them.
TEST_P(Generations, GoOnWithoutAReader) {
  const auto decoder = Make(Tidal());
  const Prompts prompts = MakePrompts({50});
  const Ints want = Generate(*decoder, prompts, Greedy(20))[0].token_ids;
  const auto unread = decoder->Start(prompts, {Greedy(20)});
  Generate(*decoder, prompts, Greedy(60));
  EXPECT_EQ(decoder->num_free_pages(), decoder->config().num_pages) << "it has ended";
  EXPECT_FALSE(unread->done());
  EXPECT_TRUE(unread->results()[0].token_ids.empty());
  EXPECT_EQ(unread->Advance(0.0).size(), 1u) << "the prompt's successor";
  EXPECT_EQ(Finish(*unread)[0].token_ids, want);
}

TEST_P(Generations, KnownPromptsAreNotReadAgain) {
  DecodeConfig config = Tidal();
  config.prefix_cache = true;
  const auto decoder = Make(config);  // pages of 16
  const Prompts prompts = MakePrompts({100});
  const auto first = Generate(*decoder, prompts, Greedy(20))[0];
  const auto again = Generate(*decoder, prompts, Greedy(20))[0];
  EXPECT_EQ(first.cached_tokens, 0);
  EXPECT_EQ(again.cached_tokens, 96);
  if (GetParam().dtype == DType::kFloat32) {  // other chunks round another cache
    EXPECT_EQ(again.token_ids, first.token_ids);
  }
  EXPECT_EQ(decoder->num_free_pages(), decoder->config().num_pages) << "known pages are room";
}

TEST_P(Generations, StopTokenEndsItsSequenceAndIsTheLastId) {
  const auto decoder = Make(Dense());
  const Prompts prompts = MakePrompts({10, 30});
  const auto want = Generate(*decoder, prompts, Greedy(20));
  const int32_t stop = want[0].token_ids[7];
  SamplingParams params = Greedy(20);
  params.stop_token_ids = {319, stop};
  for (size_t i = 0; i < 2; ++i) {
    const auto got = Generate(*decoder, {prompts[i]}, params)[0];
    const Ints alone = Generate(*decoder, {prompts[i]}, Greedy(20))[0].token_ids;
    const auto end = std::find_first_of(alone.begin(), alone.end(), params.stop_token_ids.begin(),
                                        params.stop_token_ids.end());
    EXPECT_EQ(got.token_ids, Ints(alone.begin(), end == alone.end() ? end : end + 1));
    EXPECT_EQ(got.finish_reason, end == alone.end() ? FinishReason::kLength : FinishReason::kStop);
  }
}

TEST_P(Generations, OneNewTokenNeedsNoStep) {
  const auto decoder = Make(Tidal());
  const auto result = Generate(*decoder, MakePrompts({70}), Greedy(1))[0];
  EXPECT_EQ(result.token_ids.size(), 1u);
  EXPECT_EQ(result.finish_reason, FinishReason::kLength);
}

TEST_P(Generations, StopEndsOneSequenceForTheGivenReason) {
  const auto decoder = Make(Dense());
  const Prompts prompts = MakePrompts({10, 30});
  const auto generation = decoder->Start(prompts, std::vector(2, Greedy(20)));
  for (int i = 0; i < 6; ++i) generation->Advance();
  generation->Stop(0, FinishReason::kAbort);
  const auto tokens = generation->results()[0].token_ids;
  const auto results = Finish(*generation);
  EXPECT_EQ(results[0].finish_reason, FinishReason::kAbort);
  EXPECT_EQ(results[0].token_ids, tokens);
  EXPECT_EQ(results[1].finish_reason, FinishReason::kLength);
  EXPECT_EQ(results[1].token_ids.size(), 20u);
  generation->Stop(0, FinishReason::kStop);  // it has ended: no effect
  EXPECT_EQ(generation->results()[0].finish_reason, FinishReason::kAbort);
  EXPECT_THROW(generation->Stop(2, FinishReason::kStop), InvalidArgument);
  EXPECT_THROW(generation->Stop(-1, FinishReason::kStop), InvalidArgument);
}

TEST_P(Generations, StopDuringPrefillLeavesNoToken) {
  const auto decoder = Make(Dense());
  const auto generation = decoder->Start(MakePrompts({200, 20}), std::vector(2, Greedy(4)));
  generation->Advance();
  generation->Stop(0, FinishReason::kAbort);
  const auto results = Finish(*generation);
  EXPECT_TRUE(results[0].token_ids.empty());
  EXPECT_EQ(results[1].token_ids.size(), 4u);
}

TEST_P(Generations, PagesComeBackHoweverTheCallEnds) {
  const auto decoder = Make(Tidal());
  const int64_t all = decoder->num_free_pages();
  const Prompts prompts = MakePrompts({17, 33});
  decoder->Start(prompts, std::vector(2, Greedy(15)));
  EXPECT_EQ(decoder->num_free_pages(), all) << "destroyed at once";
  {
    const auto generation = decoder->Start(prompts, std::vector(2, Greedy(15)));
    for (int i = 0; i < 4; ++i) generation->Advance();
  }
  EXPECT_EQ(decoder->num_free_pages(), all) << "destroyed half-way";
  Generate(*decoder, prompts, Greedy(15));
  EXPECT_EQ(decoder->num_free_pages(), all) << "run to the end";
  DecodeLogits(*decoder, prompts[1], 5);
  PrefillLogits(*decoder, prompts[1], 5);
  EXPECT_EQ(decoder->num_free_pages(), all) << "logits only";
}

TEST_P(Generations, NanInThePromptEndsOnlyThatSequence) {
  Prompts prompts = MakePrompts({30, 30, 30});
  for (Ints& prompt : prompts) std::replace(prompt.begin(), prompt.end(), 7, 8);
  std::vector<SamplingParams> params(3, Greedy(20));
  // The same batches as below: the middle sequence leaves right after its prompt.
  params[1].max_new_tokens = 1;
  const auto want = Finish(*Make(Tidal())->Start(prompts, params));
  Spoil(7);
  prompts[1][15] = 7;
  params[1].max_new_tokens = 20;
  const auto decoder = Make(Tidal());
  const auto got = Finish(*decoder->Start(prompts, params));
  EXPECT_EQ(got[1].finish_reason, FinishReason::kError);
  EXPECT_TRUE(got[1].token_ids.empty());
  EXPECT_NE(got[1].error.find("NaN"), std::string::npos) << got[1].error;
  for (size_t i : {0, 2}) {
    EXPECT_EQ(got[i].token_ids, want[i].token_ids);
    EXPECT_EQ(got[i].finish_reason, FinishReason::kLength);
    EXPECT_EQ(got[i].error, "");
  }
}

TEST_P(Generations, NanAmongTheGeneratedTokensEndsOnlyThatSequence) {
  const Prompts prompts = MakePrompts({30, 40, 50});
  std::vector<SamplingParams> params(3, Greedy(20));
  params[1].max_new_tokens = 4;
  const auto want = Finish(*Make(Tidal())->Start(prompts, params));
  const int32_t bad = want[1].token_ids[2];
  auto meets = [&](const Ints& ids) { return std::find(ids.begin(), ids.end(), bad) != ids.end(); };
  for (size_t i = 0; i < 3; ++i) {
    ASSERT_FALSE(meets(prompts[i])) << "choose another seed for this test's prompts";
    ASSERT_TRUE(i == 1 || !meets(want[i].token_ids)) << "choose another seed";
  }
  Spoil(bad);
  params[1].max_new_tokens = 20;
  const auto got = Finish(*Make(Tidal())->Start(prompts, params));
  EXPECT_EQ(got[1].finish_reason, FinishReason::kError);
  const auto& ids = want[1].token_ids;
  EXPECT_EQ(got[1].token_ids, Ints(ids.begin(), std::find(ids.begin(), ids.end(), bad) + 1));
  EXPECT_EQ(got[0].token_ids, want[0].token_ids);
  EXPECT_EQ(got[2].token_ids, want[2].token_ids);
}

TEST_P(Generations, NanLeftInPagesDoesNotReachTheNextSequence) {
  Prompts prompts = MakePrompts({100});
  std::replace(prompts[0].begin(), prompts[0].end(), 7, 8);
  const auto want = Generate(*Make(Tidal()), prompts, Greedy(20))[0].token_ids;
  Spoil(7);
  const auto decoder = Make(Tidal());
  const auto bad = Generate(*decoder, {Ints(300, 7)}, Greedy(20))[0];
  EXPECT_EQ(bad.finish_reason, FinishReason::kError);
  EXPECT_EQ(Generate(*decoder, prompts, Greedy(20))[0].token_ids, want);
}

TEST_P(Generations, SeveralMayRunInterleaved) {
  const auto decoder = Make(Tidal());
  const Prompts prompts = MakePrompts({100, 7, 150});
  std::vector<Ints> want;
  for (const Ints& prompt : prompts) {
    want.push_back(Generate(*decoder, {prompt}, Greedy(25))[0].token_ids);
  }
  std::vector<std::unique_ptr<Generation>> calls;
  for (const Ints& prompt : prompts) calls.push_back(decoder->Start({prompt}, {Greedy(25)}));
  FinishInTurns(calls);
  ExpectAnswers(calls, want);
}

TEST_P(Generations, LogitsInBetweenDoNotDisturbARunningCall) {
  const auto decoder = Make(Tidal());
  const Prompts prompts = MakePrompts({100, 90});
  SamplingParams params = Greedy(25);
  params.repetition_penalty = 1.5;  // keeps state on the device: the tokens seen
  const auto want = Generate(*decoder, {prompts[0]}, params)[0].token_ids;
  const auto generation = decoder->Start({prompts[0]}, {params});
  while (!generation->done()) {
    generation->Advance();
    DecodeLogits(*decoder, prompts[1], 80);
    PrefillLogits(*decoder, prompts[1], 3);
  }
  EXPECT_EQ(generation->results()[0].token_ids, want);
}

TEST_P(Generations, ASeedRepeatsItsTokens) {
  const auto decoder = Make(Tidal());
  const Prompts prompts = MakePrompts({40});
  const auto first = Generate(*decoder, prompts, Drawn(30, 1))[0].token_ids;
  EXPECT_EQ(Generate(*decoder, prompts, Drawn(30, 1))[0].token_ids, first);
  EXPECT_NE(Generate(*decoder, prompts, Drawn(30, 2))[0].token_ids, first);
  EXPECT_NE(Generate(*decoder, prompts, Greedy(30))[0].token_ids, first);
}

TEST_P(Generations, EachSequenceHasItsOwnParameters) {
  if (!is_cpu()) GTEST_SKIP() << "compares batch rows with rows alone, bitwise only on the CPU";
  const auto decoder = Make(Dense());
  const Ints prompt = MakePrompts({40})[0];
  SamplingParams penalised = Greedy(30);
  penalised.repetition_penalty = 3.0;
  SamplingParams narrow = Drawn(12, 3);
  narrow.top_k = 5;
  const std::vector<SamplingParams> params = {Drawn(30, 1), Greedy(20), penalised, narrow};
  const auto together = Finish(*decoder->Start(Prompts(4, prompt), params));
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(Generate(*decoder, {prompt}, params[i])[0].token_ids, together[i].token_ids) << i;
  }
  EXPECT_NE(together[1].token_ids,
            Ints(together[2].token_ids.begin(), together[2].token_ids.begin() + 20));
}

TEST_P(Generations, SelectionShowsTheLastSets) {
  const auto decoder = Make(Tidal());
  const auto results = Generate(*decoder, MakePrompts({100, 10, 60}), Greedy(10));
  const Ints seq_lens = {109, 19, 69};  // prompt, and all new tokens but the last
  for (int64_t sequence : {0, 2}) {
    const auto layers = decoder->Selection(sequence);
    ASSERT_EQ(layers.size(), 2u);
    EXPECT_EQ(layers[0].layer, 2);
    EXPECT_EQ(layers[1].layer, 4);
    for (const LayerSelection& layer : layers) {
      EXPECT_EQ(layer.num_sets, model_.num_kv_heads);
      EXPECT_EQ(layer.num_selected, 32);
      ASSERT_EQ(layer.token_idx.size(), 64u);
      for (auto set = layer.token_idx.begin(); set != layer.token_idx.end(); set += 32) {
        EXPECT_EQ(set[0], 0) << "the sink";
        EXPECT_EQ(set[31], seq_lens[static_cast<size_t>(sequence)] - 1) << "the newest";
        EXPECT_TRUE(std::is_sorted(set, set + 32, std::less_equal<>())) << "ascending, distinct";
      }
    }
  }
  EXPECT_TRUE(decoder->Selection(1).empty()) << "never longer than the budget";
  EXPECT_THROW(decoder->Selection(3), InvalidArgument);
  EXPECT_THROW(decoder->Selection(-1), InvalidArgument);
}

TEST_P(Generations, EachCallHasItsSelection) {
  const auto decoder = Make(Tidal());
  const auto first = decoder->Start(MakePrompts({100}), {Greedy(200)});
  const auto second = decoder->Start(MakePrompts({10, 60}), {Greedy(10), Greedy(10)});
  EXPECT_TRUE(second->Selection(0).empty());
  Finish(*second);
  EXPECT_EQ(second->Selection(1)[1].token_idx, decoder->Selection(1)[1].token_idx);
  EXPECT_TRUE(second->Selection(0).empty()) << "never longer than the budget";
  while (first->results()[0].token_ids.size() < 5) first->Advance();
  const auto layers = first->Selection(0);
  ASSERT_EQ(layers.size(), 2u);
  const int32_t newest = layers[0].token_idx[31];
  EXPECT_GE(newest, 100 + 3) << "of the newest step, or of one that has not been handed out";
  EXPECT_LT(newest, 299);
  Finish(*first);
  EXPECT_EQ(first->Selection(0)[0].token_idx[31], 298);
  EXPECT_THROW(first->Selection(1), InvalidArgument);
  EXPECT_THROW(first->Selection(-1), InvalidArgument);
}

TEST_P(Generations, ACallMayFillTheDecoderExactly) {
  const auto decoder = Make(Tidal());  // 4 sequences of 512 tokens
  const auto results = Generate(*decoder, MakePrompts({500, 510, 511, 1}), Greedy(1));
  for (const SequenceResult& result : results) EXPECT_EQ(result.token_ids.size(), 1u);
  EXPECT_EQ(Generate(*decoder, MakePrompts({500}), Greedy(12))[0].token_ids.size(), 12u);
}

INSTANTIATE_TEST_SUITE_P(Backends, Generations, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
