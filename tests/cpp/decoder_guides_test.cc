// Guided calls, answered by a thread as the package answers them. `make test-tsan` runs these tests
// under ThreadSanitizer.
#include <gtest/gtest.h>

#include <map>
#include <thread>

#include "backend/op_args.h"
#include "session_test.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

// Answers for one decoder: the token of index i of guide g is one of those that leave (i * g) % 5
// when they are divided by 5.
class Answerer {
 public:
  explicit Answerer(const Decoder& decoder)
      : vocab_size_(decoder.model().vocab_size),
        desk_(decoder.guide_desk()),
        thread_([this] { Run(); }) {}
  ~Answerer() {
    desk_->Close();
    thread_.join();
  }
  Answerer(const Answerer&) = delete;
  Answerer& operator=(const Answerer&) = delete;

  static int64_t Rest(int64_t index, int64_t guide) { return index * guide % 5; }
  GuideDesk& desk() { return *desk_; }

 private:
  void Run() {
    while (!desk_->is_closed()) {
      std::vector<GuideAnswer> answers;
      for (const GuideQuestion& question : desk_->Wait()) {
        if (question.is_over) {
          EXPECT_EQ(lengths_.erase(question.request), 1u);
          continue;
        }
        int64_t& length = lengths_[question.request];
        EXPECT_LE(question.keep, length);
        length = question.keep + static_cast<int64_t>(question.tokens.size());
        answers.push_back({.request = question.request,
                           .number = question.number,
                           .allowed = MaskOf(Rest(length, question.guide))});
      }
      desk_->Answer(std::move(answers));
    }
    EXPECT_TRUE(desk_->Wait().empty());
  }

  std::vector<uint32_t> MaskOf(int64_t rest) const {
    std::vector<uint32_t> mask(static_cast<size_t>(NumMaskWords(vocab_size_)));
    for (int64_t id = rest; id < vocab_size_; id += 5) {
      mask[static_cast<size_t>(id / kMaskWordBits)] |= uint32_t{1} << (id % kMaskWordBits);
    }
    return mask;
  }

  int64_t vocab_size_;
  std::shared_ptr<GuideDesk> desk_;
  std::map<uint64_t, int64_t> lengths_;  // generated tokens that each request was asked about
  std::thread thread_;
};

class Guides : public SessionTest {
 protected:
  static SamplingParams Guided(int64_t guide, int64_t max_new_tokens = 12) {
    SamplingParams params = Drawn(max_new_tokens);
    params.guide = guide;
    return params;
  }

  static void ExpectGuided(const Ints& tokens, int64_t guide) {
    for (size_t i = 0; i < tokens.size() && guide > 0; ++i) {
      EXPECT_EQ(tokens[i] % 5, Answerer::Rest(static_cast<int64_t>(i), guide)) << i;
    }
  }
};

TEST_P(Guides, EveryRowKeepsToItsOwn) {
  const Prompts prompts = MakePrompts({90, 40, 17, 3});
  for (const DecodeConfig& config : {Tidal(), Verified(), Verified(Drafts::kNgram), Corrected(3)}) {
    const auto decoder = Make(config);
    std::vector<Ints> alone;
    const std::vector<SamplingParams> params = {Guided(1), Guided(3), Drawn(12), Guided(1)};
    Answerer answerer(*decoder);
    for (size_t i = 0; i < 4; ++i) {
      alone.push_back(One(*decoder, prompts[i], params[i]));
      EXPECT_EQ(alone[i].size(), 12u);
      ExpectGuided(alone[i], params[i].guide);
    }
    const auto together = Finish(*decoder->Start(prompts, params));
    for (size_t i = 0; i < 4; ++i) {
      ExpectGuided(together[i].token_ids, params[i].guide);
      // On CUDA to rounding only.
      if (is_cpu()) {
        EXPECT_EQ(together[i].token_ids, alone[i]);
      }
    }
    EXPECT_EQ(decoder->num_free_rows(), 4);
  }
}

TEST_P(Guides, VerifiedTokensAreDenseOnes) {
  const Ints prompt = MakePrompts({90})[0];
  DecodeConfig dense = Tidal();
  dense.select_layers.clear();
  const auto one = Make(dense);
  Answerer answers_one(*one);
  for (const Drafts drafts : {Drafts::kTidal, Drafts::kNgram, Drafts::kBoth}) {
    const auto other = Make(Verified(drafts));
    Answerer answers_other(*other);
    for (const int64_t guide : {1, 2, 4}) {
      const Ints want = One(*one, prompt, Guided(guide, 30));
      const Ints got = One(*other, prompt, Guided(guide, 30));
      ExpectGuided(got, guide);
      if (is_cpu()) {
        EXPECT_EQ(got, want);
      }
    }
  }
}

TEST_P(Guides, ASessionsTurnsAreGuided) {
  const auto decoder = Make(Tidal());
  Answerer answerer(*decoder);
  const auto session = decoder->StartSession();
  for (const int64_t guide : {1, 2, 3}) {
    ExpectGuided(Turn(*session, MakePrompts({9})[0], Guided(guide, 5)), guide);
  }
}

TEST_P(Guides, CallsThatNobodyAnswersWaitAndEnd) {
  const Ints prompt = MakePrompts({20})[0];
  const auto decoder = Make(Tidal());
  const auto waiting = decoder->Start({prompt}, {Guided(1)});
  EXPECT_EQ(One(*decoder, prompt, Greedy(5)).size(), 5u);
  EXPECT_TRUE(waiting->Advance(0.02).empty());
  EXPECT_FALSE(waiting->done());
  waiting->Close();
  EXPECT_EQ(waiting->results()[0].finish_reason, FinishReason::kAbort);
  const auto lost = decoder->Start({prompt}, {Guided(1)});
  decoder->Close();
  Throws<InvalidArgument>([&] { lost->Advance(); }, {"closed"});
  EXPECT_TRUE(decoder->guide_desk()->is_closed());
}

TEST_P(Guides, ADeskOutlivesItsDecoder) {
  auto decoder = Make(Tidal());
  const auto desk = decoder->guide_desk();
  Throws<InvalidArgument>([&] { desk->Answer({{.request = 1, .number = 1, .allowed = {1}}}); },
                          {"allowed: got 1 words"});
  desk->Answer({{.request = 1, .number = 1, .error = "no such request"}});
  std::thread waits([&] { EXPECT_TRUE(desk->Wait().empty()); });
  decoder.reset();
  waits.join();
  EXPECT_TRUE(desk->is_closed());
  desk->Answer({{.request = 1, .number = 1, .allowed = {1}}});
}

TEST_P(Guides, ManyCallersAreCancelledAndAnswered) {
  const auto decoder = Make(Tidal());
  Answerer answerer(*decoder);
  std::vector<std::thread> callers;
  for (int32_t caller = 1; caller <= 4; ++caller) {
    callers.emplace_back([&, caller] {
      for (int64_t round = 0; round < 6; ++round) {
        const auto call = decoder->Start({MakePrompts({10 + caller})[0]}, {Guided(caller, 20)});
        while (!call->done() && (round % 2 == 0 || call->results()[0].token_ids.size() < 5)) {
          call->Advance();
        }
        call->Close();
        ExpectGuided(call->results()[0].token_ids, caller);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(decoder->num_free_rows(), 4);
}

INSTANTIATE_TEST_SUITE_P(Backends, Guides, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
