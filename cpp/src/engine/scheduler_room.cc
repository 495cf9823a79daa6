// Scheduler: rows and pages. Who is let in, who grows, and who has to make room.
#include <algorithm>
#include <stdexcept>

#include "engine/scheduler.h"

namespace tidal {

// Pages that running requests were let in for and have not taken yet.
int64_t Scheduler::PromisedPages() const {
  int64_t promised = 0;
  for (const RequestState* request : running_) {
    auto held = static_cast<int64_t>(request->sequence.pages.pages().size());
    promised += std::max<int64_t>(pool_.PagesFor(request->reserve_tokens) - held, 0);
  }
  return promised;
}

// Pages for whoever is let in next.
int64_t Scheduler::UnpromisedPages() const {
  return pool_.num_free() - PromisedPages();
}

// Tokens that a request is let in with room for.
int64_t Scheduler::ReserveTokens(const RequestState& request) const {
  int64_t output = std::min(limits_.output_reserve, request.max_tokens() - request.num_tokens());
  return request.num_tokens() + output;
}

bool Scheduler::FindsPrefix(const RequestState& request) const {
  return prefixes_ != nullptr && request.reads_prefixes() && !request.on_host;
}

// Pages that a waiting request takes when it is let in.
int64_t Scheduler::MissingPages(const RequestState& request) const {
  const Sequence& sequence = request.sequence;
  if (request.keeps_pages()) {
    return sequence.pages.NumMissing(TokensToKeep(request),
                                     request.first_owned(request.first_written()), sequence.cached);
  }
  PrefixMatch match;
  if (FindsPrefix(request)) match = prefixes_->Peek(sequence.tokens, request.salt);
  return pool_.PagesFor(ReserveTokens(request)) - match.num_pages + match.num_idle;
}

// Gives a waiting request a row and what is known of its tokens, if there is room for the others.
bool Scheduler::Admit(RequestState& request) {
  if (free_rows_.empty()) return false;
  Sequence& sequence = request.sequence;
  while (MissingPages(request) > UnpromisedPages()) {
    RequestState* unread = OneThatAwaitsReader();
    if (unread == nullptr) return false;
    Pause(*unread);
  }
  // Nothing is allocated when a pass is committed.
  sequence.tokens.reserve(static_cast<size_t>(request.max_tokens()));
  if (request.keeps_pages()) {
    Own(request, TokensToKeep(request), request.first_owned(request.first_written()));
  }
  if (request.on_host) Restore(request);
  if (FindsPrefix(request)) {
    sequence.pages.Adopt(prefixes_->Find(sequence.tokens, request.salt));
    auto num_pages = static_cast<int64_t>(sequence.pages.pages().size());
    sequence.cached = sequence.clean_len = num_pages * pool_.page_size();
    counts_.cached_tokens += sequence.cached;
  }
  if (request.status == RequestStatus::kQueued) {
    request.begun_ms = now_ms_;
    request.cached_tokens = sequence.cached;
  }
  request.known_tokens = sequence.cached;
  request.reserve_tokens = ReserveTokens(request);
  request.status = RequestStatus::kReading;
  sequence.sampling.slot = free_rows_.back();
  free_rows_.pop_back();
  std::erase(waiting_, &request);
  auto place = std::find_if(running_.begin(), running_.end(), [&](const RequestState* other) {
    return request.HasPriorityOver(*other);
  });
  running_.insert(place, &request);
  return true;
}

// Says for how many tokens a request has pages once it has them for num_tokens: it keeps those that
// it has.
int64_t Scheduler::TokensToOwn(const RequestState& request, int64_t num_tokens) const {
  auto held = static_cast<int64_t>(request.sequence.pages.pages().size());
  return std::max(num_tokens, held * pool_.page_size());
}

// Says for how many tokens a request that keeps its pages has them once it is let in: a replay for
// all that it was made for, a session for what its turn may reach, which may have gone back.
int64_t Scheduler::TokensToKeep(const RequestState& request) const {
  bool is_replay = request.request.owner == SequenceOwner::kReplay;
  return is_replay ? TokensToOwn(request, request.max_tokens()) : request.max_tokens();
}

// Takes pages for num_tokens more tokens to cache. Returns false, taking none, if there are too
// few.
bool Scheduler::Grow(RequestState& request, int64_t num_tokens) {
  SequencePages& pages = request.sequence.pages;
  int64_t begin = request.sequence.cached;
  int64_t end = TokensToOwn(request, begin + num_tokens);
  int64_t first = request.first_owned(begin);
  if (pages.NumMissing(end, first, begin) > pool_.num_free()) return false;
  Own(request, end, first);
  return true;
}

// Gives the request pages for num_tokens tokens, of which nobody else owns those it writes to, from
// token `first` on. What has to be copied for that is copied by the pass that is being planned.
void Scheduler::Own(RequestState& request, int64_t num_tokens, int64_t first) {
  Sequence& sequence = request.sequence;
  std::vector<PageCopy> copies = sequence.pages.Own(num_tokens, first, sequence.cached);
  if (copies.empty()) return;
  copies_.insert(copies_.end(), copies.begin(), copies.end());
  copying_.push_back({&request, first / pool_.page_size() * pool_.page_size()});
  request.is_in_flight = true;
}

// Returns a request that may be paused and would not go on now anyhow, or null.
RequestState* Scheduler::OneThatAwaitsReader() const {
  for (RequestState* request : running_) {
    if (request->AwaitsReader() && !request->is_in_flight) return request;
  }
  return nullptr;
}

// Takes a row from whoever waits for its reader, if somebody waits for one.
void Scheduler::MakeWay() {
  if (!free_rows_.empty() || !AnyWaiting()) return;
  RequestState* unread = OneThatAwaitsReader();
  if (unread != nullptr) Pause(*unread);
}

// As Grow, but makes room: the newest requests are paused, the one that grows in its turn. Returns
// false if that was the one.
bool Scheduler::GrowOrPause(RequestState& request, int64_t num_tokens) {
  while (!Grow(request, num_tokens)) {
    RequestState& newest = NewestToPause(request);
    Pause(newest);
    if (&newest == &request) return false;
  }
  return true;
}

RequestState& Scheduler::NewestToPause(RequestState& otherwise) const {
  RequestState* unread = OneThatAwaitsReader();
  if (unread != nullptr) return *unread;
  for (auto request = running_.rbegin(); request != running_.rend(); ++request) {
    if (!(*request)->is_in_flight && !(*request)->keeps_pages()) return **request;
  }
  return otherwise;
}

void Scheduler::Pause(RequestState& request) {
  request.DropDrafts();
  // What may throw comes before any change.
  ReserveWaiting();
  request.on_host ? UndoRestore(request) : Save(request);
  waiting_.push_back(&request);
  Publish(request);
  LeaveRow(request);
  ReleasePages(request);
  request.status = RequestStatus::kPaused;
  request.known_tokens = request.on_host ? request.on_host->cached : KnownTokens(request);
  ++request.num_pauses;
  ++counts_.num_pauses;
}

// Has the next pass bring what is cached of a request to host memory, if there is room.
void Scheduler::Save(RequestState& request) {
  const Sequence& sequence = request.sequence;
  const std::vector<int32_t>& pages = sequence.pages.pages();
  auto count = static_cast<size_t>(pool_.PagesFor(sequence.cached));
  if (count == 0 || static_cast<int64_t>(count) > host_pool_.num_free()) return;
  saves_.reserve(saves_.size() + count);
  saving_.reserve(saving_.size() + 1);
  request.on_host = {.pages = host_pool_.Take(static_cast<int64_t>(count)),
                     .cached = sequence.cached,
                     .num_sparse = sequence.num_sparse,
                     .clean_len = sequence.clean_len};
  for (size_t i = 0; i < count; ++i) saves_.push_back({pages[i], request.on_host->pages[i]});
  saving_.push_back(request.id);
}

// Gives the request pages of its own, into which the next pass brings what it has in host memory.
// The host pages are free once that has happened.
void Scheduler::Restore(RequestState& request) {
  Sequence& sequence = request.sequence;
  const RequestState::OnHost& saved = *request.on_host;
  restores_.reserve(restores_.size() + saved.pages.size());
  copying_.reserve(copying_.size() + 1);
  sequence.pages.Own(saved.cached, 0, 0);
  for (size_t i = 0; i < saved.pages.size(); ++i) {
    restores_.push_back({saved.pages[i], sequence.pages.pages()[i]});
  }
  sequence.cached = saved.cached;
  sequence.num_sparse = saved.num_sparse;
  sequence.clean_len = saved.clean_len;
  copying_.push_back({&request, 0});
  request.is_in_flight = true;
}

// For whoever was let in by the pass that is being planned, and has no room to go on.
void Scheduler::UndoRestore(RequestState& request) noexcept {
  std::erase_if(restores_, [&](const PageCopy& copy) {
    const std::vector<int32_t>& pages = request.on_host->pages;
    return std::find(pages.begin(), pages.end(), copy.from) != pages.end();
  });
  std::erase_if(copying_, [&](const Copying& copying) { return copying.request == &request; });
  request.is_in_flight = false;
}

void Scheduler::ForgetSaved(RequestState& request) noexcept {
  if (!request.on_host) return;
  host_pool_.Release(request.on_host->pages);
  request.on_host.reset();
}

void Scheduler::LeaveRow(RequestState& request) noexcept {
  std::erase(running_, &request);
  free_rows_.push_back(request.sequence.sampling.slot);
  request.ngrams.reset();
}

void Scheduler::ReleasePages(RequestState& request) noexcept {
  Sequence& sequence = request.sequence;
  sequence.pages.Release();
  sequence.cached = sequence.num_sparse = sequence.clean_len = sequence.shadowed = 0;
}

// Makes the prefix known that the request has computed cleanly.
void Scheduler::Publish(const RequestState& request) noexcept {
  if (prefixes_ == nullptr || request.request.owner == SequenceOwner::kReplay) return;
  const Sequence& sequence = request.sequence;
  auto num_clean = static_cast<size_t>(std::min(sequence.clean_len, sequence.cached));
  prefixes_->Publish(std::span(sequence.tokens).first(num_clean), sequence.pages.pages(),
                     request.salt);
}

void Scheduler::CheckIntegrity() const {
  auto expect = [](bool holds, const char* what) {
    if (!holds) throw std::logic_error(what);
  };
  std::vector<int32_t> rows = free_rows_;
  int64_t num_saved = 0;
  size_t num_listed = running_.size() + waiting_.size();
  for (const auto& [id, request] : requests_) {
    const Sequence& sequence = request.sequence;
    int64_t room = static_cast<int64_t>(sequence.pages.pages().size()) * pool_.page_size();
    bool owns = request.is_running() || request.keeps_pages();
    expect(id == request.id, "a request is not at its id");
    expect(owns || room == 0, "a request owns pages that neither runs nor keeps them");
    expect(sequence.cached <= room, "a request has cached more than its pages hold");
    expect(sequence.clean_len <= sequence.cached, "more of a request is clean than cached");
    bool is_scored = request.request.scoring && request.status == RequestStatus::kFinished;
    expect(is_scored || sequence.cached < request.num_tokens(), "no token is left to cache");
    expect(!request.round || request.status == RequestStatus::kDecoding, "drafts without decoding");
    if (request.status == RequestStatus::kFinished) {
      ++num_listed;
      expect(request.finish_reason != FinishReason::kNone, "a request ended without a reason");
    }
    if (request.is_running()) rows.push_back(sequence.sampling.slot);
    if (request.on_host) num_saved += static_cast<int64_t>(request.on_host->pages.size());
    bool may_be_saved = request.status == RequestStatus::kPaused || request.is_in_flight;
    expect(may_be_saved || !request.on_host, "a request that is not paused is in host memory");
  }
  std::sort(rows.begin(), rows.end());
  expect(num_saved == host_pool_.num_pages() - host_pool_.num_free(), "host pages were lost");
  expect(num_listed == requests_.size(), "a request is in no list, or in two");
  expect(static_cast<int64_t>(rows.size()) == limits_.max_rows, "rows were lost, or made");
  for (size_t i = 0; i < rows.size(); ++i) {
    expect(rows[i] == static_cast<int32_t>(i), "a row has two owners");
  }
  for (const RequestState* request : running_) expect(request->is_running(), "a list is wrong");
  for (const RequestState* request : waiting_) expect(request->is_waiting(), "a list is wrong");
  expect(std::is_sorted(running_.begin(), running_.end(),
                        [](const RequestState* one, const RequestState* other) {
                          return one->HasPriorityOver(*other);
                        }),
         "running requests are out of order");
}

}  // namespace tidal
