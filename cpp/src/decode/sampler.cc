#include "decode/sampler.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "decode/token_rules.h"
#include "tidal/error.h"

namespace tidal {
namespace {

void CheckTokenIds(const char* field, std::span<const int32_t> token_ids, int64_t vocab_size) {
  for (int32_t token_id : token_ids) {
    TIDAL_CHECK(token_id >= 0 && token_id < vocab_size, InvalidArgument, field, ": got token id ",
                token_id, ", expected 0 to ", vocab_size - 1);
  }
}

void CheckPenalty(const char* field, double value) {
  TIDAL_CHECK(std::isfinite(value) && std::abs(value) <= kMaxPenalty, InvalidArgument, field,
              ": got ", value, ", expected ", -kMaxPenalty, " to ", kMaxPenalty, " (0 = off)");
}

void ValidateTokenRules(const SamplingParams& p, int64_t vocab_size) {
  TIDAL_CHECK(p.min_new_tokens >= 0, InvalidArgument, "min_new_tokens: got ", p.min_new_tokens,
              ", expected >= 0");
  TIDAL_CHECK(p.no_repeat_ngram_size >= 0, InvalidArgument, "no_repeat_ngram_size: got ",
              p.no_repeat_ngram_size, ", expected >= 0 (0 = off)");
  const auto num_biases = static_cast<int64_t>(p.logit_bias.size());
  TIDAL_CHECK(num_biases <= kMaxLogitBiases, InvalidArgument, "logit_bias: got ", num_biases,
              " tokens, expected at most ", kMaxLogitBiases);
  for (const auto& [token_id, bias] : p.logit_bias) {
    CheckTokenIds("logit_bias", {&token_id, 1}, vocab_size);
    TIDAL_CHECK(std::isfinite(bias) && std::abs(bias) <= kMaxLogitBias, InvalidArgument,
                "logit_bias: got ", bias, " for token id ", token_id, ", expected ", -kMaxLogitBias,
                " to ", kMaxLogitBias);
  }
  CheckTokenIds("suppress_tokens", p.suppress_tokens, vocab_size);
  CheckTokenIds("allowed_token_ids", p.allowed_token_ids, vocab_size);
  for (const std::vector<int32_t>& word : p.bad_words) {
    TIDAL_CHECK(!word.empty(), InvalidArgument,
                "bad_words: got a word of no tokens, expected at least one");
    CheckTokenIds("bad_words", word, vocab_size);
  }
}

}  // namespace

void ValidateSamplingParams(const SamplingParams& p, int64_t vocab_size) {
  TIDAL_CHECK(p.max_new_tokens >= 1, InvalidArgument, "max_new_tokens: got ", p.max_new_tokens,
              ", expected >= 1");
  TIDAL_CHECK(std::isfinite(p.temperature) && p.temperature >= 0.0, InvalidArgument,
              "temperature: got ", p.temperature, ", expected a finite number >= 0 (0 = greedy)");
  TIDAL_CHECK(p.top_k >= 0, InvalidArgument, "top_k: got ", p.top_k, ", expected >= 0 (0 = off)");
  TIDAL_CHECK(p.top_p > 0.0 && p.top_p <= 1.0, InvalidArgument, "top_p: got ", p.top_p,
              ", expected in (0, 1]");
  TIDAL_CHECK(p.min_p >= 0.0 && p.min_p <= 1.0, InvalidArgument, "min_p: got ", p.min_p,
              ", expected in [0, 1]");
  TIDAL_CHECK(p.repetition_penalty >= 1.0 / kMaxRepetitionPenalty &&
                  p.repetition_penalty <= kMaxRepetitionPenalty,
              InvalidArgument, "repetition_penalty: got ", p.repetition_penalty, ", expected ",
              1.0 / kMaxRepetitionPenalty, " to ", kMaxRepetitionPenalty, " (1 = off)");
  CheckPenalty("frequency_penalty", p.frequency_penalty);
  CheckPenalty("presence_penalty", p.presence_penalty);
  ValidateTokenRules(p, vocab_size);
}

SamplingRow MakeSamplingRow(const SamplingParams& p, int32_t slot) {
  // Below this a softmax is an argmax in float32 already; division by less would overflow.
  constexpr double kMinTemperature = 1e-5;
  double temperature = p.temperature == 0.0 ? 0.0 : std::max(p.temperature, kMinTemperature);
  constexpr int64_t kMaxTopK = 1 << 30;
  return {.temperature = static_cast<float>(temperature),
          .top_p = static_cast<float>(p.top_p),
          .min_p = static_cast<float>(p.min_p),
          .repetition_penalty = static_cast<float>(p.repetition_penalty),
          .frequency_penalty = static_cast<float>(p.frequency_penalty),
          .presence_penalty = static_cast<float>(p.presence_penalty),
          .top_k = static_cast<int32_t>(std::min(p.top_k, kMaxTopK)),
          .slot = slot,
          .num_biases = 0,  // these depend on the row
          .has_mask = 0,
          .keeps_logits = 0,
          .seed = p.seed};
}

void SetSampling(const SamplingParams& params, int64_t vocab_size, int32_t slot,
                 Sequence& sequence) {
  sequence.sampling = MakeSamplingRow(params, slot);
  sequence.num_given = static_cast<int64_t>(sequence.tokens.size());
  sequence.rules = MakeTokenRules(params, vocab_size);
}

Sampler::Sampler(Backend& backend, const SamplingSlots& slots, int64_t max_rows,
                 int64_t max_batch_size)
    : backend_(backend),
      slots_(slots),
      scratch_row_(MakeSamplingRow(SamplingParams{}, slots.scratch_slot())),
      tensors_(backend, "sampling") {
  const int64_t vocab_size = slots.history().dim(1);
  const int64_t num_logprobs = max_batch_size * (1 + kMaxLogprobs);
  logits_ = tensors_.Make(DType::kFloat32, {max_rows, vocab_size});
  rows_ = tensors_.Make(DType::kUInt8, {max_rows, static_cast<int64_t>(sizeof(SamplingRow))});
  masks_ = tensors_.Make(DType::kInt32, {max_rows, NumMaskWords(vocab_size)});
  copies_ = tensors_.Make(DType::kFloat32, {max_batch_size, vocab_size});
  token_ids_ = tensors_.Make(DType::kInt32, {max_rows});
  scored_ = tensors_.Make(DType::kInt32, {2 * max_batch_size});
  logprobs_ = tensors_.Make(DType::kFloat32, {num_logprobs});
  logprob_ids_ = tensors_.Make(DType::kInt32, {num_logprobs});
}

void Sampler::SetRows(std::span<const DrawRow> draws) {
  std::vector<SamplingRow> rows;
  rows.reserve(draws.size());
  for (const DrawRow& draw : draws) rows.push_back(RowOf(draw, static_cast<int64_t>(rows.size())));
  written_.Write(backend_, rows_.Rows(0, static_cast<int64_t>(rows.size())), rows);
}

SamplingRow Sampler::RowOf(const DrawRow& draw, int64_t index) {
  if (draw.row == nullptr) return scratch_row_;
  const BatchRow& batch_row = *draw.row;
  const Sequence& sequence = *batch_row.sequence;
  SamplingRow row = sequence.sampling;
  row.keeps_logits = draw.keeps_logits ? 1 : 0;
  std::vector<uint32_t> mask;
  if (sequence.rules != nullptr) {
    const int64_t length =
        sequence.cached + batch_row.num_tokens - batch_row.num_draws + draw.index + 1;
    row.num_biases = static_cast<int32_t>(sequence.rules->biases().size());
    mask = sequence.rules->MaskAfter(std::span(sequence.tokens).first(static_cast<size_t>(length)),
                                     sequence.num_given);
  }
  if (!batch_row.allowed.empty()) {
    const auto words = static_cast<size_t>(masks_.dim(1));
    const auto allowed =
        std::span(batch_row.allowed).subspan(static_cast<size_t>(draw.index) * words, words);
    if (mask.empty()) mask.assign(words, ~uint32_t{0});
    for (size_t i = 0; i < words; ++i) mask[i] &= allowed[i];
  }
  if (mask.empty()) return row;
  row.has_mask = 1;
  SetMask(index, std::move(mask));
  return row;
}

void Sampler::SetMask(int64_t index, std::vector<uint32_t> mask) {
  const auto row = static_cast<size_t>(index);
  if (row >= written_masks_.size()) written_masks_.resize(row + 1);
  std::vector<uint32_t>& written = written_masks_[row];
  if (written == mask) return;
  written.clear();  // should the upload fail
  backend_.Upload(masks_.Rows(index, 1), mask.data());
  written = std::move(mask);
}

void Sampler::Sample(const TensorView& seq_lens, int64_t first) const {
  const int64_t count = seq_lens.dim(0);
  backend_.Sample({.logits = logits_.Rows(first, count),
                   .rows = rows_.Rows(first, count),
                   .seq_lens = seq_lens,
                   .history = slots_.history(),
                   .biases = slots_.biases(),
                   .masks = masks_.Rows(first, count),
                   .copies = copies_,
                   .token_ids = token_ids_.Rows(first, count)});
}

std::vector<TokenLogprobs> Sampler::ReadLogprobs(std::span<const LogprobsWanted> wanted) const {
  std::vector<TokenLogprobs> result;
  result.reserve(wanted.size());
  const auto most = static_cast<size_t>(copies_.dim(0));
  while (!wanted.empty()) {
    const auto part = wanted.first(std::min(wanted.size(), most));
    AppendLogprobs(part, result);
    wanted = wanted.subspan(part.size());
  }
  return result;
}

void Sampler::AppendLogprobs(std::span<const LogprobsWanted> wanted,
                             std::vector<TokenLogprobs>& out) const {
  const auto n = static_cast<int64_t>(wanted.size());
  std::vector<int32_t> scored(2 * wanted.size());
  int64_t width = 1;
  for (size_t i = 0; i < wanted.size(); ++i) {
    scored[i] = static_cast<int32_t>(wanted[i].row);
    scored[wanted.size() + i] = wanted[i].token_id;
    width = std::max(width, 1 + wanted[i].num_top);
  }
  const TensorView logprobs(logprobs_.ptr, DType::kFloat32, {n, width});
  const TensorView ids(logprob_ids_.ptr, DType::kInt32, {n, width});
  backend_.Upload(scored_.Rows(0, 2 * n), scored.data());
  backend_.Logprobs({.logits = logits_,
                     .rows = scored_.Rows(0, n),
                     .token_ids = scored_.Rows(n, n),
                     .logprobs = logprobs,
                     .ids = ids});
  std::vector<float> values(static_cast<size_t>(logprobs.numel()));
  std::vector<int32_t> numbers(values.size());
  backend_.Download(values.data(), logprobs);
  backend_.Download(numbers.data(), ids);
  for (size_t i = 0; i < wanted.size(); ++i) {
    const size_t first = i * static_cast<size_t>(width);
    TokenLogprobs& one = out.emplace_back();
    one.logprob = values[first];
    one.rank = numbers[first];
    for (size_t j = first + 1; j <= first + static_cast<size_t>(wanted[i].num_top); ++j) {
      if (numbers[j] < 0) break;  // the others are impossible
      one.top_ids.push_back(numbers[j]);
      one.top_logprobs.push_back(values[j]);
    }
  }
}

void Sampler::ReadLogits(int64_t first, int64_t count, float* out) const {
  backend_.Download(out, logits_.Rows(first, count));
}

std::vector<int32_t> Sampler::Read(int64_t count, int64_t first) const {
  std::vector<int32_t> ids(static_cast<size_t>(count));
  backend_.Download(ids.data(), token_ids_.Rows(first, count));
  return ids;
}

}  // namespace tidal
