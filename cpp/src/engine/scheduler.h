// Scheduler: who goes through the layers next, with how many tokens. Host arithmetic on values: it
// knows no model and no device, and time is told to it.
//
//   Batch batch = scheduler.Next(now);  Drawn drawn = runner.Run(batch);
//   scheduler.Commit(batch, drawn, now);  events = scheduler.TakeEvents();
//
// Prompts are read in chunks. While anybody decodes, a chunk is cut so that it takes at most
// max_chunk_ms, and after it decoding gets its share of the time before the next chunk. The prompt
// with the highest (waited + work) / work is read next, so that a short one soon goes before a long
// one, and a long one waits no longer than in proportion. A quarter of the time is of whoever came
// first, so that nobody waits without end. Of prompts that begin alike one is read, and the others
// find its pages: several answers to one prompt, or many questions about one document.
//
// Decoding goes in turns: in a turn each decoding request takes one step, by plan, or one draft,
// after the correction of its cache if that is due. Drafts from the text take no step. A round of
// drafts is checked once all have been made.
//
// Pages are taken as tokens come. A request is let in if its prompt and output_reserve tokens after
// it have room beside what others were let in for; a session's turn takes all that it may need.
// When pages run out nevertheless, a request is paused: its pages are given back. That is one whose
// reader is slow (max_unread), which gives up its row too where somebody waits, or the newest.
// Where host memory has room for them they are kept there, and it goes on from them. Otherwise it
// reads its tokens again when there is room, densely, those too that it had decoded sparsely; what
// the prefix cache still has is not read twice.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "decode/batch.h"
#include "engine/chunk_cost.h"
#include "engine/request_state.h"
#include "kv/page_pool.h"
#include "kv/prefix_cache.h"

namespace tidal {

struct SchedulerLimits {
  int64_t max_rows = 8;            // requests that read or decode at once
  int64_t max_pass_tokens = 4096;  // of all rows of a pass that reads prompts
  int64_t max_check_tokens = 8;    // of all rows of a pass that checks drafts; it draws as many
  int64_t max_seq_len = 0;         // tokens of one sequence
  double max_chunk_ms = 60.0;      // of a pass over prompts while anybody decodes
  double decode_share = 0.25;      // of the time, in [0, 1)
  int64_t output_reserve = 1024;   // tokens to generate that must have room at admission
  int64_t max_host_pages = 0;      // pages of paused requests in host memory
  int64_t max_overtakes = 8;       // of a request that does not fit, by others that do
  // Whether the K and V of tokens that are decoded densely are those that reading them gives.
  bool decodes_cleanly = true;
  // How long the first in line waits, while nothing runs, for pages of sequences that the scheduler
  // does not know.
  double max_stuck_ms = 0.0;
};

// What has happened to a request: a new token, its end, or both.
struct RequestEvent {
  RequestId id = 0;
  int32_t token_id = -1;  // -1: no token
  FinishReason finish_reason = FinishReason::kNone;
  // Where the token was drawn: `row` of the batch committed last, and which draw of that row; the
  // row's last num_draws logits are those of its draws. -1 without a token.
  int64_t row = -1;
  int64_t draw = -1;
};

class Scheduler {
 public:
  // `prefixes` may be null: nothing is found again. Both must outlive it.
  Scheduler(PagePool& pool, PrefixCache* prefixes, const SchedulerLimits& limits);

  // Throws CapacityError, which begins with `what`, for tokens and new ones after them that could
  // never fit.
  void CheckCapacity(const std::string& what, int64_t num_tokens, int64_t max_new_tokens) const;

  // Takes a request in; `sequence` holds its prompt. Throws CapacityError for what could never fit,
  // InvalidArgument for what makes no sense.
  RequestId Add(Request request, Sequence sequence, double now_ms);

  // Says what goes through the layers next; no rows: nothing to do, or no room yet. It must be
  // committed, or have failed, before the next one; if Next throws, it has failed.
  Batch Next(double now_ms);

  // The request of each row of the batch in flight.
  std::vector<RequestId> InFlight() const;

  // Takes in what the pass gave: advances its sequences, publishes prefixes, applies the stop
  // rules.
  void Commit(const Batch& batch, const Drawn& drawn, double now_ms) noexcept;

  // The pass failed: its requests end with FinishReason::kError, all others go on.
  void Fail(double now_ms) noexcept;

  // Ends a request, after the pass in flight if it is part of one. No effect if it has ended.
  void Cancel(RequestId id, FinishReason reason, double now_ms);

  // Whoever asked for a request has been given so many of its tokens: a session's corrections wait
  // for that, and all of a request with max_unread. Returns whether it waited for this.
  bool MarkHeard(RequestId id, int64_t num_tokens);

  // What has happened since the last call, in order.
  std::vector<RequestEvent> TakeEvents();

  // scheduler_guides.cc: what guided requests have to ask since the last call; an answer; and when
  // somebody was asked last, if there is anybody who waits for a mask.
  std::vector<GuideQuestion> AskGuides(double now_ms);
  void TakeAnswer(GuideAnswer answer);
  std::optional<double> MasksAskedAt() const;

  // Throws InvalidArgument if there is none of this id.
  const RequestState& Get(RequestId id) const;

  // Forgets a request that has ended and returns what was left of it; its sequence has its pages
  // only if it keeps them. Throws InvalidArgument if it has not ended.
  RequestState Remove(RequestId id);

  bool HasWork() const { return !running_.empty() || !waiting_.empty(); }
  DecoderStats stats() const;
  const ChunkCost& chunk_cost() const { return cost_; }

  // Throws std::logic_error if lists, states, rows and pages disagree: for tests.
  void CheckIntegrity() const;

 private:
  enum class RowKind : int32_t { kRead, kCorrect, kStep, kDraft, kCheck };
  struct RowInFlight {
    RequestState* request;
    RowKind kind;
    int64_t begin;       // cached tokens before the pass
    int64_t num_sparse;  // the sequence's, before the pass
    int64_t num_tokens;
    bool is_sparse;  // whether the row attends to chosen positions
  };
  // What a pass may still take in.
  struct Room {
    double limit_ms;
    int64_t num_tokens;
    ChunkWork work{};  // what it has taken in
  };
  struct Candidate {
    RequestState* request;
    double urgency;
    bool is_waiting;
  };

  // scheduler_plan.cc: what comes next.
  bool PlanChunk(Batch& batch);
  std::vector<Candidate> Candidates() const;
  const RequestState* Oldest() const;
  void PromoteOldest(const Room& room, std::vector<Candidate>& candidates);
  const RequestState* HeldUp() const;
  bool WaitsForPrefix(RequestState& request);
  static bool IsLater(const Candidate& one, const Candidate& other);
  bool ReadNext(RequestState& request, Room& room, Batch& batch);
  bool PlanTurn(Batch& batch);
  void OpenTurn();
  bool PlanCorrections(Batch& batch);
  bool PlanStep(Batch& batch);
  void TakeStep(RequestState& request, Batch& batch);
  bool IsCheckNext() const;
  bool PlanChecks(Batch& batch);
  bool AnyWaiting() const;
  bool IsDue(const RequestState& request) const;
  std::vector<PlanId> SparsePlans() const;
  static PlanId StepPlan(const RequestState& request, const std::vector<PlanId>& sparse_plans);
  Room NewRoom() const;
  int64_t ChunkTokens(const RequestState& request, int64_t begin, const Room& room) const;
  double Urgency(const RequestState& request) const;
  bool AnyDecoding() const;
  void AddRow(Batch& batch, RequestState& request, RowKind kind, const BatchRow& row);
  void EndStuck();

  // scheduler_guides.cc
  void EndGuided();

  // scheduler_room.cc: rows and pages.
  bool Admit(RequestState& request);
  void Save(RequestState& request);
  void Restore(RequestState& request);
  void UndoRestore(RequestState& request) noexcept;
  void ForgetSaved(RequestState& request) noexcept;
  RequestState* OneThatAwaitsReader() const;
  void MakeWay();
  int64_t ReserveTokens(const RequestState& request) const;
  bool FindsPrefix(const RequestState& request) const;
  int64_t MissingPages(const RequestState& request) const;
  int64_t PromisedPages() const;
  int64_t UnpromisedPages() const;
  bool Grow(RequestState& request, int64_t num_tokens);
  void Own(RequestState& request, int64_t num_tokens, int64_t first);
  int64_t TokensToOwn(const RequestState& request, int64_t num_tokens) const;
  int64_t TokensToKeep(const RequestState& request) const;
  bool GrowOrPause(RequestState& request, int64_t num_tokens);
  RequestState& NewestToPause(RequestState& otherwise) const;
  void Pause(RequestState& request);
  void LeaveRow(RequestState& request) noexcept;
  void ReleasePages(RequestState& request) noexcept;
  void Publish(const RequestState& request) noexcept;

  // scheduler.cc
  void CheckFits(const Request& request, const Sequence& sequence) const;
  void CheckScoring(const Request& request, const Sequence& sequence) const;
  RequestState& Find(RequestId id);
  void Follow(RequestState& request) const;
  int64_t KnownTokens(const RequestState& request) const;
  void ReserveWaiting();
  void Count(RowKind kind, double elapsed_ms) noexcept;
  void ShareOut(double elapsed_ms) noexcept;
  void CommitRow(int64_t index, std::span<const int32_t> draws) noexcept;
  void AcceptDraws(int64_t index, std::span<const int32_t> draws) noexcept;
  void EndPass() noexcept;
  void ReserveEvents(size_t count);
  void Finish(RequestState& request, FinishReason reason) noexcept;

  PagePool& pool_;
  PrefixCache* prefixes_;
  SchedulerLimits limits_;
  ChunkCost cost_;
  double now_ms_ = 0.0;  // the newest time told
  RequestId next_id_ = 1;
  std::map<RequestId, RequestState> requests_;
  std::vector<RequestState*> running_;  // in order of priority
  std::vector<RequestState*> waiting_;
  std::vector<RequestState*> guided_;  // of both
  std::vector<int32_t> free_rows_;
  std::vector<RequestEvent> events_;

  // Whose pages the pass in flight copies, of the tokens from the first on.
  struct Copying {
    RequestState* request;
    int64_t first;
  };
  PagePool host_pool_;  // room for pages of paused requests
  // That the next batch has to make, as Batch says.
  std::vector<PageCopy> saves_;
  std::vector<PageCopy> restores_;
  std::vector<PageCopy> copies_;
  std::vector<Copying> copying_;   // restored ones are among them
  std::vector<RequestId> saving_;  // paused by the pass in flight
  std::vector<RowInFlight> in_flight_;
  size_t num_events_in_flight_ = 0;  // that the pass in flight may cause: room is reserved
  ChunkWork work_;           // of the pass in flight, if it is one over prompts or corrections
  double started_ms_ = 0.0;  // the pass in flight
  std::optional<double> ended_ms_;        // the last pass, if the next one may follow at once
  std::optional<double> stuck_since_ms_;  // nothing runs, and yet nobody who waits fits
  const RequestState* oldest_ = nullptr;  // when the newest chunk was planned
  double oldest_owed_ms_ = 0.0;           // to whoever came first of those that read or wait
  bool may_admit_ = true;                 // false: nobody who waits fits until there is more room
  int64_t room_when_full_ = 0;            // UnpromisedPages() then
  bool is_turn_open_ = false;
  bool has_corrected_ = false;  // in this turn
  uint64_t turn_ = 0;
  double owed_ms_ = 0.0;   // to decoding, before the next chunk
  double asked_ms_ = 0.0;  // when a guide was asked last
  DecoderStats counts_;
};

}  // namespace tidal
