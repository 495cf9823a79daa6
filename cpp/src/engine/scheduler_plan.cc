// Scheduler: what comes next, a chunk of prompts or the next pass of a decode turn.
#include <algorithm>
#include <limits>
#include <utility>

#include "engine/scheduler.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// How many that do not fit are looked at for one chunk.
constexpr size_t kMostTooLarge = 8;

// Asks for the logits that are wanted after the row's tokens.
void WantLogits(const RequestState& request, BatchRow& row) {
  if (!request.request.scoring) return;
  const Scoring& scoring = *request.request.scoring;
  int64_t first = request.max_tokens() - scoring.num_logits;  // token after which they are wanted
  int64_t end = request.sequence.cached + row.num_tokens;
  row.num_logits = std::clamp<int64_t>(end - first, 0, row.num_tokens);
  if (row.num_logits == 0) return;
  int64_t vocab_size = static_cast<int64_t>(scoring.logits->size()) / scoring.num_logits;
  row.logits = scoring.logits->data() + (end - row.num_logits - first) * vocab_size;
}

// Whether it has a share in the turns.
bool TakesTurns(const RequestState& request) {
  return request.status == RequestStatus::kDecoding && !request.AwaitsReader();
}

}  // namespace

Batch Scheduler::Next(double now_ms) {
  TIDAL_CHECK(in_flight_.empty(), InvalidArgument,
              "scheduler: a batch is in flight; commit it before the next one");
  now_ms_ = started_ms_ = now_ms;
  work_ = {};
  std::optional<double> ended_ms = std::exchange(ended_ms_, std::nullopt);
  EndGuided();
  Batch batch;
  bool is_planned = is_turn_open_ && PlanTurn(batch);
  if (!is_planned && owed_ms_ > 0.0 && AnyDecoding()) is_planned = PlanTurn(batch);
  bool is_stuck = false;
  while (!is_planned) {
    is_planned = PlanChunk(batch) || PlanTurn(batch);
    is_stuck = !is_planned && running_.empty() && AnyWaiting() && !MasksAskedAt();
    if (!is_stuck) break;
    if (!stuck_since_ms_) stuck_since_ms_ = now_ms;
    if (now_ms - *stuck_since_ms_ < limits_.max_stuck_ms) break;
    EndStuck();
  }
  if (!is_stuck) stuck_since_ms_.reset();
  num_events_in_flight_ = in_flight_.size() + copying_.size();
  for (const BatchRow& row : batch.rows) {
    num_events_in_flight_ += static_cast<size_t>(row.num_draws);
  }
  ReserveEvents(num_events_in_flight_);
  if (!batch.rows.empty() && ended_ms) counts_.gap_s += (now_ms - *ended_ms) * 1e-3;
  if (!batch.rows.empty() || !saves_.empty()) {
    batch.saves = std::exchange(saves_, {});
    batch.restores = std::exchange(restores_, {});
    batch.copies = std::exchange(copies_, {});
  }
  return batch;
}

bool Scheduler::AnyDecoding() const {
  return std::any_of(running_.begin(), running_.end(), [](const RequestState* request) {
    return request->status == RequestStatus::kDecoding;
  });
}

// Whether somebody waits for a row, or for pages.
bool Scheduler::AnyWaiting() const {
  return std::any_of(waiting_.begin(), waiting_.end(),
                     [](const RequestState* request) { return !request->AwaitsReader(); });
}

void Scheduler::AddRow(Batch& batch, RequestState& request, RowKind kind, const BatchRow& row) {
  batch.rows.push_back(row);
  batch.is_reading = kind == RowKind::kRead;
  const Sequence& sequence = request.sequence;
  in_flight_.push_back({.request = &request,
                        .kind = kind,
                        .begin = sequence.cached,
                        .num_sparse = sequence.num_sparse,
                        .num_tokens = row.num_tokens,
                        .is_sparse = batch.plan != PlanId::kDense && request.is_sparse()});
  request.is_in_flight = true;
}

Scheduler::Room Scheduler::NewRoom() const {
  return {
      .limit_ms = AnyDecoding() ? limits_.max_chunk_ms : std::numeric_limits<double>::infinity(),
      .num_tokens = limits_.max_pass_tokens};
}

// (waited + work) / work: 1 at first, and growing the faster the less there is to read.
double Scheduler::Urgency(const RequestState& request) const {
  ChunkWork work;
  work.Add(std::max<int64_t>(request.read_to() - request.known_tokens, 1), request.known_tokens);
  return 1.0 + (now_ms_ - request.arrived_ms) / cost_.Predict(work);
}

bool Scheduler::IsLater(const Candidate& one, const Candidate& other) {
  const RequestState &a = *one.request, &b = *other.request;
  if (a.request.priority != b.request.priority) return a.request.priority > b.request.priority;
  return one.urgency != other.urgency ? one.urgency < other.urgency : a.id > b.id;
}

// All that could be read. Who waits for room is looked at again once there may be more.
std::vector<Scheduler::Candidate> Scheduler::Candidates() const {
  std::vector<Candidate> candidates;
  for (RequestState* request : running_) {
    if (request->status != RequestStatus::kReading || request->LacksMask()) continue;
    candidates.push_back({request, Urgency(*request), false});
  }
  if (waiting_.empty() || free_rows_.empty()) return candidates;
  if (!may_admit_ && !running_.empty() && UnpromisedPages() <= room_when_full_) return candidates;
  for (RequestState* request : waiting_) {
    if (request->LacksMask() || request->AwaitsReader()) continue;
    candidates.push_back({request, Urgency(*request), true});
  }
  return candidates;
}

// Whoever came first of those that read or wait.
const RequestState* Scheduler::Oldest() const {
  const RequestState* oldest = nullptr;
  for (const std::vector<RequestState*>* list : {&running_, &waiting_}) {
    for (const RequestState* request : *list) {
      if (request->status == RequestStatus::kDecoding || request->AwaitsReader()) continue;
      if (oldest == nullptr || request->HasPriorityOver(*oldest)) oldest = request;
    }
  }
  return oldest;
}

// Puts the oldest in front, if a chunk is owed to it.
void Scheduler::PromoteOldest(const Room& room, std::vector<Candidate>& candidates) {
  auto oldest = std::find_if(candidates.begin(), candidates.end(),
                             [this](const Candidate& one) { return one.request == oldest_; });
  if (oldest == candidates.end()) return;
  int64_t begin = oldest_->is_waiting() ? oldest_->known_tokens : oldest_->sequence.cached;
  ChunkWork work;
  work.Add(ChunkTokens(*oldest_, begin, room), begin);
  double chunk_ms = cost_.Predict(work);
  if (oldest_owed_ms_ >= chunk_ms) oldest->urgency = std::numeric_limits<double>::infinity();
  oldest_owed_ms_ = std::min(oldest_owed_ms_, chunk_ms);
}

// The first in line of those that were overtaken too often: nobody goes before it any more.
const RequestState* Scheduler::HeldUp() const {
  const RequestState* first = nullptr;
  for (const RequestState* request : waiting_) {
    if (request->num_overtaken < limits_.max_overtakes || request->AwaitsReader()) continue;
    if (first == nullptr || request->HasPriorityOver(*first)) first = request;
  }
  return first;
}

// Whether another is about to read what this one would read as well.
bool Scheduler::WaitsForPrefix(RequestState& request) {
  if (!request.follows) return false;
  auto leader = requests_.find(*request.follows);
  bool will_read = leader != requests_.end() &&
                   (leader->second.status == RequestStatus::kQueued ||
                    leader->second.status == RequestStatus::kReading) &&
                   leader->second.sequence.cached < request.followed_tokens &&
                   !leader->second.LacksMask();
  if (will_read) return true;
  request.follows.reset();
  if (request.reads_prefixes()) request.known_tokens = KnownTokens(request);
  return false;
}

// Says how many tokens behind `begin` cached ones a chunk of the request takes in; 0: none.
int64_t Scheduler::ChunkTokens(const RequestState& request, int64_t begin, const Room& room) const {
  int64_t unread = request.read_to() - begin;
  int64_t count = std::min(unread, room.num_tokens);
  if (request.request.scoring) return count;
  if (room.limit_ms < std::numeric_limits<double>::infinity()) {
    count = std::min(count, cost_.TokensWithin(room.limit_ms, room.work, begin));
  }
  if (count == unread) return count;
  // It ends with a page, and takes one at least, if the pass is its own.
  int64_t page_size = pool_.page_size();
  int64_t whole = (begin + count) / page_size * page_size - begin;
  if (whole > 0) return whole;
  int64_t least = std::min({unread, room.num_tokens, page_size - begin % page_size});
  return room.work.num_tokens == 0 ? least : 0;
}

// Adds the next chunk of the request's tokens to a pass over prompts. Returns whether another
// prompt may join them.
bool Scheduler::ReadNext(RequestState& request, Room& room, Batch& batch) {
  int64_t begin = request.sequence.cached, unread = request.num_unread();
  if (unread <= 0) {  // all was known, or is a session's that goes on
    request.status = RequestStatus::kDecoding;
    return true;
  }
  int64_t count = ChunkTokens(request, begin, room);
  const bool is_scored = request.request.scoring.has_value();
  if (count == 0 || ((count < unread || is_scored) && !batch.rows.empty())) return false;
  if (!GrowOrPause(request, count)) return true;
  bool draws = count == unread && request.read_to() == request.num_tokens();
  BatchRow row = {.sequence = &request.sequence, .num_tokens = count, .num_draws = draws ? 1 : 0};
  WantLogits(request, row);
  if (draws) {
    row.num_logprobs = request.request.logprobs;
    row.allowed = request.Masks(0, 1);
  }
  if (request.request.prompt_logprobs) {
    row.num_logprobs = std::max(row.num_logprobs, request.request.prompt_logprobs);
    int64_t num_followed = NumFollowed(row);
    // Who reads again was given the first of them before.
    row.num_scored =
        num_followed - std::clamp<int64_t>(request.num_scored - begin, 0, num_followed);
  }
  AddRow(batch, request, RowKind::kRead, row);
  room.work.Add(count, begin);
  room.num_tokens -= count;
  return count == unread && !is_scored && room.num_tokens > 0;
}

bool Scheduler::PlanChunk(Batch& batch) {
  MakeWay();
  Room room = NewRoom();
  std::vector<Candidate> candidates = Candidates();
  oldest_ = Oldest();
  PromoteOldest(room, candidates);
  std::make_heap(candidates.begin(), candidates.end(), IsLater);
  const RequestState* held_up = HeldUp();
  std::vector<RequestState*> too_large;
  while (!candidates.empty() && too_large.size() < kMostTooLarge) {
    std::pop_heap(candidates.begin(), candidates.end(), IsLater);
    Candidate next = candidates.back();
    candidates.pop_back();
    RequestState& request = *next.request;
    if (request.is_waiting()) {
      // It was paused just now, or somebody waits for the room that it would take.
      if (!next.is_waiting || free_rows_.empty()) continue;
      if (held_up != nullptr && held_up->HasPriorityOver(request)) continue;
      if (WaitsForPrefix(request)) continue;
      int64_t unread = request.read_to() - request.known_tokens;
      if (!batch.rows.empty() && ChunkTokens(request, request.known_tokens, room) < unread) break;
      if (!Admit(request)) {
        too_large.push_back(&request);
        continue;
      }
      for (RequestState* overtaken : too_large) ++overtaken->num_overtaken;
    }
    if (!ReadNext(request, room, batch)) break;
  }
  if (!too_large.empty()) {
    may_admit_ = false;
    room_when_full_ = UnpromisedPages();
  }
  work_ = room.work;
  return !batch.rows.empty();
}

void Scheduler::OpenTurn() {
  is_turn_open_ = true;
  has_corrected_ = false;
  ++turn_;
  // Who comes late to a round drafts no longer than the others.
  int64_t most = 0;
  for (const RequestState* request : running_) {
    if (request->round) {
      most = std::max(most, request->round->num_drafts - request->round->num_drafted);
    }
  }
  // The pass that checks has a token and a draw more than drafts.
  int64_t most_checked = limits_.max_check_tokens - 1;
  most = most == 0 ? most_checked : std::min(most, most_checked);
  for (RequestState* request : running_) {
    if (!TakesTurns(*request)) continue;
    request->MaybeCorrect();
    request->MaybeDraftFromText(most_checked);
    request->MaybeDraftBySteps(most);
  }
  if (!IsCheckNext()) return;
  // Whoever has no drafts shares the pass that checks those of others: one in place of two.
  for (RequestState* request : running_) {
    if (TakesTurns(*request)) request->MaybeJoinCheck();
  }
}

// Whether there are drafts to check, and no more to make before that.
bool Scheduler::IsCheckNext() const {
  bool is_next = false;
  for (const RequestState* request : running_) {
    if (!request->round) continue;
    if (request->round->is_drafting() && !request->LacksMask()) return false;
    is_next = true;
  }
  return is_next;
}

bool Scheduler::PlanTurn(Batch& batch) {
  if (!is_turn_open_) OpenTurn();
  if (PlanCorrections(batch) || PlanStep(batch) || PlanChecks(batch)) return true;
  is_turn_open_ = false;
  return false;
}

// One pass a turn, as long as a chunk of a prompt: who has more to correct waits with its step.
bool Scheduler::PlanCorrections(Batch& batch) {
  if (has_corrected_) return false;
  Room room = NewRoom();
  for (RequestState* request : std::vector(running_)) {
    if (!request->is_correcting()) continue;
    int64_t begin = request->sequence.cached;
    int64_t count = ChunkTokens(*request, begin, room);
    if (count == 0) break;
    if (!GrowOrPause(*request, count)) break;  // which it never needs
    AddRow(batch, *request, RowKind::kCorrect,
           {.sequence = &request->sequence, .num_tokens = count, .num_draws = 0});
    room.work.Add(count, begin);
    room.num_tokens -= count;
  }
  has_corrected_ = true;
  work_ = room.work;
  return !batch.rows.empty();
}

// Whether a step of this turn is still to be made.
bool Scheduler::IsDue(const RequestState& request) const {
  return request.status == RequestStatus::kDecoding && request.last_turn != turn_ &&
         !request.is_correcting() && !request.OwesCorrection() && !request.LacksMask() &&
         !request.AwaitsReader() && (!request.round || request.round->is_drafting());
}

// The plans through which somebody's next step attends to chosen positions.
std::vector<PlanId> Scheduler::SparsePlans() const {
  std::vector<PlanId> plans;
  for (const RequestState* request : running_) {
    bool decodes = request->status == RequestStatus::kDecoding && !request->is_correcting();
    if (decodes && request->is_sparse()) plans.push_back(request->request.decoding.plan);
  }
  return plans;
}

// The plan that the request's next step goes through. Where all who share a plan are short, it is
// the dense one, which more may share.
PlanId Scheduler::StepPlan(const RequestState& request, const std::vector<PlanId>& sparse_plans) {
  const DecodePolicy& policy = request.request.decoding;
  if (policy.verifies && !request.round) return PlanId::kDense;
  bool is_sparse =
      std::find(sparse_plans.begin(), sparse_plans.end(), policy.plan) != sparse_plans.end();
  return is_sparse ? policy.plan : PlanId::kDense;
}

// A step of all that share a plan and have not yet had theirs in this turn.
bool Scheduler::PlanStep(Batch& batch) {
  std::vector<PlanId> sparse_plans = SparsePlans();
  for (RequestState* first : std::vector(running_)) {
    if (!IsDue(*first)) continue;
    batch.plan = StepPlan(*first, sparse_plans);
    // Those after it may be paused to make room.
    for (RequestState* request : std::vector(running_)) {
      if (!IsDue(*request) || StepPlan(*request, sparse_plans) != batch.plan) continue;
      TakeStep(*request, batch);
    }
    if (!batch.rows.empty()) return true;
  }
  batch.plan = PlanId::kDense;
  return false;
}

// Adds the request's step, if it has pages for it.
void Scheduler::TakeStep(RequestState& request, Batch& batch) {
  bool is_draft = request.round.has_value();
  if (is_draft && request.round->num_drafted > 0) {
    // Nobody is paused for a guess.
    if (!Grow(request, 1)) {
      request.round->num_drafts = request.round->num_drafted;
      return;
    }
  } else if (!GrowOrPause(request, 1)) {
    return;
  }
  request.last_turn = turn_;
  BatchRow row = {.sequence = &request.sequence, .counts_sets = request.request.counts_sets};
  WantLogits(request, row);
  if (!is_draft) row.num_logprobs = request.request.logprobs;
  row.allowed = request.Masks(request.num_unchecked(), 1);
  AddRow(batch, request, is_draft ? RowKind::kDraft : RowKind::kStep, row);
}

bool Scheduler::PlanChecks(Batch& batch) {
  if (!IsCheckNext()) return false;
  int64_t tokens_left = limits_.max_check_tokens;
  for (RequestState* request : running_) {
    if (!request->round || request->round->is_drafting() || request->LacksMask()) continue;
    if (!batch.rows.empty() && request->round->num_drafted + 1 > tokens_left) break;
    request->sequence.cached = request->round->begin;
    // The newest drafts may need pages, for which nobody is paused either.
    while (request->round && !Grow(*request, request->round->num_drafted + 1)) {
      request->DropLastDraft();
    }
    if (!request->round) continue;
    int64_t count = request->round->num_drafted + 1;
    request->last_turn = turn_;
    AddRow(batch, *request, RowKind::kCheck,
           {.sequence = &request->sequence,
            .num_tokens = count,
            .num_draws = count,
            .num_logprobs = request->request.logprobs,
            .allowed = request->Masks(0, count)});
    tokens_left -= count;
  }
  return !batch.rows.empty();
}

// Nothing runs, and yet the first in line does not fit: sequences that the scheduler does not know
// own the pages.
void Scheduler::EndStuck() {
  std::vector<Candidate> candidates = Candidates();
  auto first = std::max_element(candidates.begin(), candidates.end(), IsLater);
  ReserveEvents(1);
  first->request->failure = RequestFailure::kNoRoom;
  first->request->shortage = {.missing = MissingPages(*first->request),
                              .free = pool_.num_free(),
                              .total = pool_.num_pages()};
  Finish(*first->request, FinishReason::kError);
}

}  // namespace tidal
