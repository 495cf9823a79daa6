#include "engine/request_state.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/checked.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// Before anything is known about how many drafts are kept.
constexpr int64_t kFirstDraftTokens = 4;

// The settings that may leave no token to draw.
constexpr char kForbidding[] =
    "allowed_token_ids, suppress_tokens, bad_words, min_new_tokens, no_repeat_ngram_size";

// Bytes that K and V depend on beside the tokens. The frequencies are of one length in a decoder,
// so no two pairs give the same bytes.
std::string SaltOf(const Request& request, const Sequence& sequence) {
  std::string salt = request.cache_salt;
  salt.append(reinterpret_cast<const char*>(sequence.inv_freq.data()),
              sequence.inv_freq.size() * sizeof(float));
  return salt;
}

}  // namespace

RequestState::RequestState(RequestId new_id, Request asked, Sequence given, double now_ms)
    : id(new_id),
      request(std::move(asked)),
      sequence(std::move(given)),
      salt(SaltOf(request, sequence)),
      arrived_ms(now_ms),
      cached_tokens(sequence.cached),
      known_tokens(sequence.cached),
      num_given_(num_tokens()),
      draft_tokens_(request.decoding.draft_tokens == 0 ? kFirstDraftTokens
                                                       : request.decoding.draft_tokens),
      ngram_tokens_(draft_tokens_) {
  if (request.sampling.guide != 0) guidance.emplace();
  if (request.reads_behind) {
    follows = request.reads_behind;
    followed_tokens = std::numeric_limits<int64_t>::max();  // until it has read everything
  }
}

int64_t RequestState::read_to() const {
  bool draws_at_end = goes_on() && sequence.dense_len == num_tokens();
  return draws_at_end ? num_tokens() : num_tokens() - 1;
}

int64_t RequestState::max_tokens() const {
  return Sum({num_given_, request.sampling.max_new_tokens});
}

int64_t RequestState::first_written() const {
  bool corrects = request.decoding.correction_interval > 0;
  return sequence.cached - (corrects ? sequence.num_sparse : 0);
}

std::vector<uint32_t> RequestState::Masks(int64_t num_drafts, int64_t count) const {
  return guidance ? guidance->Masks(num_drafts, count) : std::vector<uint32_t>{};
}

bool RequestState::is_sparse() const {
  return request.decoding.plan != PlanId::kDense &&
         sequence.cached + 1 > request.decoding.dense_len;
}

bool RequestState::reads_prefixes() const {
  return !keeps_pages() && !request.prompt_logprobs && sequence.cached == 0;
}

bool RequestState::HasPriorityOver(const RequestState& other) const {
  return std::pair(request.priority, id) < std::pair(other.request.priority, other.id);
}

bool RequestState::OwesCorrection() const {
  const DecodePolicy& policy = request.decoding;
  if (policy.verifies || policy.correction_interval == 0 || is_correcting()) return false;
  return sequence.num_sparse >= policy.correction_interval;
}

void RequestState::MaybeCorrect() {
  const bool is_heard = request.owner != SequenceOwner::kSession || num_heard >= num_new();
  if (!OwesCorrection() || !is_heard) return;
  sequence.cached -= sequence.num_sparse;
  sequence.num_sparse = 0;
}

// How many of the tokens to try a new round may have, 0: there can be none.
int64_t RequestState::MostDrafts(int64_t tokens_to_try, int64_t most) const {
  if (!request.decoding.verifies || round || must_step_) return 0;
  // The pass that checks draws one token more.
  int64_t room = request.sampling.max_new_tokens - num_new() - 1;
  return std::min({tokens_to_try, room, most});
}

void RequestState::MaybeDraftFromText(int64_t most) {
  if (request.decoding.drafts == Drafts::kTidal) return;
  int64_t num_drafts = MostDrafts(ngram_tokens_, most);
  if (num_drafts <= 0) return;
  if (!ngrams) ngrams.emplace();
  std::optional<int64_t> next = ngrams->Find(sequence.tokens);
  if (!next) return;
  const std::span<const int32_t> first(&sequence.tokens[static_cast<size_t>(*next)], 1);
  if (guidance && guidance->NumAllowed(first) == 0) return;
  round = DraftRound{.begin = sequence.cached, .num_drafts = num_drafts, .is_ngram = true};
  // Text that repeats itself is copied on into the drafts.
  while (round->is_drafting()) AddDraft(sequence.tokens[static_cast<size_t>((*next)++)]);
}

void RequestState::MaybeDraftBySteps(int64_t most) {
  if (request.decoding.drafts == Drafts::kNgram || !is_sparse()) return;
  int64_t num_drafts = MostDrafts(draft_tokens_, most);
  if (num_drafts > 0) round = DraftRound{.begin = sequence.cached, .num_drafts = num_drafts};
}

void RequestState::MaybeJoinCheck() {
  if (!request.decoding.verifies || round || must_step_) return;
  round = DraftRound{.begin = sequence.cached};
}

void RequestState::DropDrafts() {
  if (!round) return;
  sequence.tokens.resize(static_cast<size_t>(round->begin + 1));
  sequence.cached = round->begin;
  round.reset();
}

void RequestState::DropLastDraft() {
  if (round->num_drafted <= 1) {
    must_step_ = true;
    return DropDrafts();
  }
  sequence.tokens.pop_back();
  round->num_drafts = --round->num_drafted;
}

void RequestState::MarkCached(int64_t begin, int64_t end, bool is_clean) {
  sequence.cached = end;
  if (!is_clean) {
    sequence.clean_len = std::min(sequence.clean_len, begin);
  } else if (sequence.clean_len >= begin) {
    sequence.clean_len = std::max(sequence.clean_len, end);
  }
}

bool RequestState::Accept(int32_t token) {
  if (request.scoring) return AcceptForced(token);
  if (token < 0 && guidance && guidance->is_complete()) {
    ends_as = FinishReason::kStop;  // what could end the text is not allowed by other settings
    return true;
  }
  if (token < 0) {
    finish_reason = FinishReason::kError;
    failure = RequestFailure::kUnusableLogits;
    return true;
  }
  must_step_ = false;
  sequence.tokens.push_back(token);
  if (IsStop(token)) {
    finish_reason = FinishReason::kStop;
  } else if (num_new() >= request.sampling.max_new_tokens) {
    finish_reason = FinishReason::kLength;
  }
  return finish_reason != FinishReason::kNone;
}

bool RequestState::IsStop(int32_t token) const {
  const std::vector<int32_t>& stops = request.sampling.stop_token_ids;
  return std::find(stops.begin(), stops.end(), token) != stops.end();
}

// Goes on with the next forced token; behind the last one there are no logits to wait for.
bool RequestState::AcceptForced(int32_t draw) {
  const std::vector<int32_t>& forced = request.scoring->forced;
  const auto index = static_cast<size_t>(num_new());
  last_draw = draw;
  if (index == forced.size()) {
    ends_as = FinishReason::kLength;
    return true;
  }
  sequence.tokens.push_back(forced[index]);
  return false;
}

void RequestState::AddDraft(int32_t token) {
  if (token >= 0) {
    sequence.tokens.push_back(token);
    ++round->num_drafted;
    if (IsStop(token)) round->num_drafts = round->num_drafted;  // nothing comes behind it
    return;
  }
  round->num_drafts = round->num_drafted;
  if (round->num_drafted > 0) return;
  DropDrafts();
  must_step_ = true;
}

void RequestState::TakeAnswer(GuideAnswer answer) {
  guidance->Take(std::move(answer));
  if (!round || !round->is_ngram) return;  // steps draft by the masks
  const auto drafts = generated().last(static_cast<size_t>(num_unchecked()));
  const int64_t num_allowed = guidance->NumAllowed(drafts);
  while (num_unchecked() > num_allowed) DropLastDraft();
}

std::span<const int32_t> RequestState::Check(std::span<const int32_t> draws) {
  DraftRound checked = *round;
  auto first = sequence.tokens.begin() + checked.begin + 1;
  auto num_kept =
      std::mismatch(first, sequence.tokens.end(), draws.begin(), draws.end()).first - first;
  DropDrafts();
  // A NaN in the V of a draft reaches the tokens before it, as 0 x NaN, which without drafts have
  // usable logits.
  if (std::find(draws.begin(), draws.end(), -1) != draws.end()) {
    must_step_ = true;
    return {};
  }
  verification.drafted_tokens += checked.num_drafted;
  if (checked.is_ngram) verification.ngram_tokens += checked.num_drafted;
  verification.accepted_tokens += num_kept;
  ++verification.dense_passes;
  if (request.decoding.draft_tokens == 0 && checked.num_drafted > 0) {
    (checked.is_ngram ? ngram_tokens_ : draft_tokens_) = NextDraftTokens(checked, num_kept);
  }
  return draws.first(static_cast<size_t>(num_kept) + 1);
}

std::string RequestState::ErrorText() const {
  switch (failure) {
    case RequestFailure::kNone:
      return {};
    case RequestFailure::kUnusableLogits:
      if (guidance) {
        return Concat("guide: of the tokens that it allows after ", num_new(), " new ones, other ",
                      "settings (", kForbidding, ") leave none, or the logits are not finite; ",
                      "change one of them");
      }
      return Concat("the logits after token ", num_tokens() - 1,
                    " hold a NaN or infinity, or nothing above -inf; expected finite values; ",
                    sequence.rules
                        ? Concat("change settings that forbid tokens (", kForbidding, "), ")
                        : std::string(),
                    "check the weights, or try dtype float32");
    case RequestFailure::kPassFailed:
      return "the pass through the model that this request was part of failed; send it again, or "
             "look for the error of the device that came before";
    case RequestFailure::kNoRoom:
      return Concat("KV cache: a request of ", num_tokens(), " tokens needs ", shortage.missing,
                    " pages, have ", shortage.free, " free of ", shortage.total,
                    ", and nothing runs that would give some back; close sessions, raise ",
                    "num_pages, or lower max_new_tokens");
    case RequestFailure::kGuide:
      return guidance->error();
  }
  return {};
}

int64_t NextDraftTokens(const DraftRound& round, int64_t num_kept) {
  int64_t next = num_kept == round.num_drafted ? num_kept + 1 : num_kept;
  if (round.is_ngram) next = 2 * num_kept;
  return std::clamp<int64_t>(next, 1, kMaxAutomaticDrafts);
}

}  // namespace tidal
