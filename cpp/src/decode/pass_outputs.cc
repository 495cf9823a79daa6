#include "decode/pass_outputs.h"

#include <algorithm>
#include <utility>

namespace tidal {

std::vector<PassOutput> OutputsOf(const Batch& batch) {
  std::vector<PassOutput> outputs;
  int64_t first_token = 0;
  for (size_t i = 0; i < batch.rows.size(); ++i) {
    const BatchRow& row = batch.rows[i];
    const int64_t end = row.num_tokens, scored_end = NumFollowed(row);
    const int64_t scored_begin = scored_end - row.num_scored;
    int64_t begin = end - std::max(row.num_draws, row.num_logits);
    if (row.num_scored > 0) begin = std::min(begin, scored_begin);
    for (int64_t token = begin; token < end; ++token) {
      outputs.push_back({.row = i,
                         .token = first_token + token,
                         .seq_len = row.sequence->cached + token + 1,
                         .turn = token - begin,
                         .draw = std::max<int64_t>(token - (end - row.num_draws), -1),
                         .logits = std::max<int64_t>(token - (end - row.num_logits), -1),
                         .is_scored = token >= scored_begin && token < scored_end});
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
  std::vector<DrawRow> draws(n);
  for (size_t i = 0; i < outputs.size(); ++i) {
    const PassOutput& output = outputs[i];
    written[i] = static_cast<int32_t>(output.token);
    if (!output.is_drawn()) continue;
    const BatchRow& row = batch.rows[output.row];
    written[n + i] = static_cast<int32_t>(output.seq_len);
    draws[i] = {.row = &row, .index = output.draw, .keeps_logits = row.num_logprobs.has_value()};
  }
  backend_.Upload(written_.Rows(0, 2 * num_rows), written.data());
  sampler_.SetRows(draws);
}

void PassOutputs::Logits(const Transformer& transformer, const Pass& pass, int64_t num_rows) const {
  const TensorView gathered = gathered_.Rows(0, num_rows);
  backend_.GatherRows({.x = pass.hidden, .rows = TokensOf(num_rows), .out = gathered});
  // What the layers had normed is of no use any more.
  transformer.Logits(gathered, pass.normed.Rows(0, num_rows), sampler_.logits(num_rows));
}

void PassOutputs::Take(const Batch& batch, std::span<const PassOutput> outputs, int64_t num_rows,
                       Drawn& drawn) const {
  TakeLogits(batch, outputs);  // a draw works on them
  TakeScores(batch, outputs, drawn);
  const bool any_drawn = std::any_of(outputs.begin(), outputs.end(),
                                     [](const PassOutput& output) { return output.is_drawn(); });
  if (!any_drawn) return;
  Draw(batch, outputs, num_rows, drawn);
  const std::vector<int32_t> tokens = sampler_.Read(static_cast<int64_t>(outputs.size()));
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].is_drawn()) drawn.tokens[outputs[i].row].push_back(tokens[i]);
  }
}

void PassOutputs::TakeLogits(const Batch& batch, std::span<const PassOutput> outputs) const {
  for (size_t begin = 0, end; begin < outputs.size(); begin = end) {
    end = begin + 1;
    const PassOutput& first = outputs[begin];
    if (first.logits < 0) continue;
    while (end < outputs.size() && outputs[end].row == first.row && outputs[end].logits >= 0) ++end;
    sampler_.ReadLogits(static_cast<int64_t>(begin), static_cast<int64_t>(end - begin),
                        batch.rows[first.row].logits + first.logits * sampler_.vocab_size());
  }
}

// All draws at once; turn by turn where a draw of a row goes by those before it, and where logits
// are kept, for which there is room for one a row.
void PassOutputs::Draw(const Batch& batch, std::span<const PassOutput> outputs, int64_t num_rows,
                       Drawn& drawn) const {
  const bool in_turn = std::any_of(batch.rows.begin(), batch.rows.end(), [](const BatchRow& row) {
    return UsesHistory(row.sequence->sampling) || row.num_logprobs.has_value();
  });
  for (size_t begin = 0, end; begin < outputs.size(); begin = end) {
    end = in_turn ? begin + 1 : outputs.size();
    while (end < outputs.size() && outputs[end].turn == outputs[begin].turn) ++end;
    auto first = static_cast<int64_t>(begin), count = static_cast<int64_t>(end - begin);
    sampler_.Sample(LensOf(num_rows).Rows(first, count), first);
    TakeLogprobs(batch, outputs.subspan(begin, end - begin), first, drawn);
  }
}

void PassOutputs::TakeScores(const Batch& batch, std::span<const PassOutput> outputs,
                             Drawn& drawn) const {
  std::vector<LogprobsWanted> wanted;
  std::vector<size_t> rows;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const PassOutput& output = outputs[i];
    if (!output.is_scored) continue;
    const BatchRow& row = batch.rows[output.row];
    wanted.push_back({.row = static_cast<int64_t>(i),
                      .token_id = row.sequence->tokens[static_cast<size_t>(output.seq_len)],
                      .num_top = *row.num_logprobs});
    rows.push_back(output.row);
  }
  std::vector<TokenLogprobs> scored = sampler_.ReadLogprobs(wanted);
  for (size_t i = 0; i < rows.size(); ++i) drawn.scored[rows[i]].push_back(std::move(scored[i]));
}

// Takes those of outputs that have just been drawn, from row `first` of the logits on.
void PassOutputs::TakeLogprobs(const Batch& batch, std::span<const PassOutput> outputs,
                               int64_t first, Drawn& drawn) const {
  auto wants = [&](const PassOutput& output) {
    return output.is_drawn() && batch.rows[output.row].num_logprobs;
  };
  if (std::none_of(outputs.begin(), outputs.end(), wants)) return;
  const std::vector<int32_t> tokens = sampler_.Read(static_cast<int64_t>(outputs.size()), first);
  std::vector<LogprobsWanted> wanted;
  std::vector<size_t> rows;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!wants(outputs[i])) continue;
    wanted.push_back({.row = first + static_cast<int64_t>(i),
                      .token_id = tokens[i],
                      .num_top = *batch.rows[outputs[i].row].num_logprobs});
    rows.push_back(outputs[i].row);
  }
  std::vector<TokenLogprobs> logprobs = sampler_.ReadLogprobs(wanted);
  for (size_t i = 0; i < rows.size(); ++i) {
    drawn.logprobs[rows[i]].push_back(std::move(logprobs[i]));
  }
}

}  // namespace tidal
