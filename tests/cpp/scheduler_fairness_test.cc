// Who waits how long: on a machine of known speed (Llama-3.1-8B on an H200, by and large), with
// prompts of up to 131,072 tokens.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "scheduler_rig.h"

namespace tidal::test {
namespace {

constexpr int64_t kLong = 131072;
constexpr double kMaxChunkMs = 60.0;
constexpr double kDecodeShare = 0.25;

// A machine that only tells times: its tokens are all the same.
class Server {
 public:
  explicit Server(int64_t max_rows = 64, int64_t num_pages = 40000)
      : pool_(num_pages, 64),
        scheduler(pool_, nullptr,
                  {.max_rows = max_rows,
                   .max_pass_tokens = 4096,
                   .max_check_tokens = 64,
                   .max_seq_len = 200000,
                   .max_chunk_ms = kMaxChunkMs,
                   .decode_share = kDecodeShare}) {}

  RequestId Submit(int64_t prompt_len, int64_t max_new_tokens, int32_t priority = 0) {
    Request request;
    request.sampling.max_new_tokens = max_new_tokens;
    request.priority = priority;
    Sequence sequence{.tokens = Tokens(static_cast<size_t>(prompt_len), 1),
                      .dense_len = prompt_len,
                      .pages = SequencePages(pool_, 0),
                      .inv_freq = {},
                      .sampling = {}};
    return scheduler.Add(std::move(request), std::move(sequence), now_ms);
  }

  bool Step() {
    const Batch batch = scheduler.Next(now_ms);
    if (batch.rows.empty()) return false;
    Drawn drawn;
    ChunkWork work;
    for (const BatchRow& row : batch.rows) {
      drawn.tokens.emplace_back(static_cast<size_t>(row.num_draws), 2);
      work.Add(row.num_tokens, row.sequence->cached);
    }
    last_is_step = batch.is_step();
    last_ms = last_is_step ? 4.0 : TimeOf(work);
    now_ms += last_ms;
    scheduler.Commit(batch, drawn, now_ms);
    return true;
  }

  static double TimeOf(const ChunkWork& work) {
    return 3.0 + 20e-3 * static_cast<double>(work.num_tokens) + 0.87e-6 * work.num_pairs;
  }
  // A whole prompt, in chunks of 4,096 tokens.
  static double TimeOf(int64_t prompt_len) {
    ChunkWork work;
    work.Add(prompt_len, 0);
    return TimeOf(work) + 3.0 * static_cast<double>(prompt_len / 4096);
  }

  double WaitOf(RequestId id) const {
    const RequestState& state = scheduler.Get(id);
    return state.first_token_ms - state.arrived_ms;
  }
  void StepUntilFirstToken(RequestId id) {
    while (scheduler.Get(id).first_token_ms == 0.0) ASSERT_TRUE(Step());
  }

 private:
  PagePool pool_;

 public:
  Scheduler scheduler;
  double now_ms = 1.0;
  double last_ms = 0.0;
  bool last_is_step = false;
};

// Lets the cost model see the machine.
void Warm(Server& server) {
  server.Submit(20000, 1);
  server.Submit(3000, 1);
  while (server.Step()) {
  }
}

// Whatever has been read of a long prompt when a short one arrives: it waits for the pass under
// way, perhaps for another one that belongs to whoever came first, and until (waited + work) / work
// is higher than the long one's. With the pauses that decoding gets this is at most
//   (2 chunks + work_short * (1 + waited_long / work_long)) / (1 - share).
TEST(SchedulerFairness, AShortPromptIsNotStuckBehindALongOne) {
  for (const double arrival : {0.0, 0.1, 0.5, 0.8}) {
    for (const bool anybody_decodes : {false, true}) {
      Server server;
      Warm(server);
      if (anybody_decodes) {
        server.StepUntilFirstToken(server.Submit(500, 100000));
      }
      const double start_ms = server.now_ms;
      const RequestId lengthy = server.Submit(kLong, 1);
      while (server.now_ms < start_ms + arrival * Server::TimeOf(kLong)) ASSERT_TRUE(server.Step());
      const double waited_ms = server.now_ms - start_ms;
      const RequestId brief = server.Submit(500, 1);
      server.StepUntilFirstToken(brief);
      const double long_ms = server.scheduler.Get(lengthy).first_token_ms;
      EXPECT_TRUE(long_ms == 0.0 || long_ms >= server.now_ms) << "the long one is not done before";
      const double chunk_ms = anybody_decodes ? kMaxChunkMs : 600.0;
      const double work_ms = Server::TimeOf(500);
      const double bound_ms =
          (2 * chunk_ms * 1.1 + 8.0) / (1 - kDecodeShare) +
          work_ms * (1 + 1.3 * waited_ms / Server::TimeOf(kLong)) / (1 - kDecodeShare);
      EXPECT_LT(server.WaitOf(brief), bound_ms) << "arrived at " << arrival;
    }
  }
}

// Eight streams decode while long prompts come: no gap is longer than a chunk and a step, decoding
// has its share of the time, and a long prompt is slowed down by that share only.
TEST(SchedulerFairness, DecodingKeepsItsShareBesideLongPrompts) {
  Server server;
  Warm(server);
  for (int i = 0; i < 8; ++i) server.Submit(500, 100000);
  while (server.scheduler.stats().num_decoding < 8) ASSERT_TRUE(server.Step());
  const RequestId lengthy = server.Submit(kLong, 1);
  double decode_ms = 0.0, chunk_ms = 0.0, gap_ms = 0.0, worst_gap_ms = 0.0;
  const double start_ms = server.now_ms;
  while (server.scheduler.Get(lengthy).first_token_ms == 0.0) {
    ASSERT_TRUE(server.Step());
    gap_ms += server.last_ms;
    (server.last_is_step ? decode_ms : chunk_ms) += server.last_ms;
    if (!server.last_is_step) continue;
    worst_gap_ms = std::max(worst_gap_ms, gap_ms);
    gap_ms = 0.0;
  }
  EXPECT_LT(worst_gap_ms, kMaxChunkMs * 1.15 + 4.0);
  const double share = decode_ms / (decode_ms + chunk_ms);
  EXPECT_GT(share, kDecodeShare - 0.01);
  EXPECT_LT(share, kDecodeShare + 0.05) << "and no more than that";
  EXPECT_LT(server.now_ms - start_ms, 1.5 * Server::TimeOf(kLong));
}

// 64 prompts of 500 tokens at once beside decoding: several a pass, the first of equals first.
TEST(SchedulerFairness, EqualsAreReadInOrderOfArrival) {
  Server server;
  Warm(server);
  std::vector<RequestId> ids;
  for (int i = 0; i < 64; ++i) ids.push_back(server.Submit(500, 200));
  const int64_t chunks_before = server.scheduler.stats().num_chunks;
  while (server.Step()) {
  }
  for (size_t i = 1; i < ids.size(); ++i) {
    EXPECT_LE(server.WaitOf(ids[i - 1]), server.WaitOf(ids[i])) << i;
  }
  EXPECT_LE(server.scheduler.stats().num_chunks - chunks_before, 24) << "they share passes";
}

TEST(SchedulerFairness, PriorityGoesBeforeWaiting) {
  Server server(1);
  Warm(server);
  const RequestId first = server.Submit(8000, 4);
  server.Step();
  const RequestId late = server.Submit(1000, 1, 5), normal = server.Submit(1000, 1),
                  urgent = server.Submit(4000, 1, -5);
  while (server.Step()) {
  }
  const auto end = [&](RequestId id) { return server.scheduler.Get(id).finished_ms; };
  EXPECT_LT(end(first), end(urgent)) << "there is one row";
  EXPECT_LT(end(urgent), end(normal));
  EXPECT_LT(end(normal), end(late));
}

// Short prompts come without end, as fast as the machine reads them: a long one is read all the
// same, by when it has waited about as many times its work as the short ones do theirs.
TEST(SchedulerFairness, ALongPromptIsReadThoughShortOnesNeverEnd) {
  Server server;
  Warm(server);
  const RequestId lengthy = server.Submit(kLong, 1);
  double next_ms = server.now_ms;
  std::vector<RequestId> brief;
  while (server.scheduler.Get(lengthy).first_token_ms == 0.0) {
    // 60 % of the machine.
    for (; next_ms <= server.now_ms; next_ms += Server::TimeOf(500) / 0.6) {
      brief.push_back(server.Submit(500, 1));
    }
    ASSERT_TRUE(server.Step());
    ASSERT_LT(server.now_ms, 60.0 * Server::TimeOf(kLong)) << "starved";
  }
  EXPECT_LT(server.WaitOf(lengthy), 6.0 * Server::TimeOf(kLong));
  std::vector<double> waits;
  for (const RequestId id : brief) {
    if (server.scheduler.Get(id).first_token_ms > 0.0) waits.push_back(server.WaitOf(id));
  }
  ASSERT_GT(waits.size(), 500u);
  std::sort(waits.begin(), waits.end());
  EXPECT_LT(waits[waits.size() * 95 / 100], 1200.0) << "p95, at chunks of 600 ms";
}

// A request that needs nearly all pages is overtaken by small ones a few times, then nobody goes
// before it.
TEST(SchedulerFairness, ALargeRequestIsOvertakenAFewTimesOnly) {
  Server server(8, 2200);  // 140,800 tokens
  Warm(server);
  server.Submit(40000, 2000);
  server.Step();
  const RequestId large = server.Submit(kLong, 1);
  double next_ms = server.now_ms;
  while (server.scheduler.Get(large).first_token_ms == 0.0) {
    for (; next_ms <= server.now_ms; next_ms += 100.0) server.Submit(4000, 300);
    ASSERT_TRUE(server.Step());
    ASSERT_LT(server.now_ms, 200000.0) << "starved";
  }
  EXPECT_LE(server.scheduler.Get(large).num_overtaken, 8);
}

// Hundreds of requests of all lengths at random times: everybody ends, no prompt waits longer than
// a few times what the machine had to do before it, and no token longer than a chunk and its turn.
TEST(SchedulerFairness, EverybodyEnds) {
  for (uint32_t seed = 0; seed < 5; ++seed) {
    std::mt19937 random(seed);
    Server server(8, 1500);
    Warm(server);
    std::vector<RequestId> ids;
    double next_ms = server.now_ms, gap_ms = 0.0, worst_gap_ms = 0.0;
    while (ids.size() < 300 || server.scheduler.HasWork()) {
      while (ids.size() < 300 && next_ms <= server.now_ms) {
        const double exponent = 1.0 + 3.5 * (static_cast<double>(random() % 1000) / 1000.0);
        ids.push_back(server.Submit(static_cast<int64_t>(std::pow(10.0, exponent)),
                                    1 + static_cast<int64_t>(random() % 400)));
        next_ms += static_cast<double>(random() % 1600);
      }
      const bool anybody_decodes = server.scheduler.stats().num_decoding > 0;
      if (!server.Step()) server.now_ms = std::max(server.now_ms, next_ms);
      gap_ms = server.last_is_step || !anybody_decodes ? 0.0 : gap_ms + server.last_ms;
      worst_gap_ms = std::max(worst_gap_ms, gap_ms);
    }
    EXPECT_LT(worst_gap_ms, kMaxChunkMs * 1.25) << "seed " << seed;
    double worst = 0.0;
    for (const RequestId id : ids) {
      EXPECT_EQ(server.scheduler.Get(id).finish_reason, FinishReason::kLength);
      const int64_t num_tokens = server.scheduler.Get(id).num_tokens();
      worst = std::max(worst, server.WaitOf(id) / (1000.0 + Server::TimeOf(num_tokens)));
    }
    EXPECT_LT(worst, 30.0) << "seed " << seed;
  }
}

}  // namespace
}  // namespace tidal::test
