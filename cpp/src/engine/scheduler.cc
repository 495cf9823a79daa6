// Scheduler: requests come, passes are committed, requests end. What comes next is in
// scheduler_plan.cc, rows and pages in scheduler_room.cc.
#include "engine/scheduler.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/checked.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// The oldest prompt's share of the time of chunks. While more is asked than the machine can do,
// short prompts grow urgent faster than a long one does, and without a share it would wait without
// end.
constexpr double kOldestShare = 0.25;

}  // namespace

Scheduler::Scheduler(PagePool& pool, PrefixCache* prefixes, const SchedulerLimits& limits)
    : pool_(pool),
      prefixes_(prefixes),
      limits_(limits),
      host_pool_(limits.max_host_pages, pool.page_size()) {
  TIDAL_CHECK(limits.max_rows >= 1 && limits.max_pass_tokens >= 1 && limits.max_check_tokens >= 1 &&
                  limits.max_seq_len >= 1,
              InvalidArgument, "scheduler: got ", limits.max_rows, " rows, passes of ",
              limits.max_pass_tokens, " tokens, checks of ", limits.max_check_tokens,
              " tokens, and sequences of ", limits.max_seq_len, " tokens, expected all >= 1");
  TIDAL_CHECK(limits.max_chunk_ms > 0.0, InvalidArgument, "max_chunk_ms: got ", limits.max_chunk_ms,
              ", expected > 0");
  TIDAL_CHECK(limits.decode_share >= 0.0 && limits.decode_share < 1.0, InvalidArgument,
              "decode_share: got ", limits.decode_share, ", expected 0 <= share < 1");
  TIDAL_CHECK(limits.output_reserve >= 0 && limits.max_overtakes >= 0, InvalidArgument,
              "scheduler: got output_reserve ", limits.output_reserve, " and max_overtakes ",
              limits.max_overtakes, ", expected both >= 0");
  running_.reserve(static_cast<size_t>(limits.max_rows));
  for (int64_t row = limits.max_rows - 1; row >= 0; --row) {
    free_rows_.push_back(static_cast<int32_t>(row));
  }
}

void Scheduler::CheckCapacity(const std::string& what, int64_t num_tokens,
                              int64_t max_new_tokens) const {
  int64_t need = Sum({num_tokens, max_new_tokens});
  std::string asked = Concat(what, ": ", num_tokens, " tokens");
  if (max_new_tokens > 0) asked += Concat(" + max_new_tokens ", max_new_tokens);
  TIDAL_CHECK(need <= limits_.max_seq_len, CapacityError, asked, " need ", need,
              " positions, have max_seq_len ", limits_.max_seq_len,
              "; raise max_seq_len, or shorten the prompt or max_new_tokens");
  int64_t pages = pool_.PagesFor(need);
  TIDAL_CHECK(pages <= pool_.num_pages(), CapacityError, asked, " need ", pages, " pages of ",
              pool_.page_size(), " tokens, have ", pool_.num_pages(),
              " in all; raise num_pages or max_batch_size, or shorten the prompt or "
              "max_new_tokens");
}

void Scheduler::CheckScoring(const Request& request, const Sequence& sequence) const {
  const Scoring& scoring = *request.scoring;
  auto num_forced = static_cast<int64_t>(scoring.forced.size());
  TIDAL_CHECK(num_forced == request.sampling.max_new_tokens, InvalidArgument, "forced: got ",
              num_forced, " tokens, expected max_new_tokens ", request.sampling.max_new_tokens);
  auto most = static_cast<int64_t>(sequence.tokens.size()) + num_forced;
  TIDAL_CHECK(scoring.num_logits >= 1 && scoring.num_logits <= most, InvalidArgument,
              "num_logits: got ", scoring.num_logits, ", expected 1 to ", most);
  auto num_values = scoring.logits ? static_cast<int64_t>(scoring.logits->size()) : 0;
  TIDAL_CHECK(num_values > 0 && num_values % scoring.num_logits == 0, InvalidArgument,
              "logits: got room for ", num_values, " values, expected some for each of ",
              scoring.num_logits);
  TIDAL_CHECK(request.owner == SequenceOwner::kReplay && !request.decoding.verifies,
              InvalidArgument, "request: it is scored, expected a replay's that does not verify");
}

void Scheduler::CheckFits(const Request& request, const Sequence& sequence) const {
  auto num_tokens = static_cast<int64_t>(sequence.tokens.size());
  int64_t max_new = request.sampling.max_new_tokens;
  TIDAL_CHECK(num_tokens >= 1, InvalidArgument, "request: got no tokens, expected at least one");
  TIDAL_CHECK(max_new >= 0, InvalidArgument, "max_new_tokens: got ", max_new, ", expected >= 0");
  TIDAL_CHECK(max_new > 0 || request.scoring || sequence.cached + 1 < num_tokens, InvalidArgument,
              "max_new_tokens: got 0 for a request without a token to read, expected >= 1");
  if (request.scoring) CheckScoring(request, sequence);
  const bool keeps_pages = request.owner != SequenceOwner::kRequest;
  TIDAL_CHECK(request.max_unread >= 0 && (request.max_unread == 0 || !keeps_pages), InvalidArgument,
              "max_unread: got ", request.max_unread, ", expected >= 0, and 0 for a session");
  TIDAL_CHECK(sequence.cached < num_tokens, InvalidArgument, "request: all of its ", num_tokens,
              " tokens are cached, expected one at least that is not");
  TIDAL_CHECK(sequence.dense_len <= num_tokens, InvalidArgument, "request: got dense_len ",
              sequence.dense_len, ", expected at most its ", num_tokens, " tokens");
  TIDAL_CHECK(sequence.cached == 0 || keeps_pages, InvalidArgument, "request: got ",
              sequence.cached,
              " cached tokens, expected none in a sequence that does not keep its pages");
  CheckCapacity("request", num_tokens, max_new);
}

RequestId Scheduler::Add(Request request, Sequence sequence, double now_ms) {
  CheckFits(request, sequence);
  const bool keeps_pages = request.owner != SequenceOwner::kRequest;
  if (!keeps_pages) sequence.pages.Release();  // they are taken as tokens come
  now_ms_ = now_ms;
  RequestId id = next_id_;
  // What may throw comes before any change.
  ReserveWaiting();
  if (guided_.size() == guided_.capacity()) guided_.reserve(2 * guided_.size() + 1);
  auto place = requests_.emplace_hint(
      requests_.end(), id, RequestState(id, std::move(request), std::move(sequence), now_ms));
  RequestState& added = place->second;
  if (prefixes_ != nullptr && added.reads_prefixes()) {
    added.known_tokens = KnownTokens(added);
    Follow(added);
  }
  waiting_.push_back(&added);
  if (added.guidance) guided_.push_back(&added);
  may_admit_ = true;
  return next_id_++;
}

// Makes room for one more that waits, so that adding it cannot throw.
void Scheduler::ReserveWaiting() {
  if (waiting_.size() == waiting_.capacity()) waiting_.reserve(2 * waiting_.size() + 1);
}

// Returns how many of its first tokens the request would find in the prefix cache.
int64_t Scheduler::KnownTokens(const RequestState& request) const {
  if (prefixes_ == nullptr) return 0;
  return prefixes_->Peek(request.sequence.tokens, request.salt).num_pages * pool_.page_size();
}

// Looks for a prompt that is to be read and begins as this one does, for at least half of what this
// one would read.
void Scheduler::Follow(RequestState& request) const {
  const std::vector<int32_t>& tokens = request.sequence.tokens;
  int64_t least = (request.num_tokens() + request.known_tokens) / 2;
  for (const auto& [id, other] : requests_) {
    if (request.followed_tokens + pool_.page_size() >= request.num_tokens()) return;
    bool is_read = other.status == RequestStatus::kReading;
    bool comes_first = other.status == RequestStatus::kQueued && !other.follows &&
                       other.num_tokens() <= request.num_tokens();
    if (id == request.id || !(is_read || comes_first) || other.keeps_pages()) continue;
    if (other.request.priority > request.request.priority || other.salt != request.salt) continue;
    const std::vector<int32_t>& theirs = other.sequence.tokens;
    int64_t length = std::mismatch(tokens.begin(), tokens.end() - 1, theirs.begin(),
                                   theirs.begin() + other.read_to())
                         .first -
                     tokens.begin();
    length -= length % pool_.page_size();
    if (length < std::max(least, request.followed_tokens + 1)) continue;
    request.follows = id;
    request.followed_tokens = length;
  }
}

std::vector<RequestId> Scheduler::InFlight() const {
  std::vector<RequestId> ids;
  ids.reserve(in_flight_.size());
  for (const RowInFlight& row : in_flight_) ids.push_back(row.request->id);
  return ids;
}

void Scheduler::Commit(const Batch& batch, const Drawn& drawn, double now_ms) noexcept {
  now_ms_ = now_ms;
  double elapsed_ms = now_ms - started_ms_;
  RowKind kind = in_flight_.empty() ? RowKind::kStep : in_flight_.front().kind;
  if (kind == RowKind::kRead || kind == RowKind::kCorrect) cost_.Observe(work_, elapsed_ms);
  if (kind == RowKind::kRead) {
    ShareOut(elapsed_ms);
  } else {
    owed_ms_ -= elapsed_ms;
  }
  Count(kind, elapsed_ms);
  for (size_t i = 0; i < in_flight_.size(); ++i) {
    bool has_draws = i < batch.rows.size() && i < drawn.tokens.size();
    std::span<const int32_t> draws;
    if (has_draws) draws = drawn.tokens[i];
    CommitRow(static_cast<int64_t>(i), draws);
  }
  EndPass();
}

// Counts the pass in flight, which took so long.
void Scheduler::Count(RowKind kind, double elapsed_ms) noexcept {
  if (in_flight_.empty()) return;
  ended_ms_ = now_ms_;
  double seconds = elapsed_ms * 1e-3;
  bool is_sparse = false;
  for (const RowInFlight& row : in_flight_) {
    counts_.pass_tokens += row.num_tokens;
    is_sparse = is_sparse || row.is_sparse;
  }
  if (kind == RowKind::kStep || kind == RowKind::kDraft) {
    ++counts_.num_steps;
    counts_.step_s += seconds;
    if (is_sparse) return;
    ++counts_.num_dense_steps;
    counts_.dense_step_s += seconds;
  } else {
    ++counts_.num_chunks;
    counts_.chunk_s += seconds;
    if (kind != RowKind::kCheck) return;
    ++counts_.num_checks;
    counts_.check_s += seconds;
  }
}

// After a chunk that took so long: what is owed to those who decode, and to whoever came first.
void Scheduler::ShareOut(double elapsed_ms) noexcept {
  owed_ms_ = 0.0;
  if (AnyDecoding() && limits_.decode_share > 0.0) {
    double share_ms = elapsed_ms * limits_.decode_share / (1.0 - limits_.decode_share);
    owed_ms_ = std::max(share_ms, std::numeric_limits<double>::min());  // one turn at least
  }
  if (in_flight_.front().request == oldest_) {
    oldest_owed_ms_ = std::max(oldest_owed_ms_ - elapsed_ms, 0.0);
  } else {
    oldest_owed_ms_ += elapsed_ms * kOldestShare / (1.0 - kOldestShare);
  }
}

// Takes in what a row's tokens are now, and what was drawn after them.
void Scheduler::CommitRow(int64_t index, std::span<const int32_t> draws) noexcept {
  const RowInFlight& row = in_flight_[static_cast<size_t>(index)];
  RequestState& request = *row.request;
  Sequence& sequence = request.sequence;
  static constexpr int32_t kUnusable = -1;
  if (draws.empty()) draws = {&kUnusable, 1};
  int64_t end = row.begin + row.num_tokens;
  sequence.num_sparse = row.num_sparse;
  switch (row.kind) {
    case RowKind::kDraft:
      // Until it is checked. Without a draft no token follows the one that was read.
      sequence.cached = draws.front() >= 0 ? end : row.begin;
      return request.AddDraft(draws.front());
    case RowKind::kCheck:
      // The drafts leave; those that were kept come back as draws.
      draws = request.Check(draws);
      request.MarkCached(row.begin, row.begin + static_cast<int64_t>(draws.size()),
                         limits_.decodes_cleanly);
      return AcceptDraws(index, draws);
    case RowKind::kStep:
      if (row.is_sparse) ++sequence.num_sparse;
      request.MarkCached(row.begin, end, !row.is_sparse && limits_.decodes_cleanly);
      if (request.request.decoding.verifies) ++request.verification.dense_passes;
      return AcceptDraws(index, draws);
    case RowKind::kCorrect:
      request.MarkCached(row.begin, end, limits_.decodes_cleanly);
      return Publish(request);
    case RowKind::kRead:
      counts_.read_tokens += row.num_tokens;
      request.MarkCached(row.begin, end, true);
      request.num_scored = std::max(request.num_scored, end);
      Publish(request);
      may_admit_ = true;  // others may need less room now
      if (request.num_unread() > 0) return;
      if (!request.goes_on()) {
        request.ends_as = FinishReason::kLength;
        return;
      }
      request.status = RequestStatus::kDecoding;
      // Who reads again has drawn its next token before.
      if (end == request.num_tokens()) AcceptDraws(index, draws);
  }
}

// Applies the stop rules to what was drawn, token by token.
void Scheduler::AcceptDraws(int64_t index, std::span<const int32_t> draws) noexcept {
  RequestState& request = *in_flight_[static_cast<size_t>(index)].request;
  Sequence& sequence = request.sequence;
  for (size_t i = 0; i < draws.size(); ++i) {
    int64_t num_before = request.num_new();
    bool has_ended = request.Accept(draws[i]);
    if (request.num_new() > num_before && !request.request.scoring) {
      if (num_before == 0) request.first_token_ms = now_ms_;
      ++counts_.generated_tokens;
      if (request.request.owner != SequenceOwner::kReplay) {
        events_.push_back({.id = request.id,
                           .token_id = sequence.tokens.back(),
                           .finish_reason = request.finish_reason,
                           .row = index,
                           .draw = static_cast<int64_t>(i)});
      }
    }
    if (has_ended) break;
  }
  if (request.AwaitsReader()) may_admit_ = true;
  request.num_scored = std::max(request.num_scored, request.num_tokens() - 1);
  if (request.request.scoring) return;  // its last token is cached
  // A draft that ended the request was cached; the newest token never is.
  sequence.cached = std::min(sequence.cached, request.num_tokens() - 1);
  sequence.clean_len = std::min(sequence.clean_len, sequence.cached);
}

// Ends what the pass has ended, or what was cancelled meanwhile.
void Scheduler::EndPass() noexcept {
  auto end = [this](RequestState& request) {
    request.is_in_flight = false;
    if (request.status != RequestStatus::kPaused) ForgetSaved(request);  // it has been restored
    FinishReason reason = request.finish_reason;
    if (reason == FinishReason::kNone) reason = request.ends_as;
    bool has_ended = request.status == RequestStatus::kFinished;
    if (reason != FinishReason::kNone && !has_ended) Finish(request, reason);
  };
  for (const RowInFlight& row : in_flight_) end(*row.request);
  for (const Copying& copying : copying_) end(*copying.request);
  in_flight_.clear();
  copying_.clear();
  saving_.clear();
  num_events_in_flight_ = 0;
  work_ = {};
}

void Scheduler::Fail(double now_ms) noexcept {
  now_ms_ = now_ms;
  for (const RowInFlight& row : in_flight_) {
    row.request->finish_reason = FinishReason::kError;
    row.request->failure = RequestFailure::kPassFailed;
    // Whatever the pass has written behind them is of no use.
    Sequence& sequence = row.request->sequence;
    sequence.cached = row.begin;
    sequence.num_sparse = row.num_sparse;
    sequence.clean_len = std::min(sequence.clean_len, row.begin);
  }
  for (const Copying& copying : copying_) {
    copying.request->finish_reason = FinishReason::kError;
    copying.request->failure = RequestFailure::kPassFailed;
    copying.request->sequence.Rewind(copying.first);
  }
  for (RequestId id : saving_) {
    auto paused = requests_.find(id);
    if (paused != requests_.end()) ForgetSaved(paused->second);
  }
  saves_.clear();
  restores_.clear();
  copies_.clear();
  EndPass();
}

// Takes the request out of whatever it is in. Its pages come back, what it computed cleanly stays
// known.
void Scheduler::Finish(RequestState& request, FinishReason reason) noexcept {
  // The event of its last token has told how it ended.
  bool is_told = request.finish_reason != FinishReason::kNone &&
                 request.failure == RequestFailure::kNone &&
                 request.request.owner != SequenceOwner::kReplay;
  request.DropDrafts();
  switch (request.failure) {
    case RequestFailure::kNone:
    case RequestFailure::kGuide:
      Publish(request);
      break;
    case RequestFailure::kUnusableLogits:  // what it has made known may be as unusable
      if (prefixes_ != nullptr) prefixes_->Forget(request.sequence.tokens, request.salt);
      break;
    case RequestFailure::kPassFailed:
    case RequestFailure::kNoRoom:
      break;
  }
  if (request.is_running()) LeaveRow(request);
  std::erase(waiting_, &request);
  std::erase(guided_, &request);
  if (!request.keeps_pages()) ReleasePages(request);
  ForgetSaved(request);
  request.status = RequestStatus::kFinished;
  request.finish_reason = reason;
  request.finished_ms = now_ms_;
  ++counts_.num_finished;
  if (!is_told) events_.push_back({.id = request.id, .finish_reason = reason});
}

void Scheduler::Cancel(RequestId id, FinishReason reason, double now_ms) {
  TIDAL_CHECK(reason == FinishReason::kStop || reason == FinishReason::kAbort, InvalidArgument,
              "request ", id, ": got finish reason ", static_cast<int32_t>(reason),
              ", expected kStop or kAbort");
  now_ms_ = now_ms;
  RequestState& request = Find(id);
  if (request.status == RequestStatus::kFinished) return;
  if (request.is_in_flight) {
    request.ends_as = reason;
    return;
  }
  ReserveEvents(1 + num_events_in_flight_);
  Finish(request, reason);
}

bool Scheduler::MarkHeard(RequestId id, int64_t num_tokens) {
  RequestState& request = Find(id);
  bool waited = request.AwaitsReader() || request.OwesCorrection();
  request.num_heard = num_tokens;
  return waited;
}

// Makes room for `count` more, and twice as much as before if there is not enough.
void Scheduler::ReserveEvents(size_t count) {
  size_t need = events_.size() + count;
  if (need > events_.capacity()) events_.reserve(std::max(need, 2 * events_.capacity()));
}

std::vector<RequestEvent> Scheduler::TakeEvents() {
  // What was reserved for the pass in flight stays.
  std::vector<RequestEvent> taken(events_.begin(), events_.end());
  events_.clear();
  return taken;
}

const RequestState& Scheduler::Get(RequestId id) const {
  auto found = requests_.find(id);
  TIDAL_CHECK(found != requests_.end(), InvalidArgument, "request ", id,
              ": there is none of this id; it was removed, or never added");
  return found->second;
}

// As Get, to change it.
RequestState& Scheduler::Find(RequestId id) {
  return const_cast<RequestState&>(Get(id));
}

RequestState Scheduler::Remove(RequestId id) {
  TIDAL_CHECK(Get(id).status == RequestStatus::kFinished, InvalidArgument, "request ", id,
              ": it has not ended; cancel it first");
  return std::move(requests_.extract(id).mapped());
}

DecoderStats Scheduler::stats() const {
  DecoderStats stats = counts_;
  for (const RequestState* request : waiting_) {
    ++(request->status == RequestStatus::kPaused ? stats.num_paused : stats.num_waiting);
  }
  for (const RequestState* request : running_) {
    bool decodes = request->status == RequestStatus::kDecoding;
    ++(decodes ? stats.num_decoding : stats.num_reading);
    if (decodes && request->AwaitsReader()) ++stats.num_unread;
  }
  stats.pages_cached = pool_.num_idle();
  stats.pages_free = pool_.num_free() - pool_.num_idle();
  stats.pages_on_host = host_pool_.num_pages() - host_pool_.num_free();
  stats.pages_held = pool_.num_pages() - pool_.num_free();
  return stats;
}

}  // namespace tidal
