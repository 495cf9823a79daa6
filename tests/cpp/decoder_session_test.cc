// Session: turns that go on where the last one ended.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "reference_model.h"
#include "session_test.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

class Sessions : public SessionTest {};

TEST_P(Sessions, WriteWhatOneLongPromptWrites) {
  if (GetParam().dtype != DType::kFloat32) GTEST_SKIP() << "other chunks round another cache";
  const auto decoder = Make(Dense());
  const Prompts prompts = MakePrompts({100, 7, 64, 1, 130});
  for (const SamplingParams& params : {Greedy(20), Drawn(20)}) {
    const auto session = decoder->StartSession();
    Ints text;
    for (const Ints& prompt : prompts) {
      text.insert(text.end(), prompt.begin(), prompt.end());
      const Ints want = One(*decoder, text, params);
      EXPECT_EQ(Turn(*session, prompt, params), want);
      text.insert(text.end(), want.begin(), want.end());
      EXPECT_EQ(session->token_ids(), text);
    }
  }
}

TEST_P(Sessions, ReadOnlyWhatIsNew) {
  const auto decoder = Make(Dense());  // chunks of 64
  const auto session = decoder->StartSession();
  const Prompts prompts = MakePrompts({150, 70});
  const auto first = Finish(*session->Start(prompts[0], Greedy(10)))[0];
  EXPECT_EQ(first.prompt_tokens, 150);
  EXPECT_EQ(first.cached_tokens, 0);
  EXPECT_EQ(session->num_cached(), 159) << "all but the newest";
  const auto turn = session->Start(prompts[1], Greedy(10));
  EXPECT_EQ(turn->prefill_progress().tokens_total, 71);
  turn->Advance();
  EXPECT_EQ(turn->prefill_progress().tokens_done, 49) << "a chunk ends with a page";
  EXPECT_TRUE(turn->results()[0].token_ids.empty());
  turn->Advance();
  EXPECT_EQ(turn->prefill_progress().tokens_done, 71);
  EXPECT_EQ(turn->results()[0].token_ids.size(), 1u);
  const auto second = Finish(*turn)[0];
  EXPECT_EQ(second.prompt_tokens, 230);
  EXPECT_EQ(second.cached_tokens, 159);
  EXPECT_GT(second.time_to_first_token_s, 0.0);
}

TEST_P(Sessions, AppendedTokensAreReadAheadOfTheTurn) {
  if (GetParam().dtype != DType::kFloat32) GTEST_SKIP() << "other chunks round another cache";
  const auto decoder = Make(Tidal());
  const Prompts prompts = MakePrompts({130, 5, 40});
  const Ints want = One(*decoder, Join(prompts), Greedy(20));
  const auto session = decoder->StartSession();
  const auto reading = session->Append(prompts[0]);
  EXPECT_EQ(reading->prefill_progress().tokens_total, 129);
  const auto read = Finish(*reading)[0];
  EXPECT_EQ(read.finish_reason, FinishReason::kLength);
  EXPECT_TRUE(read.token_ids.empty());
  EXPECT_EQ(reading->prefill_progress().tokens_done, 129);
  EXPECT_EQ(session->num_cached(), 129);
  Read(*session, Join({prompts[1], prompts[2]}));
  EXPECT_EQ(session->num_cached(), 174);
  EXPECT_EQ(Turn(*session, {}, Greedy(20)), want);
  const auto eager = decoder->StartSession();
  for (const Ints& prompt : prompts) {
    Read(*eager, prompt);
  }
  EXPECT_EQ(Turn(*eager, {}, Greedy(20)), want);
}

// A turn without a prompt decodes on, through the plan: two such turns are one.
TEST_P(Sessions, GoOnAsIfTheTurnHadNotEnded) {
  const Ints prompt = KnowFewTokens(MakePrompts({120}))[0];
  for (const DecodeConfig& config : {Dense(), Tidal(), Corrected(7), Corrected(4), Verified(),
                                     Verified(Drafts::kNgram), Verified(Drafts::kBoth)}) {
    if (config.verify && !is_cpu()) continue;  // other rounds of drafts round another cache
    const auto decoder = Make(config);
    for (const SamplingParams& params : {Greedy(60), Drawn(60)}) {
      const Ints want = One(*decoder, prompt, params);
      const auto session = decoder->StartSession();
      std::vector<Ints> parts;
      for (int64_t count : {1, 2, 17, 30, 10}) {
        SamplingParams part = params;
        part.max_new_tokens = count;
        parts.push_back(Turn(*session, parts.empty() ? prompt : Ints{}, part));
      }
      EXPECT_EQ(Join(parts), want);
      EXPECT_EQ(session->token_ids(), Join({prompt, want}));
    }
  }
}

// With a correction due sometime, the next prompt brings it forward: the cache is that of a prompt.
TEST_P(Sessions, CorrectWhatIsLeftWhileTheyReadOn) {
  if (GetParam().dtype != DType::kFloat32) GTEST_SKIP() << "other chunks round another cache";
  const Prompts prompts = MakePrompts({100, 20});
  const auto decoder = Make(Corrected(20));
  for (int64_t count : {12, 30}) {  // corrected never and once
    const auto session = decoder->StartSession();
    const Ints text = Join({prompts[0], Turn(*session, prompts[0], Greedy(count)), prompts[1]});
    const auto turn = session->Start(prompts[1], Greedy(50));
    EXPECT_EQ(turn->results()[0].cached_tokens, count == 12 ? 100 : 120);
    EXPECT_EQ(Finish(*turn)[0].token_ids, One(*decoder, text, Greedy(50)));
  }
}

TEST_P(Sessions, KeepAStopTokenInTheirContext) {
  if (GetParam().dtype != DType::kFloat32) GTEST_SKIP() << "other chunks round another cache";
  for (const DecodeConfig& config : {Dense(), Verified(), Verified(Drafts::kNgram)}) {
    const auto decoder = Make(config);
    const Prompts prompts = MakePrompts({100, 20});
    const Ints all = One(*decoder, prompts[0], Greedy(30));
    SamplingParams params = Greedy(30);
    params.stop_token_ids = {all[12]};
    const auto session = decoder->StartSession();
    const Ints tokens = Turn(*session, prompts[0], params);
    EXPECT_EQ(tokens.back(), all[12]);
    const Ints text = Join({prompts[0], tokens, prompts[1]});
    const Ints want = One(*decoder, text, Greedy(20));
    EXPECT_EQ(Turn(*session, prompts[1], Greedy(20)), want);
    EXPECT_EQ(session->token_ids(), Join({text, want}));
  }
}

// However a turn ends, the tokens it gave are those that stay.
TEST_P(Sessions, AStoppedTurnKeepsWhatItGave) {
  const Ints prompt = KnowFewTokens(MakePrompts({100}))[0];
  for (const DecodeConfig& config : {Tidal(), Corrected(5), Verified(), Verified(Drafts::kNgram)}) {
    const auto decoder = Make(config);
    const auto session = decoder->StartSession();
    Ints text = prompt;
    for (size_t count : {1, 4, 11}) {
      const auto turn = session->Start(count == 1 ? prompt : Ints{}, Greedy(30));
      while (turn->results()[0].token_ids.size() < count) turn->Advance();
      if (count != 4) turn->Stop(0, FinishReason::kAbort);  // else destroyed
      const Ints tokens = turn->results()[0].token_ids;
      text.insert(text.end(), tokens.begin(), tokens.end());
      if (count != 4) {
        EXPECT_EQ(session->token_ids(), text);
      }
    }
    EXPECT_EQ(session->token_ids(), text);
    EXPECT_EQ(session->num_cached(), static_cast<int64_t>(text.size()) - 1);
    if (!is_cpu()) continue;  // other rounds of drafts round another cache
    const Ints whole = One(*decoder, prompt, Greedy(31));
    EXPECT_EQ(Turn(*session, {}, Greedy(15)), Ints(whole.begin() + 16, whole.end()));
  }
}

TEST_P(Sessions, ATurnThatHasNotReadItsTokensTakesThemBack) {
  const auto decoder = Make(Tidal());
  const Prompts prompts = MakePrompts({100, 200});
  const auto session = decoder->StartSession(), other = decoder->StartSession();
  for (Session* each : {session.get(), other.get()}) Turn(*each, prompts[0], Greedy(9));
  const Ints text = session->token_ids();
  const int64_t free = decoder->num_free_pages();
  {
    const auto turn = session->Start(prompts[1], Greedy(9));
    turn->Advance();
    EXPECT_LT(decoder->num_free_pages(), free);
  }
  EXPECT_EQ(decoder->num_free_pages(), free);
  EXPECT_EQ(decoder->num_free_rows(), 4);
  EXPECT_EQ(session->token_ids(), text);
  EXPECT_EQ(Turn(*session, {}, Greedy(20)), Turn(*other, {}, Greedy(20)));
}

TEST_P(Sessions, TakeBackWhatTheyHaveNotFinishedReading) {
  const auto decoder = Make(Dense());
  const auto session = decoder->StartSession();
  Read(*session, MakePrompts({40})[0]);
  session->Append(MakePrompts({300})[0])->Advance();
  EXPECT_EQ(session->token_ids().size(), 40u);
  const auto one = decoder->StartSession();
  EXPECT_TRUE(one->Append({7})->done()) << "its only token is the next turn's to read";
  EXPECT_EQ(one->token_ids(), Ints{7});
}

TEST_P(Sessions, HoldPagesForTheirTokensAndForTheTurn) {
  const auto decoder = Make(Tidal());  // pages of 16
  const int64_t all = decoder->num_free_pages();
  auto session = decoder->StartSession();
  EXPECT_EQ(decoder->num_free_pages(), all);
  {
    const auto turn = session->Start(MakePrompts({30})[0], Greedy(40));
    turn->Advance();
    turn->Advance();
    EXPECT_EQ(decoder->num_free_pages(), all - 5) << "for 70 tokens";
    turn->Stop(0, FinishReason::kStop);
    EXPECT_EQ(decoder->num_free_pages(), all - 2) << "for 32";
    EXPECT_EQ(decoder->num_free_rows(), 4);
  }
  Read(*session, MakePrompts({1})[0]);
  EXPECT_EQ(decoder->num_free_pages(), all - 3);
  session->Truncate(16);
  EXPECT_EQ(decoder->num_free_pages(), all - 1);
  session->Truncate(0);
  EXPECT_EQ(decoder->num_free_pages(), all);
  Read(*session, MakePrompts({100})[0]);
  session.reset();
  EXPECT_EQ(decoder->num_free_pages(), all);
}

TEST_P(Sessions, OutliveTheirOwnerWhileATurnRuns) {
  const auto decoder = Make(Tidal());
  const int64_t all = decoder->num_free_pages();
  const Ints prompt = MakePrompts({100})[0];
  auto session = decoder->StartSession();
  auto turn = session->Start(prompt, Greedy(12));
  session.reset();
  EXPECT_EQ(Finish(*turn)[0].token_ids, One(*decoder, prompt, Greedy(12)));
  turn.reset();
  EXPECT_EQ(decoder->num_free_pages(), all);
}

TEST_P(Sessions, TruncatedOnesAreAsIfNothingHadFollowed) {
  const Prompts prompts = MakePrompts({100, 40, 30});
  for (const DecodeConfig& config : {Dense(), Tidal(), Corrected(6)}) {
    const auto decoder = Make(config);
    for (int64_t length : {100, 99, 64, 33, 1}) {
      const auto session = decoder->StartSession(), fresh = decoder->StartSession();
      Turn(*session, prompts[0], Greedy(20));
      Turn(*session, prompts[1], Greedy(20));
      session->Truncate(length);
      EXPECT_EQ(session->token_ids(), Ints(prompts[0].begin(), prompts[0].begin() + length));
      Read(*fresh, session->token_ids());
      EXPECT_LE(session->num_cached(), length);
      const Ints got = Turn(*session, prompts[2], Greedy(20));
      const Ints want = Turn(*fresh, prompts[2], Greedy(20));
      if (GetParam().dtype == DType::kFloat32) {
        EXPECT_EQ(got, want);
      }
    }
  }
}

// Back where a turn ended, decoding goes on from there as it would have.
TEST_P(Sessions, GoOnFromWhereTheyWereTruncatedTo) {
  const Prompts prompts = MakePrompts({100, 70});
  const auto decoder = Make(Tidal());
  const Ints want = One(*decoder, prompts[0], Greedy(40));
  const auto session = decoder->StartSession();
  Turn(*session, prompts[0], Greedy(20));
  Turn(*session, prompts[1], Greedy(20));
  session->Truncate(120);
  EXPECT_EQ(Turn(*session, {}, Greedy(20)), Ints(want.begin() + 20, want.end()));
  session->Truncate(120);
  session->Append(prompts[1])->Advance();
  session->Truncate(120);
  EXPECT_EQ(Turn(*session, {}, Greedy(20)), Ints(want.begin() + 20, want.end()));
}

// keep: the same as truncating and then starting a turn, but all or nothing.
TEST_P(Sessions, ATurnMayKeepABeginning) {
  const auto decoder = Make(Tidal());
  const Prompts prompts = MakePrompts({100, 40, 30});
  const auto one = decoder->StartSession(), two = decoder->StartSession();
  for (Session* session : {one.get(), two.get()}) Turn(*session, prompts[0], Greedy(20));
  one->Truncate(77);
  const Ints want = Turn(*one, prompts[1], Greedy(20));
  EXPECT_TRUE(Throws<CapacityError>([&] { two->Start(prompts[1], Greedy(400), 77); },
                                    {"77 tokens", "40 more", "max_seq_len 512"}));
  EXPECT_EQ(two->token_ids().size(), 120u);
  const auto turn = two->Start(prompts[1], Greedy(20), 77);
  EXPECT_EQ(turn->results()[0].cached_tokens, 77);
  EXPECT_EQ(Finish(*turn)[0].token_ids, want);
  EXPECT_EQ(two->token_ids(), one->token_ids());
  // All tokens kept and none added: the last is computed again.
  two->Truncate(100);
  EXPECT_EQ(Turn(*two, {}, Greedy(20)).size(), 20u);
}

TEST_P(Sessions, TakeTurnsWithEachOtherAndWithCalls) {
  const auto decoder = Make(Tidal());
  const Prompts prompts = MakePrompts({100, 90, 70});
  std::vector<Ints> want;
  for (const Ints& prompt : prompts) want.push_back(One(*decoder, prompt, Drawn(25)));
  const auto one = decoder->StartSession(), two = decoder->StartSession();
  std::vector<std::unique_ptr<Generation>> calls;
  calls.push_back(one->Start(prompts[0], Drawn(25)));
  calls.push_back(two->Start(prompts[1], Drawn(25)));
  calls.push_back(decoder->Start({prompts[2]}, {Drawn(25)}));
  FinishInTurns(calls);
  ExpectAnswers(calls, want);
}

TEST_P(Sessions, ShowTheSetsOfTheirLastTurnOnly) {
  const auto decoder = Make(Tidal());  // a budget of 32
  const auto session = decoder->StartSession();
  const Prompts prompts = MakePrompts({100, 20, 10});
  Turn(*session, prompts[0], Greedy(10));
  EXPECT_EQ(decoder->Selection(0)[0].token_idx[31], 108);
  Turn(*session, prompts[1], Greedy(1));
  EXPECT_TRUE(decoder->Selection(0).empty()) << "its prompt was read densely";
  session->Truncate(129);
  Turn(*session, {}, Greedy(10));
  EXPECT_EQ(decoder->Selection(0)[0].token_idx[31], 137);
  session->Truncate(5);
  Turn(*session, prompts[2], Greedy(10));
  EXPECT_TRUE(decoder->Selection(0).empty()) << "never longer than the budget";
}

TEST_P(Sessions, RefuseWhatDoesNotFitAndStayUsable) {
  DecodeConfig config = Tidal();
  config.num_pages = 20;
  const auto decoder = Make(config);
  const Prompts prompts = MakePrompts({100, 250});
  const auto session = decoder->StartSession(), other = decoder->StartSession(200);
  Turn(*session, prompts[0], Greedy(12));
  const Ints text = session->token_ids();
  auto refuse = [&](auto action, std::initializer_list<std::string> parts) {
    const int64_t free = decoder->num_free_pages();
    EXPECT_TRUE(Throws<CapacityError>(action, parts));
    EXPECT_EQ(decoder->num_free_pages(), free);
    EXPECT_EQ(session->token_ids(), text);
    EXPECT_EQ(session->num_cached(), 111);
  };
  refuse([&] { session->Start(prompts[1], Greedy(200)); }, {"112 tokens", "562", "512"});
  refuse([&] { session->Start({}, Greedy(std::numeric_limits<int64_t>::max())); }, {"512"});
  refuse([&] { session->Start(prompts[1], Greedy(1)); }, {"23 pages", "have 20 in all"});
  refuse([&] { session->Append(prompts[1]); }, {"23 pages", "have 20 in all"});
  refuse([&] { other->Append(prompts[1]); }, {"250", "max_seq_len 200"});
  EXPECT_EQ(other->max_seq_len(), 200);
  EXPECT_TRUE(Throws<CapacityError>([&] { decoder->StartSession(513); }, {"513", "512"}));
  Read(*other, Ints(100, 1));  // nobody runs that would give its pages back
  refuse([&] { Turn(*session, Ints(150, 1), Greedy(1)); }, {"10 pages", "6 free of 20"});
  refuse([&] { Read(*session, Ints(150, 1)); }, {"10 pages", "6 free of 20"});
  EXPECT_EQ(Turn(*session, {}, Greedy(16)).size(), 16u);
}

// While others run that will give pages back, a turn waits in line for them.
TEST_P(Sessions, WaitForThePagesOfOthers) {
  DecodeConfig config = Tidal();
  config.num_pages = 32;
  const auto decoder = Make(config);
  const Prompts prompts = MakePrompts({300, 250});
  const Ints want = One(*decoder, prompts[1], Greedy(12));
  const auto session = decoder->StartSession();
  const auto running = decoder->Start({prompts[0]}, {Greedy(200)});
  while (running->Advance().empty()) {  // until its first token: it has its pages before the turn
  }
  const auto turn = session->Start(prompts[1], Greedy(12));
  EXPECT_EQ(Finish(*turn)[0].token_ids.size(), 12u);
  if (GetParam().dtype == DType::kFloat32) {  // other chunks round another cache
    EXPECT_EQ(turn->results()[0].token_ids, want);
  }
  EXPECT_EQ(Finish(*running)[0].token_ids.size(), 200u);
}

TEST_P(Sessions, RefuseWhatMakesNoSense) {
  const auto decoder = Make(Tidal());
  const auto session = decoder->StartSession();
  auto refuse = [&](auto action, std::initializer_list<std::string> parts) {
    EXPECT_TRUE(Throws<InvalidArgument>(action, parts));
  };
  refuse([&] { session->Start({}, Greedy(1)); }, {"no tokens"});
  refuse([&] { session->Append({}); }, {"no tokens"});
  refuse([&] { session->Append({1, 320}); }, {"320", "319"});
  refuse([&] { session->Start({-1}, Greedy(1)); }, {"-1"});
  refuse([&] { session->Start({1}, Greedy(0)); }, {"max_new_tokens: got 0"});
  refuse([&] { session->Start({1}, Greedy(1), 1); }, {"keep: got 1, expected 0 to 0"});
  refuse([&] { session->Truncate(1); }, {"length: got 1"});
  refuse([&] { session->Truncate(-1); }, {"length: got -1"});
  refuse([&] { decoder->StartSession(-1); }, {"max_seq_len: got -1"});
  const auto turn = session->Start({1, 2}, Greedy(5));
  refuse([&] { session->Start({1}, Greedy(1)); }, {"a turn is running"});
  refuse([&] { session->Append({1}); }, {"a turn is running"});
  refuse([&] { session->Truncate(0); }, {"a turn is running"});
  refuse([&] { session->Fork(); }, {"a turn is running"});
  refuse([&] { session->token_ids(); }, {"a turn is running"});
  Finish(*turn);
  EXPECT_EQ(session->token_ids().size(), 7u);
}

INSTANTIATE_TEST_SUITE_P(Backends, Sessions, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

// The second turn's tokens against the model in double precision: it reads the first turn's prompt
// densely, decodes its tokens through the plan, reads the second prompt densely and decodes on.
TEST(SessionsAgainstReference, SecondTurnsMatch) {
  for (const ModelConfig& model : {TinyConfig(), OddConfig()}) {
    SCOPED_TRACE(model.hidden_size);
    DecodeConfig config;
    config.dtype = config.kv_dtype = DType::kFloat32;
    config.max_seq_len = 150;
    config.page_size = 7;
    config.prefill_chunk = 16;
    config.num_threads = 1;
    config.select_layers = {2, 4};
    config.token_budget = 24;
    config.sparse_min_context = 0;
    const TinyModel weights(model, 9);
    Decoder decoder(model, config, weights);
    const auto session = decoder.StartSession();
    SamplingParams params;
    params.max_new_tokens = 15;
    ReferenceModel reference(model, weights, decoder.config());
    for (int32_t count : {50, 9, 20}) {
      const Ints prompt = Random(3).Below(count, static_cast<int32_t>(model.vocab_size));
      const auto turn = session->Start(prompt, params);
      while (!turn->done()) turn->Advance();
      EXPECT_EQ(turn->results()[0].token_ids, reference.Turn(prompt, 15));
    }
  }
}

}  // namespace
}  // namespace tidal::test
