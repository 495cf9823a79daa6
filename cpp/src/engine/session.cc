// Session: one sequence that outlives its turns. A turn is a Generation that borrows the sequence
// and gives it back when it ends (generation.cc).
#include <algorithm>
#include <utility>

#include "engine/decoder_impl.h"
#include "tidal/error.h"

namespace tidal {
namespace {

void CheckTokenIds(const std::vector<int32_t>& token_ids, int64_t vocab_size) {
  for (int32_t token : token_ids) {
    TIDAL_CHECK(token >= 0 && token < vocab_size, InvalidArgument, "token_ids: got token id ",
                token, ", expected 0 to ", vocab_size - 1);
  }
}

int64_t Length(const Sequence& sequence) {
  return static_cast<int64_t>(sequence.tokens.size());
}

// How much of a sequence's cache is of use once its tokens change.
struct CacheUse {
  int64_t cached;
  int64_t num_sparse;

  // Nothing from `length` on.
  CacheUse UpTo(int64_t length) const {
    int64_t dropped = std::max<int64_t>(cached - length, 0);
    return {cached - dropped, std::max<int64_t>(num_sparse - dropped, 0)};
  }
};

CacheUse UseOf(const Sequence& sequence) {
  return {sequence.cached, sequence.num_sparse};
}

// What of the cache is of use to a sequence that keeps its first `keep` tokens, and then may add
// some.
CacheUse UseAfter(const Sequence& sequence, int64_t keep, bool adds, bool corrects) {
  CacheUse use = UseOf(sequence).UpTo(keep);
  // Without new tokens somebody has to compute what follows the last one.
  if (!adds) return use.UpTo(keep - 1);
  // A correction would be due in the midst of the new tokens; reading them makes it.
  return {corrects ? use.cached - use.num_sparse : use.cached, 0};
}

// The first token whose keys and values will be written.
int64_t FirstWritten(const CacheUse& use, bool corrects) {
  return corrects ? use.cached - use.num_sparse : use.cached;
}

void Keep(Sequence& sequence, int64_t length) {
  sequence.tokens.resize(static_cast<size_t>(length));
  sequence.dense_len = std::min(sequence.dense_len, length);
  sequence.Rewind(length);
}

}  // namespace

Session::Impl::Impl(std::shared_ptr<Decoder::Impl> owner, Sequence empty, int64_t max_len)
    : decoder(std::move(owner)), max_seq_len(max_len), sequence(std::move(empty)) {}

Session::Impl::~Impl() {
  Close();
}

void Session::Impl::Close() {
  auto lock = decoder->EnterToEnd();
  is_closed = true;
  sequence.reset();
}

Sequence& Session::Impl::Idle() {
  TIDAL_CHECK(!is_closed, InvalidArgument, "session: it is closed; start a new one");
  TIDAL_CHECK(sequence.has_value(), InvalidArgument,
              "session: a turn is running; finish it or close it first");
  return *sequence;
}

void Session::Impl::CheckFits(int64_t keep, int64_t num_added, int64_t max_new_tokens) const {
  // Unsigned: max_new_tokens may be as large as int64 holds.
  uint64_t need = static_cast<uint64_t>(keep + num_added) + static_cast<uint64_t>(max_new_tokens);
  TIDAL_CHECK(need <= static_cast<uint64_t>(max_seq_len), CapacityError, "session: ", keep,
              " tokens + ", num_added, " more + max_new_tokens ", max_new_tokens, " need ", need,
              " positions, have max_seq_len ", max_seq_len,
              "; start it with a larger max_seq_len, truncate it, or lower max_new_tokens");
  decoder->scheduler.CheckCapacity("session", keep + num_added, max_new_tokens);
}

void Session::Impl::Extend(int64_t keep, std::span<const int32_t> token_ids) {
  bool corrects = decoder->runner.config().correction_interval > 0;
  auto num_added = static_cast<int64_t>(token_ids.size());
  int64_t length = keep + num_added;
  CacheUse use = UseAfter(*sequence, keep, num_added > 0, corrects);
  sequence->tokens.reserve(static_cast<size_t>(length));  // what may throw comes before any change
  Keep(*sequence, keep);
  kept = keep;
  kept_dense_len = sequence->dense_len;
  sequence->tokens.insert(sequence->tokens.end(), token_ids.begin(), token_ids.end());
  if (num_added > 0) sequence->dense_len = length;
  sequence->Rewind(use.cached);
  sequence->num_sparse = use.num_sparse;
}

void Session::Impl::GoBack(Sequence& used, int64_t length) const {
  bool is_cached = used.cached + 1 >= length;
  Keep(used, length);
  if (length <= kept && is_cached) used.dense_len = std::min(kept_dense_len, length);
  used.pages.Shrink(length);
}

void Session::Impl::TakeBack(int64_t, bool is_read, RequestState& left, SequenceResult& result) {
  Return(std::move(left.sequence), is_read, static_cast<int64_t>(result.token_ids.size()));
}

void Session::Impl::Return(Sequence used, bool is_read, int64_t num_new) {
  if (is_closed) return;
  // More tokens may have been drawn than were handed out.
  GoBack(used, is_read ? turn_len + num_new : kept);
  if (is_read && num_new > 0) used.Rewind(Length(used) - 1);
  used.sampling = decoder->runner.ScratchSampling();
  used.rules.reset();
  sequence.emplace(std::move(used));
}

Session::Session(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() {
  if (impl_->decoder->process.IsForeign()) Leak(impl_);
}

void Session::Close() {
  if (!impl_->decoder->process.IsForeign()) impl_->Close();
}

std::unique_ptr<Generation> Session::Append(const std::vector<int32_t>& token_ids) {
  TIDAL_CHECK(!token_ids.empty(), InvalidArgument,
              "token_ids: got no tokens, expected at least one");
  SamplingParams nothing;
  nothing.max_new_tokens = 0;
  return impl_->Begin(impl_, token_ids, nothing, std::nullopt);
}

std::unique_ptr<Generation> Session::Start(const std::vector<int32_t>& token_ids,
                                           const SamplingParams& params,
                                           std::optional<int64_t> keep) {
  ValidateSamplingParams(params, impl_->decoder->runner.model().vocab_size);
  return impl_->Begin(impl_, token_ids, params, keep);
}

std::unique_ptr<Generation> Session::Impl::Begin(const std::shared_ptr<Impl>& self,
                                                 const std::vector<int32_t>& token_ids,
                                                 const SamplingParams& params,
                                                 std::optional<int64_t> keep) {
  CheckTokenIds(token_ids, decoder->runner.model().vocab_size);
  auto generation = std::make_unique<Generation::Impl>(decoder);
  auto lock = decoder->Enter();  // after it: what throws lets go of the engine first
  Sequence& idle = Idle();
  int64_t num_kept = keep.value_or(Length(idle));
  TIDAL_CHECK(num_kept >= 0 && num_kept <= Length(idle), InvalidArgument, "keep: got ", num_kept,
              ", expected 0 to ", Length(idle));
  TIDAL_CHECK(num_kept > 0 || !token_ids.empty(), InvalidArgument,
              "session: it has no tokens to generate after; append a prompt");
  const auto num_added = static_cast<int64_t>(token_ids.size());
  CheckFits(num_kept, num_added, params.max_new_tokens);
  decoder->StartLoop();  // what may throw comes before any change
  Extend(num_kept, token_ids);
  turn_len = Length(idle);
  idle.id = decoder->sequences.NextId();
  generation->lender = self;
  generation->common.owner = SequenceOwner::kSession;
  generation->SetOptions({});
  Request request = generation->common;
  request.sampling = params;
  Sequence used = std::move(idle);
  sequence.reset();
  if (params.max_new_tokens == 0 && used.cached + 1 >= Length(used)) {  // it has nothing to read
    generation->AddEnded(used, FinishReason::kLength);
    Return(std::move(used), true, 0);
  } else {
    generation->Add(std::move(used), std::move(request));
  }
  decoder->last_call = generation->record;
  return std::unique_ptr<Generation>(new Generation(std::move(generation)));
}

void Session::Truncate(int64_t length) {
  auto lock = impl_->decoder->Enter();
  Sequence& sequence = impl_->Idle();
  TIDAL_CHECK(length >= 0 && length <= Length(sequence), InvalidArgument, "length: got ", length,
              ", expected 0 to ", Length(sequence));
  impl_->GoBack(sequence, length);
}

std::unique_ptr<Session> Session::Fork() const {
  const std::shared_ptr<Decoder::Impl>& decoder = impl_->decoder;
  auto lock = decoder->Enter();
  auto fork =
      std::make_shared<Impl>(decoder, decoder->sequences.Fork(impl_->Idle()), impl_->max_seq_len);
  return std::unique_ptr<Session>(new Session(std::move(fork)));
}

std::vector<int32_t> Session::token_ids() const {
  auto lock = impl_->decoder->Enter();
  return impl_->Idle().tokens;
}

int64_t Session::num_cached() const {
  auto lock = impl_->decoder->Enter();
  return impl_->Idle().cached;
}

int64_t Session::MostTokens(int64_t keep, bool adds) const {
  auto lock = impl_->decoder->Enter();
  const Sequence& sequence = impl_->Idle();
  TIDAL_CHECK(keep >= 0 && keep <= Length(sequence), InvalidArgument, "keep: got ", keep,
              ", expected 0 to ", Length(sequence));
  ModelRunner& runner = impl_->decoder->runner;
  bool corrects = runner.config().correction_interval > 0;
  int64_t kept = adds ? keep : std::max<int64_t>(keep, 1);
  CacheUse use = UseAfter(sequence, kept, adds, corrects);
  int64_t num_pages = runner.pool().PagesFor(impl_->max_seq_len);
  while (true) {
    // A page less is at most one less that is missing.
    int64_t missing = sequence.pages.NumMissing(num_pages * runner.config().page_size,
                                                FirstWritten(use, corrects), use.cached);
    if (missing <= runner.pool().num_free()) break;
    num_pages -= missing - runner.pool().num_free();
  }
  return std::min(impl_->max_seq_len, num_pages * runner.config().page_size);
}

int64_t Session::max_seq_len() const {
  return impl_->max_seq_len;
}

}  // namespace tidal
