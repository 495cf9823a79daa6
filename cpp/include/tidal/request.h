// What a call may ask for beside its prompts, and what it gives for each of them, token by token
// and at its end. Plain values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tidal/config.h"

namespace tidal {

struct CallOptions {
  // What its steps go through; none is the decoder's plan, one without layers that choose is dense.
  // Takes memory for its sets where the decoder has no equal plan, as long as the call lives.
  std::optional<PlanConfig> plan{};
  std::optional<bool> verify{};  // as DecodeConfig::verify; none is the decoder's
  int32_t priority = 0;          // calls with lower ones go first
  // Log-probabilities of new tokens, and of the tokens of the prompts, each with those of so many
  // of the most likely, 0 to kMaxLogprobs; nothing: none. A prompt that is scored is read whole.
  std::optional<int64_t> logprobs{};
  std::optional<int64_t> prompt_logprobs{};
  std::string cache_salt{};  // only calls with the same one find each other's prompts
  // A sequence goes on only while fewer new tokens than these wait to be read; 0: any number may.
  int64_t max_unread = 0;
};

enum class RequestStatus : int32_t { kQueued, kReading, kDecoding, kPaused, kFinished };

enum class FinishReason : int32_t {
  kNone,    // still running
  kStop,    // a stop token, or Generation::Stop
  kLength,  // max_new_tokens reached
  kAbort,   // cancelled
  kError,   // unusable logits (NaN, or all -inf), a pass that failed, or no room
};

// What verified decoding did for a sequence.
struct Verification {
  int64_t drafted_tokens = 0;   // that were checked
  int64_t ngram_tokens = 0;     // of those, drafted from the text, without a step
  int64_t accepted_tokens = 0;  // of drafted_tokens, kept
  int64_t dense_passes = 0;  // each checked drafts, or was a dense step; each drew one token more
};

// What the model held of a token: by the softmax of its logits as they came, before penalties,
// biases, bans and temperature.
struct TokenLogprobs {
  float logprob = 0.0f;
  int32_t rank = 0;                 // 1: the most likely token, or the first of equals
  std::vector<int32_t> top_ids;     // of as many as were asked for, the most likely first
  std::vector<float> top_logprobs;  // theirs
};

// Sets of chosen positions, one a set of heads, choosing layer and step.
struct ChosenSets {
  int64_t num_sets = 0;
  int64_t num_positions = 0;  // in all of them
};

struct SequenceResult {
  std::vector<int32_t> token_ids;  // generated ids; a stop token is the last one
  FinishReason finish_reason = FinishReason::kNone;
  std::string error;                             // non-empty iff finish_reason is kError
  int64_t prompt_tokens = 0;                     // of a session's turn: all tokens it follows
  int64_t cached_tokens = 0;                     // of those, in the cache before the call
  double queue_s = 0.0;                          // from the start of the call until it was begun
  double time_to_first_token_s = 0.0;            // from the start of the call
  double decode_s = 0.0;                         // from the first to the last token
  Verification verification{};                   // zeros unless it was verified
  std::vector<TokenLogprobs> logprobs{};         // of each of token_ids
  std::vector<TokenLogprobs> prompt_logprobs{};  // of each token of the prompt but the first
  bool has_logprobs = false;                     // they were asked for
  bool has_prompt_logprobs = false;
  ChosenSets sets{};  // of its sparse steps, if they were counted: Replay

  // Those of its tokens from index `first` on, >= 0.
  std::vector<TokenLogprobs> LogprobsFrom(int64_t first) const {
    const auto count = static_cast<int64_t>(logprobs.size());
    return {logprobs.begin() + std::min(first, count), logprobs.end()};
  }
};

// A new token of a sequence.
struct TokenEvent {
  int64_t sequence = 0;  // index into the prompts of the call
  int32_t token_id = 0;
  std::optional<TokenLogprobs> logprobs{};  // if they were asked for
};

struct PrefillProgress {
  int64_t tokens_done = 0;
  int64_t tokens_total = 0;  // over all prompts of the call; without what a session had cached
};

// What a decoder is at, and what it has done since it began.
struct DecoderStats {
  int64_t num_waiting = 0;  // requests that have not begun
  int64_t num_reading = 0;
  int64_t num_decoding = 0;
  int64_t num_paused = 0;     // they gave their pages to others, and go on when there is room
  int64_t num_unread = 0;     // of those that decode: they wait for their reader
  int64_t pages_free = 0;     // these three are all pages
  int64_t pages_held = 0;     // that belong to requests and sessions
  int64_t pages_on_host = 0;  // in host memory: of requests that are paused
  int64_t pages_cached = 0;   // that the prefix cache knows and nobody owns: room as well
  // Since the start:
  int64_t num_chunks = 0;       // passes that read prompts, corrected or checked drafts
  int64_t num_checks = 0;       // of those: they checked drafts
  int64_t num_steps = 0;        // passes that decoded a token of each row
  int64_t num_dense_steps = 0;  // of those: nobody attended to chosen positions
  int64_t pass_tokens = 0;      // of all rows of all passes
  double chunk_s = 0.0;         // that those passes took
  double check_s = 0.0;         // of chunk_s
  double step_s = 0.0;
  double dense_step_s = 0.0;  // of step_s
  double gap_s = 0.0;         // from the end of a pass to the beginning of the next
  int64_t num_pauses = 0;
  int64_t num_finished = 0;
  int64_t read_tokens = 0;    // of prompts, by passes
  int64_t cached_tokens = 0;  // of prompts, found in the prefix cache
  int64_t generated_tokens = 0;
};

// The positions one choosing layer (S or P) chose for one sequence in its last sparse step.
struct LayerSelection {
  int64_t layer = 0;
  int64_t num_sets = 0;      // KV heads, query heads or 1, by granularity
  int64_t num_selected = 0;  // of the largest set
  // [num_sets, num_selected], ascending per set; -1 past the end of a smaller one (top_p_mass).
  std::vector<int32_t> token_idx;
};

}  // namespace tidal
