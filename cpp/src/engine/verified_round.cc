#include "engine/verified_round.h"

#include <algorithm>
#include <span>

namespace tidal {
namespace {

// Appends up to num_drafts tokens to each sequence, in steps of all rows that still draft.
void Draft(Engine& engine, std::vector<DraftRow>& rows) {
  for (int64_t step = 0;; ++step) {
    std::vector<DraftRow*> drafting;
    std::vector<Sequence*> sequences;
    for (DraftRow& row : rows) {
      if (step >= row.num_drafts) continue;
      drafting.push_back(&row);
      sequences.push_back(row.sequence);
    }
    if (drafting.empty()) return;
    std::vector<int32_t> next = engine.Step(sequences);
    for (size_t i = 0; i < next.size(); ++i) {
      if (next[i] >= 0) {
        drafting[i]->sequence->tokens.push_back(next[i]);
      } else {
        drafting[i]->num_drafts = step;  // unusable logits: that is all
      }
    }
  }
}

// For each row, what dense decoding draws after the token it began with and after its drafts.
std::vector<std::vector<int32_t>> DrawDensely(Engine& engine, std::span<DraftRow> rows) {
  std::vector<Sequence*> sequences;
  bool any_drafts = false;
  for (const DraftRow& row : rows) {
    row.sequence->cached = row.begin;
    engine.MarkSeen(*row.sequence, row.begin + 1);  // and not the drafts
    sequences.push_back(row.sequence);
    any_drafts = any_drafts || row.num_drafts > 0;
  }
  if (any_drafts) return engine.Verify(sequences);
  std::vector<std::vector<int32_t>> draws;
  for (int32_t token : engine.Step(sequences, StepPlan::kDense)) draws.push_back({token});
  return draws;
}

// A NaN in the V of a draft reaches the tokens before it, as 0 x NaN, which without drafts have
// usable logits. So a row with unusable ones is drawn again, alone and without.
void DropSpoiledDrafts(Engine& engine, DraftRow& row, std::vector<int32_t>& draws) {
  bool is_spoiled = std::find(draws.begin(), draws.end(), -1) != draws.end();
  if (!is_spoiled || row.num_drafts == 0) return;
  row.num_drafts = 0;
  row.sequence->tokens.resize(static_cast<size_t>(row.begin + 1));
  draws = DrawDensely(engine, {&row, 1})[0];
}

void Keep(Engine& engine, const std::vector<int32_t>& draws, DraftRow& row) {
  Sequence& sequence = *row.sequence;
  auto first = sequence.tokens.begin() + row.begin + 1;
  auto num_kept = std::mismatch(first, sequence.tokens.end(), draws.begin()).first - first;
  row.tokens.assign(draws.begin(), draws.begin() + num_kept + 1);
  sequence.tokens.erase(first + num_kept, sequence.tokens.end());
  sequence.cached = row.begin + 1 + num_kept;
  if (row.tokens.back() >= 0) sequence.tokens.push_back(row.tokens.back());
  // The draws after it were marked as well.
  if (num_kept < row.num_drafts) {
    engine.MarkSeen(sequence, static_cast<int64_t>(sequence.tokens.size()));
  }
}

}  // namespace

void RunVerifiedRound(Engine& engine, std::vector<DraftRow>& rows) {
  for (DraftRow& row : rows) row.begin = row.sequence->cached;
  Draft(engine, rows);
  std::vector<std::vector<int32_t>> draws = DrawDensely(engine, rows);
  for (size_t i = 0; i < rows.size(); ++i) {
    DropSpoiledDrafts(engine, rows[i], draws[i]);
    Keep(engine, draws[i], rows[i]);
  }
}

int64_t NextDraftTokens(const DraftRow& row) {
  int64_t next = row.num_kept() == row.num_drafts ? row.num_drafts + 1 : row.num_kept();
  return std::clamp<int64_t>(next, 1, kMaxAutomaticDrafts);
}

}  // namespace tidal
