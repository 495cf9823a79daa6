#include "engine/verified_round.h"

#include <algorithm>
#include <span>

namespace tidal {
namespace {

// Appends up to num_drafts tokens to each sequence, in steps of all rows that still draft.
void Draft(ModelRunner& runner, std::vector<DraftRow>& rows) {
  for (int64_t step = 0;; ++step) {
    std::vector<DraftRow*> drafting;
    Batch batch = {.rows = {}, .plan = PlanId::kDecoder};
    for (DraftRow& row : rows) {
      if (step >= row.num_drafts) continue;
      drafting.push_back(&row);
      batch.rows.push_back({.sequence = row.sequence});
    }
    if (drafting.empty()) return;
    const Drawn drawn = runner.Run(batch);
    for (size_t i = 0; i < drafting.size(); ++i) {
      const int32_t token = drawn.tokens[i][0];
      if (token >= 0) {
        drafting[i]->sequence->tokens.push_back(token);
      } else {
        drafting[i]->num_drafts = step;  // unusable logits: that is all
      }
    }
  }
}

// For each row, what dense decoding draws after the token it began with and after its drafts.
std::vector<std::vector<int32_t>> DrawDensely(ModelRunner& runner, std::span<DraftRow> rows) {
  Batch batch;
  for (const DraftRow& row : rows) {
    row.sequence->Rewind(row.begin);
    const int64_t count = static_cast<int64_t>(row.sequence->tokens.size()) - row.begin;
    batch.rows.push_back({.sequence = row.sequence, .num_tokens = count, .num_draws = count});
  }
  return runner.Run(batch).tokens;
}

// A NaN in the V of a draft reaches the tokens before it, as 0 x NaN, which without drafts have
// usable logits. So a row with unusable ones is drawn again, alone and without.
void DropSpoiledDrafts(ModelRunner& runner, DraftRow& row, std::vector<int32_t>& draws) {
  bool is_spoiled = std::find(draws.begin(), draws.end(), -1) != draws.end();
  if (!is_spoiled || row.num_drafts == 0) return;
  row.num_drafts = 0;
  row.sequence->tokens.resize(static_cast<size_t>(row.begin + 1));
  draws = DrawDensely(runner, {&row, 1})[0];
}

void Keep(const std::vector<int32_t>& draws, DraftRow& row) {
  Sequence& sequence = *row.sequence;
  auto first = sequence.tokens.begin() + row.begin + 1;
  auto num_kept = std::mismatch(first, sequence.tokens.end(), draws.begin()).first - first;
  row.tokens.assign(draws.begin(), draws.begin() + num_kept + 1);
  sequence.tokens.erase(first + num_kept, sequence.tokens.end());
  sequence.Rewind(row.begin + 1 + num_kept);
  if (row.tokens.back() >= 0) sequence.tokens.push_back(row.tokens.back());
}

}  // namespace

void RunVerifiedRound(ModelRunner& runner, std::vector<DraftRow>& rows) {
  for (DraftRow& row : rows) row.begin = row.sequence->cached;
  Draft(runner, rows);
  std::vector<std::vector<int32_t>> draws = DrawDensely(runner, rows);
  for (size_t i = 0; i < rows.size(); ++i) {
    DropSpoiledDrafts(runner, rows[i], draws[i]);
    Keep(draws[i], rows[i]);
  }
}

int64_t NextDraftTokens(const DraftRow& row) {
  int64_t next = row.num_kept() == row.num_drafts ? row.num_drafts + 1 : row.num_kept();
  return std::clamp<int64_t>(next, 1, kMaxAutomaticDrafts);
}

}  // namespace tidal
