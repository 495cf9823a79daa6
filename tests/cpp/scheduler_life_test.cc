// Requests and sessions of every kind that come, end, fail and are paused at random: everything
// comes back whatever happens.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "scheduler_rig.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

// A random life of requests and sessions of every kind.
class RandomLife {
 public:
  explicit RandomLife(uint32_t seed) : random_(seed), rig_(Options()) {}

  void Run(int num_requests) {
    for (int submitted = 0; submitted < num_requests || rig_.scheduler.HasWork();) {
      if (submitted < num_requests && Chance(3)) {
        ++submitted;
        Chance(5) ? Talk() : Ask();
      }
      if (!ids_.empty() && Chance(4)) EndSome();
      if (!sessions_.empty() && Chance(30)) sessions_.pop_back();
      if (!ids_.empty()) {
        const RequestState& heard = rig_.scheduler.Get(ids_[random_() % ids_.size()]);
        rig_.scheduler.MarkHeard(heard.id, heard.num_new());
      }
      Chance(200) ? FailOne() : static_cast<void>(rig_.Step());
      rig_.scheduler.CheckIntegrity();
      if (::testing::Test::HasFatalFailure()) return;
    }
  }

  // Everything has ended and come back.
  void CheckEnd(DecoderStats& total, int64_t& num_evictions) {
    for (const RequestId id : ids_) {
      EXPECT_EQ(rig_.scheduler.Get(id).status, RequestStatus::kFinished);
    }
    sessions_.clear();
    while (!ids_.empty()) {
      rig_.scheduler.Remove(ids_.back());
      ids_.pop_back();
    }
    const DecoderStats stats = rig_.scheduler.stats();
    EXPECT_EQ(stats.num_reading + stats.num_decoding + stats.num_waiting + stats.num_paused, 0);
    EXPECT_EQ(stats.pages_held, 0);
    EXPECT_EQ(rig_.pool.num_free(), rig_.pool.num_pages());
    EXPECT_EQ(stats.pages_cached, rig_.prefixes.stats().pages);
    total.num_pauses += stats.num_pauses;
    total.num_finished += stats.num_finished;
    total.cached_tokens += stats.cached_tokens;
    total.generated_tokens += stats.generated_tokens;
    num_evictions += rig_.prefixes.stats().evictions;
  }

 private:
  bool Chance(uint32_t n) { return random_() % n == 0; }
  int64_t Below(uint32_t n) { return static_cast<int64_t>(random_() % n); }

  RigOptions Options() {
    RigOptions options = Small(24 + Below(40), Below(12));
    options.caches_prefixes = !Chance(5);
    options.limits.max_rows = 1 + Below(6);
    options.limits.max_pass_tokens = 4 + Below(40);
    options.limits.max_check_tokens = 2 + Below(20);
    options.limits.max_chunk_ms = 3.1 + static_cast<double>(Below(10)) * 0.1;
    options.limits.max_seq_len = 90;
    options.limits.max_host_pages = Chance(2) ? 0 : Below(30);
    if (Chance(2)) options.vocab_size = 3;
    return options;
  }

  // Often the beginning of a prompt that was there before.
  Tokens RandomPrompt() {
    Tokens prompt = MakePrompt(static_cast<int32_t>(Below(5)), 1 + Below(50));
    if (Chance(3)) prompt.back() = static_cast<int32_t>(Below(kVocabSize));
    if (Chance(40)) prompt.back() = kPoison;
    return prompt;
  }

  Request RandomRequest() {
    Request request = TidalRequest(1 + Below(30), Chance(2) ? 8 : 30);
    // A plan has one length.
    if (request.decoding.dense_len == 8) request.decoding.plan = kOther;
    rig_.model.dense_len[request.decoding.plan] = request.decoding.dense_len;
    if (Chance(3)) request.decoding.plan = PlanId::kDense;
    request.decoding.verifies = Chance(2);
    request.decoding.drafts = static_cast<Drafts>(Below(3));
    request.decoding.draft_tokens = Below(9);
    request.decoding.correction_interval = Below(6);
    request.priority = static_cast<int32_t>(Below(2));
    if (Chance(4)) request.max_unread = 1 + Below(6);
    request.cache_salt = Chance(4) ? "other" : "";
    return request;
  }

  // Makes of a request one of given tokens: of a prompt, or what a replay has.
  void Score(Request& request, int64_t num_given) {
    Tokens forced = MakePrompt(1, request.sampling.max_new_tokens);
    const int64_t num_logits = 1 + Below(static_cast<uint32_t>(num_given) + 1) % num_given;
    request.scoring = ScoredRequest(std::move(forced), num_logits).scoring;
    request.owner = SequenceOwner::kReplay;
    request.decoding.verifies = false;
    request.max_unread = 0;
  }

  void Ask() {
    const Tokens prompt = RandomPrompt();
    Request request = RandomRequest();
    if (Chance(5)) Score(request, static_cast<int64_t>(prompt.size()));
    const auto need = static_cast<int64_t>(prompt.size()) + request.sampling.max_new_tokens;
    if (rig_.pool.PagesFor(need) > rig_.pool.num_pages()) {
      EXPECT_THROW(rig_.Submit(prompt, request), CapacityError);
    } else {
      ids_.push_back(rig_.Submit(prompt, request));
    }
  }

  // A turn of a session: a new one, one that goes on from where it was or from earlier, or a fork.
  void Talk() {
    auto sequence = std::make_unique<Sequence>(rig_.MakeSequence({}));
    if (!sessions_.empty() && !Chance(4)) {
      std::swap(sessions_[random_() % sessions_.size()], sessions_.back());
      if (Chance(4)) {
        Sequence& other = *sessions_.back();
        sequence = std::make_unique<Sequence>(Sequence{.tokens = other.tokens,
                                                       .cached = other.cached,
                                                       .num_sparse = other.num_sparse,
                                                       .clean_len = other.clean_len,
                                                       .pages = other.pages.Share(other.cached),
                                                       .inv_freq = other.inv_freq,
                                                       .sampling = {}});
      } else {
        sequence = std::move(sessions_.back());
        sessions_.pop_back();
      }
    }
    const int64_t keep = Below(static_cast<uint32_t>(sequence->tokens.size()) + 1);
    Tokens added = RandomPrompt();
    if (keep > 0 && Chance(3)) added.clear();
    const int64_t most = added.empty() ? keep - 1 : keep;
    sequence->tokens.resize(static_cast<size_t>(keep));
    sequence->tokens.insert(sequence->tokens.end(), added.begin(), added.end());
    const auto length = static_cast<int64_t>(sequence->tokens.size());
    sequence->dense_len = added.empty() ? std::min(sequence->dense_len, length) : length;
    const int64_t dropped = std::max<int64_t>(sequence->cached - most, 0);
    sequence->cached -= dropped;
    sequence->num_sparse = added.empty() ? std::max<int64_t>(sequence->num_sparse - dropped, 0) : 0;
    sequence->clean_len = std::min(sequence->clean_len, sequence->cached);

    Request request = RandomRequest();
    request.owner = Chance(4) ? SequenceOwner::kReplay : SequenceOwner::kSession;
    request.max_unread = 0;
    if (Chance(4)) Score(request, length);
    if (request.owner == SequenceOwner::kReplay) {  // whose pages nobody else reads
      sequence->pages.Release();
      sequence->cached = sequence->num_sparse = sequence->clean_len = 0;
    }
    // What was decoded sparsely a session corrects before its turn.
    if (sequence->num_sparse > 0) request.decoding.verifies = false;
    if (sequence->cached + 1 < length && !request.scoring && Chance(5))
      request.sampling.max_new_tokens = 0;
    const auto need =
        static_cast<int64_t>(sequence->tokens.size()) + request.sampling.max_new_tokens;
    if (need > 90 || rig_.pool.PagesFor(need) > rig_.pool.num_pages()) return;
    ids_.push_back(rig_.scheduler.Add(request, std::move(*sequence), rig_.now_ms));
  }

  void EndSome() {
    std::swap(ids_[random_() % ids_.size()], ids_.back());
    const RequestId id = ids_.back();
    if (rig_.scheduler.Get(id).status == RequestStatus::kFinished) {
      RequestState ended = rig_.scheduler.Remove(id);
      ids_.pop_back();
      if (!ended.keeps_pages() || ended.failure != RequestFailure::kNone) return;
      sessions_.push_back(std::make_unique<Sequence>(std::move(ended.sequence)));
    } else if (Chance(3)) {
      rig_.scheduler.Cancel(id, Chance(2) ? FinishReason::kAbort : FinishReason::kStop,
                            rig_.now_ms);
    }
  }

  void FailOne() {
    const Batch batch = rig_.scheduler.Next(rig_.now_ms);
    if (batch.rows.empty() && batch.saves.empty()) return;
    if (Chance(2) && !ids_.empty()) EndSome();  // while the pass runs
    rig_.scheduler.Fail(rig_.now_ms);
  }

  std::mt19937 random_;
  Rig rig_;
  std::vector<RequestId> ids_;
  std::vector<std::unique_ptr<Sequence>> sessions_;
};

// 100,000 requests of every kind in 1,000 schedulers of every size.
TEST(SchedulerLife, AllPagesAndRowsComeBackWhateverHappens) {
  DecoderStats total;
  int64_t num_evictions = 0;
  for (uint32_t seed = 0; seed < 1000; ++seed) {
    RandomLife life(seed);
    life.Run(120);
    life.CheckEnd(total, num_evictions);
    ASSERT_FALSE(::testing::Test::HasFailure()) << "seed " << seed;
  }
  EXPECT_GT(total.num_finished, 100000);
  EXPECT_GT(total.num_pauses, 5000);
  EXPECT_GT(total.cached_tokens, 100000);
  EXPECT_GT(num_evictions, 100000);
}

}  // namespace
}  // namespace tidal::test
