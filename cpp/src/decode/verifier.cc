#include "decode/verifier.h"

#include <algorithm>

#include "decode/prefill.h"

namespace tidal {
namespace {

int64_t NumUncached(const Sequence& sequence) {
  return static_cast<int64_t>(sequence.tokens.size()) - sequence.cached;
}

}  // namespace

Verifier::Verifier(Backend& backend, const ModelConfig& model, DType act, const SeenTokens& seen,
                   const VerifierLimits& limits)
    : backend_(backend),
      limits_(limits),
      buffers_(backend, "verification", model, act,
               limits.max_batch_size * limits.max_tokens_per_row, limits.max_batch_size,
               limits.max_pages),
      sampler_(backend, "verification", seen, limits.max_batch_size * limits.max_tokens_per_row),
      idle_(MakeSamplingRow(SamplingParams{}, seen.scratch_slot())),
      tensors_(backend, "verification") {
  int64_t max_tokens = limits.max_batch_size * limits.max_tokens_per_row;
  q_starts_ = tensors_.Make(DType::kInt32, {limits.max_batch_size + 1});
  gather_rows_ = tensors_.Make(DType::kInt32, {max_tokens});
  draw_lens_ = tensors_.Make(DType::kInt32, {max_tokens});
  gathered_ = tensors_.Make(DType::kFloat32, {max_tokens, model.hidden_size});
}

// On a device that records its steps the shape is the same whatever the rows' shares of it: tokens
// past the last row's are idle.
Verifier::Shape Verifier::ShapeFor(std::span<Sequence* const> rows) const {
  int64_t longest = 0, total = 0;
  for (const Sequence* row : rows) {
    longest = std::max(longest, NumUncached(*row));
    total += NumUncached(*row);
  }
  auto count = static_cast<int64_t>(rows.size());
  int64_t batch_size = StepSize(limits_.device, count, limits_.max_batch_size);
  int64_t tokens_per_row = StepSize(limits_.device, longest, limits_.max_tokens_per_row);
  bool is_recorded = limits_.device != DeviceType::kCpu;
  return {batch_size, tokens_per_row, is_recorded ? batch_size * tokens_per_row : total};
}

void Verifier::UploadTokens(std::span<Sequence* const> rows, const Pass& pass) {
  auto t = static_cast<size_t>(pass.token_ids.dim(0)),
       b = static_cast<size_t>(pass.seq_lens.dim(0));
  std::vector<int32_t> inputs(2 * t + b, 0), seq_idx(t, 0);  // token_ids, positions, seq_lens
  std::fill_n(inputs.begin() + static_cast<std::ptrdiff_t>(t), t, -1);
  std::vector<int32_t> q_starts = {0};
  size_t token = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const Sequence& sequence = *rows[i];
    auto length = sequence.tokens.size();
    for (auto position = static_cast<size_t>(sequence.cached); position < length; ++position) {
      inputs[token] = sequence.tokens[position];
      inputs[t + token] = static_cast<int32_t>(position);
      seq_idx[token++] = static_cast<int32_t>(i);
    }
    inputs[2 * t + i] = static_cast<int32_t>(length);
    q_starts.push_back(static_cast<int32_t>(token));
  }
  q_starts.resize(b + 1, static_cast<int32_t>(token));
  backend_.Upload(pass.inputs, inputs.data());
  backend_.Upload(pass.seq_idx, seq_idx.data());
  backend_.Upload(q_starts_.Rows(0, static_cast<int64_t>(b + 1)), q_starts.data());

  std::vector<uint64_t> ids;
  for (const Sequence* sequence : rows) ids.push_back(sequence->id);
  if (ids == rows_) return;
  UploadSequences(backend_, rows, pass);
  rows_ = std::move(ids);
}

void Verifier::UploadDraws(std::span<Sequence* const> rows, const std::vector<Draw>& draws,
                           int64_t num_tokens) {
  std::vector<int64_t> first_token = {0};
  for (const Sequence* row : rows) first_token.push_back(first_token.back() + NumUncached(*row));
  auto t = static_cast<size_t>(num_tokens);
  std::vector<int32_t> gather(t, 0), lens(t, 0);
  std::vector<SamplingRow> sampling(t, idle_);
  for (size_t i = 0; i < draws.size(); ++i) {
    const Sequence& sequence = *rows[draws[i].row];
    gather[i] = static_cast<int32_t>(first_token[draws[i].row] + draws[i].offset);
    lens[i] = static_cast<int32_t>(sequence.cached + draws[i].offset + 1);
    sampling[i] = sequence.sampling;
  }
  backend_.Upload(gather_rows_.Rows(0, num_tokens), gather.data());
  backend_.Upload(draw_lens_.Rows(0, num_tokens), lens.data());
  sampler_.SetRows(sampling);
}

// All draws at once; with a repetition penalty one offset after the other, so that each draw sees
// those before it.
void Verifier::Sample(std::span<Sequence* const> rows, const std::vector<Draw>& draws) {
  bool in_turn = std::any_of(rows.begin(), rows.end(), [](const Sequence* row) {
    return row->sampling.repetition_penalty != 1.0f;
  });
  for (size_t begin = 0, end; begin < draws.size(); begin = end) {
    end = in_turn ? begin + 1 : draws.size();
    while (end < draws.size() && draws[end].offset == draws[begin].offset) ++end;
    auto first = static_cast<int64_t>(begin), count = static_cast<int64_t>(end - begin);
    sampler_.Sample(draw_lens_.Rows(first, count), first);
  }
}

std::vector<std::vector<int32_t>> Verifier::Run(const Transformer& transformer,
                                                std::span<Sequence* const> rows) {
  Shape shape = ShapeFor(rows);
  std::vector<Draw> draws;
  for (int64_t offset = 0; offset < shape.tokens_per_row; ++offset) {
    for (size_t row = 0; row < rows.size(); ++row) {
      if (offset < NumUncached(*rows[row])) draws.push_back({row, offset});
    }
  }
  int64_t t = shape.num_tokens;
  Pass pass = buffers_.Take(t, shape.batch_size);
  UploadTokens(rows, pass);
  UploadDraws(rows, draws, t);
  RunPass(transformer, shape, pass);
  Sample(rows, draws);

  std::vector<int32_t> drawn = sampler_.Read(static_cast<int64_t>(draws.size()));
  std::vector<std::vector<int32_t>> result(rows.size());
  for (size_t i = 0; i < draws.size(); ++i) result[draws[i].row].push_back(drawn[i]);
  for (Sequence* row : rows) row->cached = static_cast<int64_t>(row->tokens.size());
  return result;
}

void Verifier::Warm(const Transformer& transformer, int64_t batch_size, int64_t tokens_per_row) {
  Shape shape = {batch_size, tokens_per_row, batch_size * tokens_per_row};
  Pass pass = buffers_.Take(shape.num_tokens, batch_size);
  UploadTokens({}, pass);
  UploadDraws({}, {}, shape.num_tokens);
  for (int run = 0; run < 2; ++run) RunPass(transformer, shape, pass);
}

void Verifier::RunPass(const Transformer& transformer, const Shape& shape, const Pass& pass) {
  int64_t t = shape.num_tokens;
  // More tokens than rows, so no RopeAppendKv here is taken for that of a decode step. A recording
  // fixes the host's bounds (on CUDA max_q_len is the number of query tiles in the grid), so they
  // are those of the shape and of all sequences; lengths and shares are read on the device.
  StepKey key = {
      .batch_size = shape.batch_size, .sparse = false, .tokens_per_row = shape.tokens_per_row};
  backend_.RunStep(key, [&] {
    PrefillChunk(backend_, transformer,
                 {.q_starts = q_starts_.Rows(0, shape.batch_size + 1),
                  .max_q_len = shape.tokens_per_row,
                  .max_seq_len = limits_.max_seq_len},
                 pass);
    backend_.GatherRows(
        {.x = pass.hidden, .rows = gather_rows_.Rows(0, t), .out = gathered_.Rows(0, t)});
    transformer.Logits(gathered_.Rows(0, t), pass.normed, sampler_.logits(t));
  });
}

}  // namespace tidal
