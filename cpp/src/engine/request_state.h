// RequestState: one request from its arrival to its end: what was asked, where it stands, and the
// rules by which drawn tokens are kept and end it. Values only.
//
//   kQueued -> kReading -> kDecoding -> kFinished
//              kReading or kDecoding -> kPaused -> kReading
//              any of them -> kFinished
//
// A request owns a row and pages while it reads and decodes.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/guidance.h"
#include "engine/ngram_index.h"
#include "kv/sequence.h"
#include "tidal/config.h"
#include "tidal/decoder.h"
#include "tidal/plan.h"

namespace tidal {

using RequestId = uint64_t;  // ascending in order of arrival

// How the tokens of a request come about.
struct DecodePolicy {
  PlanId plan = PlanId::kDense;
  // Sequences of at most this many tokens are decoded densely; of no meaning for a dense plan.
  int64_t dense_len = 0;
  // Every so many tokens that were decoded sparsely their K and V are read again; 0: never.
  int64_t correction_interval = 0;
  // Whether tokens are drafted first, and a dense pass decides. Then there are no corrections.
  bool verifies = false;
  Drafts drafts = Drafts::kTidal;
  int64_t draft_tokens = 0;  // per round; 0: by how many were kept
};

// Whose the sequence of a request is.
enum class SequenceOwner : int32_t {
  // Its own. Pages come as tokens do, may be taken away for others, and go back when it ends.
  kRequest,
  // A session's. The request is let in with pages for all tokens that it may reach, which are never
  // taken from it, and has them when it ends.
  kSession,
  // A replay's, as a session's, or of a request that is scored. Nobody finds again what it caches,
  // and it tells its end only, not its tokens.
  kReplay,
};

// Tokens that are given and judged, not drawn. They are read by themselves and in whole chunks, so
// that logits do not depend on who else reads.
struct Scoring {
  std::vector<int32_t> forced{};  // they follow the prompt, max_new_tokens of them, a step each
  // The logits after the last so many tokens are wanted, >= 1, forced ones included.
  int64_t num_logits = 0;
  std::shared_ptr<std::vector<float>> logits{};  // [num_logits, vocab_size]: where they go
};

struct Request {
  // Without new tokens (max_new_tokens 0) all tokens but the last are read, and that is all.
  SamplingParams sampling;
  DecodePolicy decoding;
  SequenceOwner owner = SequenceOwner::kRequest;
  std::optional<Scoring> scoring{};
  // Another, of the same replay, that it waits for: it reads the tokens that the sequence comes
  // with.
  std::optional<uint64_t> reads_behind{};
  bool counts_sets = false;  // the sizes of its steps' sets are wanted
  // Log-probabilities of new tokens, and of the prompt's, with those of so many of the most likely.
  std::optional<int64_t> logprobs{};
  std::optional<int64_t> prompt_logprobs{};
  int32_t priority = 0;  // lower ones go first
  // It goes on only while fewer new tokens than these wait to be heard; 0: any number may.
  int64_t max_unread = 0;
  // Only requests with the same salt find each other's prompts.
  std::string cache_salt;
};

// Why a request ended with FinishReason::kError.
enum class RequestFailure : int32_t {
  kNone,
  kUnusableLogits,  // a NaN or infinity, or nothing above -inf
  kPassFailed,      // the device, or memory, while it was in a pass
  kNoRoom,          // nothing runs, and sequences outside of the scheduler own the pages it needs
  kGuide,           // its guide does not go on
};

// Pages, when there was no room.
struct PageShortage {
  int64_t missing = 0;  // to the request
  int64_t free = 0;
  int64_t total = 0;
};

// Tokens that were drafted, until a dense pass has decided on them and on the one behind them.
struct DraftRound {
  int64_t begin = 0;       // cached tokens before it; the draft of index i is token begin + 1 + i
  int64_t num_drafts = 0;  // to draft
  int64_t num_drafted = 0;
  bool is_ngram = false;  // its drafts come from the text, else from sparse steps

  bool is_drafting() const { return num_drafted < num_drafts; }
};

class RequestState {
 public:
  RequestState(RequestId id, Request request, Sequence sequence, double now_ms);

  int64_t num_tokens() const { return static_cast<int64_t>(sequence.tokens.size()); }
  bool is_waiting() const {
    return status == RequestStatus::kQueued || status == RequestStatus::kPaused;
  }
  bool is_running() const {
    return status == RequestStatus::kReading || status == RequestStatus::kDecoding;
  }
  // Tokens that are to be cached, densely, before the next one is drawn. The last token of a prompt
  // is among them; one that was generated is cached by a step.
  int64_t read_to() const;
  int64_t num_unread() const { return read_to() - sequence.cached; }
  // Tokens that have been generated, without unchecked drafts.
  int64_t num_new() const { return num_tokens() - num_given_ - num_unchecked(); }
  int64_t num_unchecked() const { return round ? round->num_drafted : 0; }
  // Those tokens, and the drafts behind them.
  std::span<const int32_t> generated() const {
    return std::span(sequence.tokens).subspan(static_cast<size_t>(num_given_));
  }
  // Whether its next draw has to wait for its guide.
  bool LacksMask() const { return guidance && !guidance->HasMask(num_unchecked()); }
  // Returns what its guide allows in `count` draws, of which the first follows so many drafts;
  // empty if it has no guide.
  std::vector<uint32_t> Masks(int64_t num_drafts, int64_t count) const;
  // The most tokens it may ever have.
  int64_t max_tokens() const;
  // The first token whose K and V it may write, before it has begun.
  int64_t first_written() const;
  // The first token whose page must be its own if it writes from `first` on. Those that prompts of
  // a replay share are written by one of them, for all.
  int64_t first_owned(int64_t first) const {
    return request.owner == SequenceOwner::kReplay ? max_tokens() : first;
  }
  // Whether its next step attends to chosen positions.
  bool is_sparse() const;
  // Whether it reads again what it decoded; its drafts are never in need of that.
  bool is_correcting() const {
    return status == RequestStatus::kDecoding && !round && num_unread() > 0;
  }
  bool keeps_pages() const { return request.owner != SequenceOwner::kRequest; }
  bool reads_prefixes() const;
  // Whether something is wanted after its last token.
  bool goes_on() const { return request.sampling.max_new_tokens > 0 || request.scoring; }
  // Whether so much of it is unread that it does not go on.
  bool AwaitsReader() const {
    return request.max_unread > 0 && num_new() - num_heard >= request.max_unread;
  }
  bool HasPriorityOver(const RequestState& other) const;

  // Whether what was decoded sparsely is to be read again before the next step.
  bool OwesCorrection() const;
  // Begins to, unless tokens that a session may be left with would be read again: whoever stops a
  // turn keeps the tokens that he has heard of, as they were then.
  void MaybeCorrect();
  // Each begins a round of at most `most` drafts, if there is none and it has any to make: all of
  // them, from the text; or by sparse steps that are still to come.
  void MaybeDraftFromText(int64_t most);
  void MaybeDraftBySteps(int64_t most);
  // Begins a round without drafts, for its next token to be decided in the pass that checks those
  // of others, if there is none and it would take a dense step.
  void MaybeJoinCheck();
  // Forgets the drafts that have not been checked, all of them.
  void DropDrafts();
  // Forgets the newest draft. Without any left, the next token is decided by a step.
  void DropLastDraft();

  // A pass has cached tokens up to `end`, from `begin` on; `is_clean`: as reading them does. Says
  // so once more if the runner has.
  void MarkCached(int64_t begin, int64_t end, bool is_clean);

  // Takes a token that follows the newest one, or -1 for unusable logits; of what is scored it is
  // the forced one. Returns whether the request has ended by it; then finish_reason or ends_as says
  // how.
  bool Accept(int32_t token);
  // A draft, of a sparse step -1 for unusable logits.
  void AddDraft(int32_t token);
  // Takes what its guide has answered, and forgets drafts that it forbids.
  void TakeAnswer(GuideAnswer answer);
  // Compares the drafts with what dense decoding drew, and forgets those that differ and all behind
  // them. Returns the draws that count, of which the drafts kept are the first: none if NaNs in the
  // drafts' values spoilt the pass, so that a step without drafts must decide.
  std::span<const int32_t> Check(std::span<const int32_t> draws);

  // Says why it failed; empty if it did not.
  std::string ErrorText() const;

  RequestId id;
  Request request;
  Sequence sequence;
  std::string salt;  // of the prefix cache: the request's, and the rotary frequencies
  RequestStatus status = RequestStatus::kQueued;
  FinishReason finish_reason = FinishReason::kNone;
  RequestFailure failure = RequestFailure::kNone;
  PageShortage shortage{};  // of kNoRoom
  Verification verification{};
  double arrived_ms;
  double begun_ms = 0.0;        // when its prompt began to be read
  double first_token_ms = 0.0;  // once there is one
  double finished_ms = 0.0;
  int64_t cached_tokens = 0;  // of the prompt, in the cache when it began to read
  int64_t known_tokens = 0;   // cached, or likely to be found when it begins to read
  // What was in the cache when it was paused, in host memory.
  struct OnHost {
    std::vector<int32_t> pages;  // host pages of its cached tokens
    int64_t cached = 0;
    int64_t num_sparse = 0;
    int64_t clean_len = 0;
  };
  std::optional<OnHost> on_host{};
  // Another that came before and whose prompt begins with the same whole pages, and how many tokens
  // those are: once they are read, both have them.
  std::optional<RequestId> follows{};
  int64_t followed_tokens = 0;
  int64_t reserve_tokens = 0;  // it was let in with room for so many
  int64_t num_scored = 0;      // tokens whose log-probabilities have been given, if they are wanted
  int32_t last_draw = -1;      // what would follow the last token of what was scored; -1: unusable
  int64_t num_heard = 0;       // tokens generated that whoever asked has been given
  int64_t num_overtaken = 0;   // times a later one was let in because this one did not fit
  int64_t num_pauses = 0;
  uint64_t last_turn = 0;  // the decode turn that it last took part in
  bool is_in_flight = false;
  FinishReason ends_as = FinishReason::kNone;  // after the pass in flight: it was cancelled
  std::optional<DraftRound> round;
  std::optional<Guidance> guidance;  // if it is guided
  std::optional<NgramIndex> ngrams;  // while it runs, if it drafts from the text

 private:
  bool AcceptForced(int32_t draw);
  bool IsStop(int32_t token) const;
  int64_t MostDrafts(int64_t tokens_to_try, int64_t most) const;

  int64_t num_given_;       // tokens of the prompt, or of a session so far
  int64_t draft_tokens_;    // to try next by sparse steps
  int64_t ngram_tokens_;    // to try next from the text
  bool must_step_ = false;  // drafts would be of no use: no draft until there is a new token
};

// How many tokens to draft after a round that kept so many: one more if all were kept, else as many
// as were; from the text, where a draft takes no step, twice as many as were. The number follows
// the text, without a model of what a pass costs.
int64_t NextDraftTokens(const DraftRound& round, int64_t num_kept);

}  // namespace tidal
