// One decoder, many threads: every call ends with the result it has alone, or with a typed error.
// `make test-tsan` runs these tests under ThreadSanitizer.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <thread>

#include "session_test.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

class Threads : public SessionTest {
 protected:
  // Runs all actions at once, each on a thread of its own.
  static void RunAll(const std::vector<std::function<void()>>& actions) {
    std::atomic<size_t> num_there{0};
    std::vector<std::thread> threads;
    for (const auto& action : actions) {
      threads.emplace_back([&] {
        ++num_there;
        while (num_there < actions.size()) std::this_thread::yield();
        action();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  // Runs `action` until it throws InvalidArgument (or CapacityError, which is one).
  static void UntilRefused(const std::function<void()>& action) {
    try {
      while (true) action();
    } catch (const InvalidArgument&) {
    }
  }
};

TEST_P(Threads, AnswersAreThoseOfEachCallAlone) {
  const Prompts prompts = MakePrompts({90, 40, 17, 3});
  DecodeConfig config = Tidal();
  config.num_threads = 2;
  config.batch_invariant = true;  // on CUDA else to rounding
  const auto decoder = Make(config);
  std::vector<Ints> want;
  for (const Ints& prompt : prompts) want.push_back(One(*decoder, prompt, Greedy(12)));
  std::vector<std::function<void()>> calls;
  for (size_t i = 0; i < prompts.size(); ++i) {
    calls.push_back([&, i] {
      for (int round = 0; round < 3; ++round) {
        EXPECT_EQ(One(*decoder, prompts[i], Greedy(12)), want[i]);
      }
    });
  }
  calls.push_back([&] {
    for (int round = 0; round < 50; ++round) {
      EXPECT_LE(decoder->num_free_rows(), 4);
      EXPECT_GE(decoder->num_free_pages(), 0);
      try {
        decoder->Selection(0);
      } catch (const InvalidArgument&) {  // no call has begun
      }
    }
  });
  RunAll(calls);
  EXPECT_EQ(decoder->num_free_rows(), 4);
}

TEST_P(Threads, ShareOneGeneration) {
  const Ints prompt = MakePrompts({90})[0];
  const auto decoder = Make(Tidal());
  const Ints want = One(*decoder, prompt, Greedy(30));
  const auto generation = decoder->Start({prompt}, {Greedy(30)});
  std::atomic<size_t> num_events{0};
  auto read = [&] {
    while (!generation->done()) num_events += generation->Advance().size();
  };
  auto look = [&] {
    while (!generation->done()) {
      const PrefillProgress progress = generation->prefill_progress();
      EXPECT_LE(progress.tokens_done, progress.tokens_total);
      const Ints so_far = generation->results()[0].token_ids;
      EXPECT_TRUE(std::equal(so_far.begin(), so_far.end(), want.begin()));
    }
  };
  RunAll({read, read, look, look});
  EXPECT_EQ(generation->results()[0].token_ids, want);
  EXPECT_EQ(num_events, want.size());
}

TEST_P(Threads, EndAGenerationUnderOthersThatReadIt) {
  const Prompts prompts = MakePrompts({90, 20});
  const auto decoder = Make(Tidal());
  const int64_t free = decoder->num_free_pages();
  for (int round = 0; round < 8; ++round) {
    std::shared_ptr<Generation> generation = decoder->Start(prompts, {Greedy(400), Greedy(400)});
    auto read = [generation] {
      while (!generation->done()) generation->Advance();
    };
    auto end = [generation, round] {
      generation->Stop(0, FinishReason::kStop);
      if (round % 2 == 0) generation->Close();
      generation->Stop(1, FinishReason::kAbort);
    };
    RunAll({read, read, end});
    EXPECT_EQ(decoder->num_free_pages(), free);
    EXPECT_NE(generation->results()[0].finish_reason, FinishReason::kNone);
    EXPECT_NE(generation->results()[1].finish_reason, FinishReason::kNone);
  }
}

TEST_P(Threads, CloseASessionUnderOthersThatUseIt) {
  const Prompts prompts = MakePrompts({40, 9});
  const auto decoder = Make(Tidal());
  const int64_t free = decoder->num_free_pages();
  for (int round = 0; round < 6; ++round) {
    const auto session = decoder->StartSession();
    auto append = [&] {
      UntilRefused([&] {
        Read(*session, prompts[1]);
        session->Truncate(0);
      });
    };
    auto generate = [&] { UntilRefused([&] { Turn(*session, prompts[0], Greedy(5)); }); };
    auto fork = [&] { UntilRefused([&] { session->Fork()->token_ids(); }); };
    auto close = [&] {
      One(*decoder, prompts[0], Greedy(3));
      session->Close();
    };
    RunAll({append, generate, fork, close});
    EXPECT_TRUE(Throws<InvalidArgument>([&] { session->Append({1}); }, {"session", "closed"}));
    EXPECT_EQ(decoder->num_free_pages(), free);
  }
}

TEST_P(Threads, CloseASessionWhileItsTurnRuns) {
  const Ints prompt = MakePrompts({40})[0];
  const auto decoder = Make(Tidal());
  const int64_t free = decoder->num_free_pages();
  const Ints want = One(*decoder, prompt, Greedy(9));
  auto session = decoder->StartSession();
  const auto turn = session->Start(prompt, Greedy(9));
  turn->Advance();
  session->Close();
  session.reset();
  EXPECT_EQ(Finish(*turn)[0].token_ids, want);
  EXPECT_EQ(decoder->num_free_pages(), free);
}

TEST_P(Threads, CloseADecoderUnderOthersThatUseIt) {
  const Prompts prompts = MakePrompts({40, 9});
  for (int round = 0; round < 3; ++round) {
    std::shared_ptr<Decoder> decoder = Make(Tidal());
    auto session = decoder->StartSession();
    auto replay = is_cpu() ? decoder->StartReplay(prompts, 6) : nullptr;
    auto generate = [&] { UntilRefused([&] { One(*decoder, prompts[0], Greedy(20)); }); };
    auto converse = [&] {
      UntilRefused([&] {
        Turn(*session, prompts[1], Greedy(4));
        session->Truncate(0);
      });
    };
    auto measure = [&] {
      UntilRefused([&] {
        decoder->MeasureSteps({{30, 20}, 2, 1, PlanId::kDecoder});
        PrefillLogits(*decoder, prompts[0], 2);
        DecodeLogits(*decoder, prompts[0], 30);
      });
    };
    auto play = [&] {
      if (!replay) return;
      UntilRefused([&] {
        Finish(*replay->Read());
        Finish(*replay->Greedy(Tidal(), 5, {}));
        Finish(*replay->StepLogits(Tidal(), {{5, 6, 7}, {}}));
      });
    };
    auto close = [&] {
      One(*decoder, prompts[1], Greedy(10));
      decoder->Close();
    };
    RunAll({generate, generate, converse, measure, play, close});
    EXPECT_TRUE(Throws<InvalidArgument>([&] { decoder->StartSession(); }, {"decoder", "closed"}));
    // What it started outlives it.
    decoder.reset();
    EXPECT_TRUE(Throws<InvalidArgument>([&] { session->token_ids(); }, {"decoder", "closed"}));
  }
}

// Somebody measures, which no pass may interrupt.
TEST_P(Threads, WhoIsInNoPassWaitsForNone) {
  if (!is_cpu()) GTEST_SKIP() << "a measurement on a GPU may have ended by then";
  const Prompts prompts = MakePrompts({40, 9});
  const auto decoder = Make(Tidal());
  auto session = decoder->StartSession();
  Read(*session, prompts[0]);
  const auto waiting = decoder->Start(prompts, {Greedy(20), Greedy(20)});
  waiting->Stop(0, FinishReason::kAbort);
  std::atomic<bool> has_begun = false, has_ended = false;
  std::thread measures([&] {
    decoder->MeasureSteps({{30}, 1, 0, PlanId::kDecoder});
    has_begun = true;
    decoder->MeasureSteps({{400, 400, 400, 400}, 400, 0, PlanId::kDecoder});
    has_ended = true;
  });
  while (!has_ended && (!has_begun || decoder->num_free_pages() > 30)) std::this_thread::yield();
  const auto queued = decoder->Start(prompts, {Greedy(20), Greedy(20)});
  queued->Stop(0, FinishReason::kStop);
  EXPECT_EQ(queued->results()[0].finish_reason, FinishReason::kStop);
  queued->Close();
  waiting->Close();
  const auto turn = session->Start(prompts[1], Greedy(5));
  turn->Close();
  EXPECT_EQ(session->token_ids(), prompts[0]);
  session->Truncate(20);
  EXPECT_EQ(session->Fork()->num_cached(), 20);
  session->Close();
  EXPECT_FALSE(has_ended) << "somebody has waited";
  measures.join();
  EXPECT_EQ(decoder->num_free_pages(), decoder->config().num_pages);
}

// Who waits is woken during the next pass; who looks for himself knows before, and may be gone.
TEST_P(Threads, CallsAreGoneBeforeTheyAreWoken) {
  const Ints prompt = MakePrompts({9})[0];
  const auto decoder = Make(Tidal());
  const Ints want = One(*decoder, prompt, Greedy(1));
  const auto keeps_passes_coming = decoder->Start({prompt}, {Greedy(200)});
  for (int round = 0; round < 100; ++round) {
    const auto generation = decoder->Start({prompt}, {Greedy(1)});
    Ints tokens;
    while (!generation->done()) {
      for (const TokenEvent& event : generation->Advance(0.0)) tokens.push_back(event.token_id);
    }
    EXPECT_EQ(tokens, want);
    const auto left = decoder->Start({prompt, prompt}, {Greedy(5), Greedy(3)});
    left->Advance();
    left->Close();
  }
}

TEST_P(Threads, WhatADecoderStartedOutlivesIt) {
  const Ints prompt = MakePrompts({40})[0];
  auto decoder = Make(Tidal());
  const Ints want = One(*decoder, prompt, Greedy(9));
  auto session = decoder->StartSession();
  const auto turn = session->Start(prompt, Greedy(9));
  const auto generation = decoder->Start({prompt}, {Greedy(9)});
  decoder.reset();
  session.reset();
  EXPECT_EQ(Finish(*turn)[0].token_ids, want);
  EXPECT_EQ(Finish(*generation)[0].token_ids, want);
}

INSTANTIATE_TEST_SUITE_P(Backends, Threads, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
