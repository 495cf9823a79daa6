#include "decode/pass_outputs.h"

#include <algorithm>

namespace tidal {

std::vector<PassOutput> OutputsOf(const Batch& batch) {
  std::vector<PassOutput> outputs;
  int64_t first_token = 0;
  for (size_t i = 0; i < batch.rows.size(); ++i) {
    const BatchRow& row = batch.rows[i];
    const int64_t count = std::max(row.num_draws, row.num_logits);
    for (int64_t turn = 0; turn < count; ++turn) {
      const int64_t token = row.num_tokens - count + turn;
      outputs.push_back({.row = i,
                         .token = first_token + token,
                         .seq_len = row.sequence->cached + token + 1,
                         .turn = turn,
                         .is_drawn = turn >= count - row.num_draws,
                         .wants_logits = turn >= count - row.num_logits});
    }
    first_token += row.num_tokens;
  }
  std::stable_sort(
      outputs.begin(), outputs.end(),
      [](const PassOutput& left, const PassOutput& right) { return left.turn < right.turn; });
  return outputs;
}

PassOutputs::PassOutputs(Backend& backend, Sampler& sampler, const ModelConfig& model,
                         const char* what)
    : backend_(backend), sampler_(sampler), tensors_(backend, what) {
  written_ = tensors_.Make(DType::kInt32, {2 * sampler.max_rows()});
  gathered_ = tensors_.Make(DType::kFloat32, {sampler.max_rows(), model.hidden_size});
}

void PassOutputs::Write(const Batch& batch, std::span<const PassOutput> outputs, int64_t num_rows) {
  const auto n = static_cast<size_t>(num_rows);
  std::vector<int32_t> written(2 * n, 0);
  std::vector<SamplingRow> sampling(n, sampler_.scratch_row());
  for (size_t i = 0; i < outputs.size(); ++i) {
    const PassOutput& output = outputs[i];
    written[i] = static_cast<int32_t>(output.token);
    if (!output.is_drawn) continue;
    written[n + i] = static_cast<int32_t>(output.seq_len);
    sampling[i] = batch.rows[output.row].sequence->sampling;
  }
  backend_.Upload(written_.Rows(0, 2 * num_rows), written.data());
  sampler_.SetRows(sampling);
}

void PassOutputs::Logits(const Transformer& transformer, const Pass& pass, int64_t num_rows) const {
  const TensorView gathered = gathered_.Rows(0, num_rows);
  backend_.GatherRows({.x = pass.hidden, .rows = TokensOf(num_rows), .out = gathered});
  // What the layers had normed is of no use any more.
  transformer.Logits(gathered, pass.normed.Rows(0, num_rows), sampler_.logits(num_rows));
}

void PassOutputs::Take(const Batch& batch, std::span<const PassOutput> outputs, int64_t num_rows,
                       Drawn& drawn) const {
  TakeLogits(outputs, drawn);  // a draw works on them
  const bool any_drawn = std::any_of(outputs.begin(), outputs.end(),
                                     [](const PassOutput& output) { return output.is_drawn; });
  if (!any_drawn) return;
  Draw(batch, outputs, num_rows);
  const std::vector<int32_t> tokens = sampler_.Read(static_cast<int64_t>(outputs.size()));
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].is_drawn) drawn.tokens[outputs[i].row].push_back(tokens[i]);
  }
}

void PassOutputs::TakeLogits(std::span<const PassOutput> outputs, Drawn& drawn) const {
  for (size_t begin = 0, end; begin < outputs.size(); begin = end) {
    end = begin + 1;
    if (!outputs[begin].wants_logits) continue;
    while (end < outputs.size() && outputs[end].row == outputs[begin].row &&
           outputs[end].wants_logits) {
      ++end;
    }
    sampler_.AppendLogits(static_cast<int64_t>(begin), static_cast<int64_t>(end - begin),
                          drawn.logits[outputs[begin].row]);
  }
}

// All draws at once; with a repetition penalty turn by turn, so that each draw of a row sees those
// before it.
void PassOutputs::Draw(const Batch& batch, std::span<const PassOutput> outputs,
                       int64_t num_rows) const {
  const bool in_turn = std::any_of(batch.rows.begin(), batch.rows.end(), [](const BatchRow& row) {
    return row.sequence->sampling.repetition_penalty != 1.0f;
  });
  for (size_t begin = 0, end; begin < outputs.size(); begin = end) {
    end = in_turn ? begin + 1 : outputs.size();
    while (end < outputs.size() && outputs[end].turn == outputs[begin].turn) ++end;
    auto first = static_cast<int64_t>(begin), count = static_cast<int64_t>(end - begin);
    sampler_.Sample(LensOf(num_rows).Rows(first, count), first);
  }
}

}  // namespace tidal
