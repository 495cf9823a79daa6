// Batch: what goes through the model next, as a value. The only thing that passes between who
// decides (engine/) and who computes (ModelRunner).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kv/sequence.h"
#include "tidal/plan.h"
#include "tidal/request.h"

namespace tidal {

// One sequence's share of a pass.
struct BatchRow {
  Sequence* sequence = nullptr;
  int64_t num_tokens = 1;  // its next uncached tokens, which the pass caches; >= 1
  int64_t num_draws = 1;   // successors to draw: of the last so many of those tokens
  int64_t num_logits = 0;  // logits to write: after the last so many of those tokens
  // Log-probabilities to return of its draws, and beside each those of so many of the most likely
  // tokens, 0 to kMaxLogprobs; nothing: none.
  std::optional<int64_t> num_logprobs{};
  // With num_logprobs: the same of tokens that the sequence has already, each after the one before
  // it: after the last so many of those tokens that another one follows.
  int64_t num_scored = 0;
  // [num_draws, NumMaskWords(vocab_size)]: what each draw may give, beside what the sequence's
  // parameters say; empty: anything.
  std::vector<uint32_t> allowed{};
  float* logits = nullptr;   // [num_logits, vocab_size]: where they go
  bool counts_sets = false;  // the sizes of its sets are wanted
};

// Returns how many of the row's tokens another one of its sequence follows.
int64_t NumFollowed(const BatchRow& row);

// The rows of one pass, each sequence at most once. If every row has one token and one draw the
// pass is a decode step through the plan; any other reads its tokens densely, so its plan must be
// the dense one.
struct Batch {
  std::vector<BatchRow> rows;
  PlanId plan = PlanId::kDense;
  // Whether it reads prompts, or once more what a sequence had before, and nothing else.
  bool is_reading = false;
  // Whole pages to copy before anything else, in this order: from the cache to host pages, from
  // host pages to the cache, within the cache. A batch without rows may have some.
  std::vector<PageCopy> saves{};
  std::vector<PageCopy> restores{};
  std::vector<PageCopy> copies{};

  bool is_step() const;
};

// What a pass gives, by row of its batch.
struct Drawn {
  std::vector<std::vector<int32_t>> tokens;            // [num_draws] each; -1: unusable logits
  std::vector<std::vector<TokenLogprobs>> logprobs{};  // [num_draws] each, if they were wanted
  std::vector<std::vector<TokenLogprobs>> scored{};    // [num_scored] each
  // Sets of the rows that count them, in a step in which they attended to chosen positions.
  std::vector<ChosenSets> sets{};
};

// Throws InvalidArgument, naming the row or the sequence, unless the batch is as BatchRow and Batch
// say.
void CheckBatch(const Batch& batch);

// "plan 1: 17 +1 draw 1, 0 +512": each row's cached tokens, and what it asks for.
std::string ToString(const Batch& batch);

}  // namespace tidal
