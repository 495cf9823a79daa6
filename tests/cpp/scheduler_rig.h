// A scheduler with a model made of arithmetic: it draws tokens from hashes of those before, keeps
// in every page what a cache would, and checks that it reads what it once wrote. Time is a number.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "engine/scheduler.h"
#include "kv/page_pool.h"
#include "kv/prefix_cache.h"

namespace tidal::test {

using Tokens = std::vector<int32_t>;

inline constexpr PlanId kTidal{1};
inline constexpr PlanId kOther{2};
inline constexpr int32_t kVocabSize = 1000;
// The logits after this token hold a NaN, and its V spoils the tokens before it in the same pass.
inline constexpr int32_t kPoison = kVocabSize;

// What a token's K and V are: a hash of the tokens up to it, and whether they are those of dense
// reading.
struct CacheEntry {
  uint64_t hash = 0;
  bool is_clean = false;
};

// Milliseconds of passes.
struct FakeSpeed {
  double base = 3.0;
  double per_token = 20e-3;
  double per_pair = 0.87e-6;
  double step = 4.0;
};

class FakeModel {
 public:
  FakeModel(PagePool& pool, const FakeSpeed& speed, int32_t vocab_size = kVocabSize);

  // Runs a batch as a ModelRunner does, and fails the test where it asks for what cannot be.
  Drawn Run(const Batch& batch);
  double last_ms() const { return last_ms_; }
  void Copy(const std::vector<PageCopy>& copies);
  // Pages to host memory and back.
  void Save(const std::vector<PageCopy>& copies);
  void Restore(const std::vector<PageCopy>& copies);

  // Sequences of at most this length are decoded densely, by plan.
  std::map<PlanId, int64_t> dense_len;

  // What dense decoding of the tokens writes, without any scheduler. Logits are one number a token:
  // what is drawn from them.
  static Tokens Continue(Tokens tokens, int64_t count, float rotary = 1.0f,
                         int32_t vocab_size = kVocabSize);

 private:
  CacheEntry& At(const Sequence& sequence, int64_t position);
  void CheckCached(const Sequence& sequence);
  static int32_t Draw(const CacheEntry& entry, bool is_sparse, int32_t vocab_size);

  PagePool& pool_;
  FakeSpeed speed_;
  int32_t vocab_size_;
  double last_ms_ = 0.0;
  std::vector<CacheEntry> entries_;                  // [num_pages * page_size]
  std::map<int32_t, std::vector<CacheEntry>> host_;  // pages in host memory
};

struct RigOptions {
  int64_t num_pages = 64;
  int64_t page_size = 4;
  bool caches_prefixes = true;
  FakeSpeed speed{};
  int32_t vocab_size = kVocabSize;  // what is drawn is less; with few, texts repeat themselves
  SchedulerLimits limits{.max_rows = 4,
                         .max_pass_tokens = 64,
                         .max_check_tokens = 40,
                         .max_seq_len = 200,
                         .output_reserve = 8};
};

// A scheduler that soon has no pages left.
RigOptions Small(int64_t num_pages, int64_t output_reserve = 0);

class Rig {
 public:
  explicit Rig(const RigOptions& options = {});

  Sequence MakeSequence(Tokens tokens, float rotary = 1.0f);
  RequestId Submit(Tokens prompt, Request request = {});
  RequestId Submit(Tokens prompt, int64_t max_new_tokens);

  // One pass, which keeps to the limits; false if there was none to do. Its events are added to
  // `events`.
  bool Step();
  void StepUntilDone();

  // What the events have told of a request.
  Tokens Generated(RequestId id) const;
  FinishReason Reason(RequestId id) const { return scheduler.Get(id).finish_reason; }

  PagePool pool;
  PrefixCache prefixes;
  Scheduler scheduler;
  FakeModel model;
  double now_ms = 0.0;
  std::vector<RequestEvent> events;
  std::vector<std::string> passes;  // "plan 1: 17 +1 draw 1" each
  SchedulerLimits limits;

 private:
  void CheckLimits(const Batch& batch) const;

  uint64_t next_sequence_ = 1;
};

// `count` tokens that begin with `first` and are different for each first.
Tokens MakePrompt(int32_t first, int64_t count);

// A request that goes through kTidal beyond dense_len tokens.
Request TidalRequest(int64_t max_new_tokens, int64_t dense_len);

// A request for the logits after the last tokens, of which `forced` follow the prompt.
Request ScoredRequest(Tokens forced, int64_t num_logits);

}  // namespace tidal::test
