#include "decode/batch.h"

#include <algorithm>
#include <sstream>

#include "tidal/error.h"

namespace tidal {

bool Batch::is_step() const {
  return std::all_of(rows.begin(), rows.end(),
                     [](const BatchRow& row) { return row.num_tokens == 1 && row.num_draws == 1; });
}

int64_t NumFollowed(const BatchRow& row) {
  const auto length = static_cast<int64_t>(row.sequence->tokens.size());
  return std::min(row.num_tokens, length - row.sequence->cached - 1);
}

void CheckBatch(const Batch& batch) {
  TIDAL_CHECK(!batch.rows.empty() || !batch.saves.empty(), InvalidArgument,
              "batch: got no rows, expected at least one");
  std::vector<const Sequence*> sequences(batch.rows.size());
  for (size_t i = 0; i < batch.rows.size(); ++i) {
    const BatchRow& row = batch.rows[i];
    TIDAL_CHECK(row.sequence != nullptr, InvalidArgument, "batch row ", i, ": got no sequence");
    const Sequence& sequence = *row.sequence;
    const int64_t uncached = static_cast<int64_t>(sequence.tokens.size()) - sequence.cached;
    TIDAL_CHECK(row.num_tokens >= 1 && row.num_tokens <= uncached, InvalidArgument, "batch row ", i,
                ": got num_tokens ", row.num_tokens, ", expected 1 to ", uncached,
                ", which are not yet cached");
    TIDAL_CHECK(row.num_draws >= 0 && row.num_draws <= row.num_tokens, InvalidArgument,
                "batch row ", i, ": got num_draws ", row.num_draws, ", expected 0 to ",
                row.num_tokens);
    TIDAL_CHECK(row.num_logits >= 0 && row.num_logits <= row.num_tokens, InvalidArgument,
                "batch row ", i, ": got num_logits ", row.num_logits, ", expected 0 to ",
                row.num_tokens);
    TIDAL_CHECK(row.num_logits == 0 || row.logits != nullptr, InvalidArgument, "batch row ", i,
                ": got no place for its ", row.num_logits, " logits");
    TIDAL_CHECK(!row.num_logprobs || (*row.num_logprobs >= 0 && *row.num_logprobs <= kMaxLogprobs),
                InvalidArgument, "batch row ", i, ": got num_logprobs ", *row.num_logprobs,
                ", expected 0 to ", kMaxLogprobs);
    const int64_t most = row.num_logprobs ? NumFollowed(row) : 0;
    TIDAL_CHECK(row.num_scored >= 0 && row.num_scored <= most, InvalidArgument, "batch row ", i,
                ": got num_scored ", row.num_scored, ", expected 0 to ", most);
    sequences[i] = row.sequence;
  }
  std::sort(sequences.begin(), sequences.end());
  const auto twice = std::adjacent_find(sequences.begin(), sequences.end());
  TIDAL_CHECK(twice == sequences.end(), InvalidArgument, "batch: got sequence ", (*twice)->id,
              " in two rows, expected each once");
  TIDAL_CHECK(batch.plan == PlanId::kDense || batch.is_step(), InvalidArgument, "batch: got plan ",
              static_cast<int64_t>(batch.plan),
              " for a pass that is no decode step, expected the dense plan");
}

std::string ToString(const Batch& batch) {
  std::ostringstream out;
  out << "plan " << static_cast<int64_t>(batch.plan) << ":";
  const char* separator = " ";
  for (const BatchRow& row : batch.rows) {
    out << separator << row.sequence->cached << " +" << row.num_tokens;
    if (row.num_draws > 0) out << " draw " << row.num_draws;
    if (row.num_logits > 0) out << " logits " << row.num_logits;
    if (row.num_logprobs) out << " logprobs " << *row.num_logprobs;
    if (row.num_scored > 0) out << " scored " << row.num_scored;
    separator = ", ";
  }
  return out.str();
}

}  // namespace tidal
