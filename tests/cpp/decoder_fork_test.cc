// Forks of sessions: each goes its own way from what they share.
#include <gtest/gtest.h>

#include "session_test.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

class Forks : public SessionTest {};

TEST_P(Forks, GoTheirOwnWays) {
  const Prompts prompts = MakePrompts({100, 30, 16, 1});
  for (const DecodeConfig& config :
       {Dense(), Tidal(), Corrected(6), Verified(), Verified(Drafts::kNgram)}) {
    const auto decoder = Make(config);
    // Sessions that were never forked, one for each way.
    std::vector<Ints> want;
    for (size_t way = 1; way < 4; ++way) {
      const auto alone = decoder->StartSession();
      Turn(*alone, prompts[0], Greedy(20));
      Turn(*alone, prompts[way], Greedy(25));
      Turn(*alone, {}, Greedy(25));
      want.push_back(alone->token_ids());
    }
    const auto parent = decoder->StartSession();
    Turn(*parent, prompts[0], Greedy(20));
    const auto child = parent->Fork(), grandchild = child->Fork();
    EXPECT_EQ(grandchild->token_ids(), parent->token_ids());
    EXPECT_EQ(grandchild->num_cached(), 119);
    const std::vector<Session*> sessions = {parent.get(), child.get(), grandchild.get()};
    std::vector<std::unique_ptr<Generation>> turns;
    for (size_t i = 0; i < 3; ++i) turns.push_back(sessions[i]->Start(prompts[i + 1], Greedy(25)));
    for (bool running = true; running;) {
      running = false;
      for (const auto& turn : turns) {
        turn->Advance();
        running = running || !turn->done();
      }
    }
    for (size_t i = 0; i < 3; ++i) {
      Turn(*sessions[i], {}, Greedy(25));
      if (is_cpu()) {  // on CUDA a batch row equals the row alone to rounding only
        EXPECT_EQ(sessions[i]->token_ids(), want[i]) << i;
      }
      EXPECT_EQ(sessions[i]->token_ids().size(), want[i].size());
    }
  }
}

// A correction rewrites tokens of earlier turns, in pages that a fork may look at.
TEST_P(Forks, DoNotSeeEachOthersCorrections) {
  const Ints prompt = MakePrompts({94})[0];
  const auto decoder = Make(Corrected(40));
  const auto parent = decoder->StartSession(), alone = decoder->StartSession();
  for (Session* session : {parent.get(), alone.get()}) Turn(*session, prompt, Greedy(36));
  const auto child = parent->Fork();
  const int64_t free = decoder->num_free_pages();
  Turn(*child, {}, Greedy(30));  // rewrites positions 94 to 133
  // It has pages of its own for 80 to 143, where its parent's 94 to 128 lie, and one behind them.
  EXPECT_EQ(decoder->num_free_pages(), free - 4 - 1);
  EXPECT_EQ(Turn(*parent, {}, Greedy(3)), Turn(*alone, {}, Greedy(3)));
  parent->Truncate(110);  // among what the child has rewritten
  alone->Truncate(110);
  EXPECT_EQ(Turn(*parent, {}, Greedy(30)), Turn(*alone, {}, Greedy(30)));
}

TEST_P(Forks, ShareTheirPagesUntilTheyWrite) {
  const auto decoder = Make(Dense());  // pages of 16
  const int64_t all = decoder->num_free_pages();
  auto parent = decoder->StartSession();
  Read(*parent, MakePrompts({100})[0]);
  EXPECT_EQ(decoder->num_free_pages(), all - 7);
  auto one = parent->Fork(), two = one->Fork();
  EXPECT_EQ(decoder->num_free_pages(), all - 7) << "a fork takes none";
  Turn(*one, MakePrompts({5})[0], Greedy(7));
  EXPECT_EQ(decoder->num_free_pages(), all - 8) << "tokens 96 to 111, its own";
  Turn(*two, {}, Greedy(13));
  EXPECT_EQ(decoder->num_free_pages(), all - 8 - 2) << "96 to 111, and one token more";
  Turn(*parent, {}, Greedy(1));
  EXPECT_EQ(decoder->num_free_pages(), all - 10) << "the last owner copies nothing";
  parent.reset();
  EXPECT_EQ(decoder->num_free_pages(), all - 9) << "six pages have owners still";
  two.reset();
  EXPECT_EQ(decoder->num_free_pages(), all - 7);
  EXPECT_EQ(Turn(*one, {}, Greedy(4)).size(), 4u);
  one.reset();
  EXPECT_EQ(decoder->num_free_pages(), all);
}

TEST_P(Forks, ReadOnFromWhereTheirParentIs) {
  const auto decoder = Make(Tidal());
  const auto parent = decoder->StartSession();
  const Ints prompt = MakePrompts({150})[0];
  Read(*parent, Ints(prompt.begin(), prompt.begin() + 70));
  const auto child = parent->Fork();
  const Ints rest(prompt.begin() + 70, prompt.end());
  Read(*child, rest);
  Read(*parent, rest);
  const Ints want = One(*decoder, prompt, Greedy(20));
  const Ints got = Turn(*child, {}, Greedy(20));
  EXPECT_EQ(Turn(*parent, {}, Greedy(20)), got);
  if (GetParam().dtype == DType::kFloat32) {
    EXPECT_EQ(got, want);
  }
}

TEST_P(Forks, MayGoBackToTheirBeginning) {
  const auto decoder = Make(Dense());
  const auto parent = decoder->StartSession();
  const Prompts prompts = MakePrompts({160, 160});
  Turn(*parent, prompts[0], Greedy(5));
  const auto child = parent->Fork();
  const Ints got = Finish(*child->Start(prompts[1], Greedy(5), 32))[0].token_ids;
  const Ints start(prompts[0].begin(), prompts[0].begin() + 32);
  if (GetParam().dtype == DType::kFloat32) {
    EXPECT_EQ(got, One(*decoder, Join({start, prompts[1]}), Greedy(5)));
  }
  const auto alone = decoder->StartSession();
  Turn(*alone, prompts[0], Greedy(5));
  EXPECT_EQ(Turn(*parent, {}, Greedy(20)), Turn(*alone, {}, Greedy(20)));
}

TEST_P(Forks, NeedAPageForEveryPageTheyWriteTo) {
  DecodeConfig config = Dense();
  config.num_pages = 32;
  const auto decoder = Make(config);
  const auto parent = decoder->StartSession();
  Turn(*parent, MakePrompts({490})[0], Greedy(6));  // 31 pages
  const auto child = parent->Fork(), other = parent->Fork();
  // The 31st is copied, and 497 tokens need a 32nd.
  EXPECT_TRUE(
      Throws<CapacityError>([&] { Turn(*child, {}, Greedy(1)); }, {"2 pages", "1 free of 32"}));
  child->Truncate(490);
  EXPECT_EQ(Turn(*child, {}, Greedy(6)).size(), 6u);
  EXPECT_TRUE(
      Throws<CapacityError>([&] { Turn(*other, {}, Greedy(1)); }, {"2 pages", "0 free of 32"}));
  EXPECT_EQ(other->token_ids(), parent->token_ids());
}

// What a turn forgets is shared with others, and it needs no pages in its place.
TEST_P(Forks, NeedNoPagesForWhatTheyForget) {
  DecodeConfig config = Dense();
  config.num_pages = 16;
  const auto decoder = Make(config);
  const auto parent = decoder->StartSession();
  Turn(*parent, MakePrompts({200})[0], Greedy(6));  // 13 pages
  const auto child = parent->Fork();
  EXPECT_EQ(child->MostTokens(32, true), 80) << "2 pages that are shared, 3 that are free";
  EXPECT_EQ(Finish(*child->Start({1}, Greedy(47), 32))[0].token_ids.size(), 47u);
  EXPECT_EQ(decoder->num_free_pages(), 0);
  EXPECT_EQ(parent->token_ids().size(), 206u);
}

INSTANTIATE_TEST_SUITE_P(Backends, Forks, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
