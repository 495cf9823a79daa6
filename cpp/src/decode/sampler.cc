#include "decode/sampler.h"

#include <algorithm>
#include <cmath>

#include "tidal/error.h"

namespace tidal {
namespace {

constexpr const char* kPurpose = "sampling";

}  // namespace

void ValidateSamplingParams(const SamplingParams& p) {
  TIDAL_CHECK(p.max_new_tokens >= 1, InvalidArgument, "max_new_tokens: got ", p.max_new_tokens,
              ", expected >= 1");
  TIDAL_CHECK(std::isfinite(p.temperature) && p.temperature >= 0.0, InvalidArgument,
              "temperature: got ", p.temperature, ", expected a finite number >= 0 (0 = greedy)");
  TIDAL_CHECK(p.top_k >= 0, InvalidArgument, "top_k: got ", p.top_k, ", expected >= 0 (0 = off)");
  TIDAL_CHECK(p.top_p > 0.0 && p.top_p <= 1.0, InvalidArgument, "top_p: got ", p.top_p,
              ", expected in (0, 1]");
  TIDAL_CHECK(p.min_p >= 0.0 && p.min_p <= 1.0, InvalidArgument, "min_p: got ", p.min_p,
              ", expected in [0, 1]");
  TIDAL_CHECK(std::isfinite(p.repetition_penalty) && p.repetition_penalty > 0.0, InvalidArgument,
              "repetition_penalty: got ", p.repetition_penalty, ", expected a finite number > 0");
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
          .top_k = static_cast<int32_t>(std::min(p.top_k, kMaxTopK)),
          .slot = slot,
          .seed = p.seed};
}

SeenTokens::SeenTokens(Backend& backend, int64_t vocab_size, int64_t max_batch_size)
    : backend_(backend), tensors_(backend, kPurpose) {
  seen_ = tensors_.Make(DType::kUInt8, {max_batch_size + 1, vocab_size});
}

void SeenTokens::Set(int32_t slot, std::span<const int32_t> tokens) {
  std::vector<uint8_t> seen(static_cast<size_t>(seen_.dim(1)), 0);
  for (int32_t token : tokens) seen[static_cast<size_t>(token)] = 1;
  backend_.Upload(seen_.Rows(slot, 1), seen.data());
}

Sampler::Sampler(Backend& backend, const SeenTokens& seen, int64_t max_rows)
    : backend_(backend),
      seen_(seen),
      scratch_row_(MakeSamplingRow(SamplingParams{}, seen.scratch_slot())),
      tensors_(backend, kPurpose) {
  logits_ = tensors_.Make(DType::kFloat32, {max_rows, seen.view().dim(1)});
  rows_ = tensors_.Make(DType::kUInt8, {max_rows, static_cast<int64_t>(sizeof(SamplingRow))});
  token_ids_ = tensors_.Make(DType::kInt32, {max_rows});
}

void Sampler::SetRows(const std::vector<SamplingRow>& rows) {
  written_.Write(backend_, rows_.Rows(0, static_cast<int64_t>(rows.size())), rows);
}

void Sampler::Sample(const TensorView& seq_lens, int64_t first) const {
  int64_t count = seq_lens.dim(0);
  backend_.Sample({.logits = logits_.Rows(first, count),
                   .rows = rows_.Rows(first, count),
                   .seq_lens = seq_lens,
                   .seen = seen_.view(),
                   .token_ids = token_ids_.Rows(first, count)});
}

void Sampler::AppendLogits(int64_t first, int64_t count, std::vector<float>& out) const {
  const TensorView rows = logits_.Rows(first, count);
  const size_t size = out.size();
  out.resize(size + static_cast<size_t>(rows.numel()));
  backend_.Download(out.data() + size, rows);
}

std::vector<int32_t> Sampler::Read(int64_t num_rows) const {
  std::vector<int32_t> ids(static_cast<size_t>(num_rows));
  backend_.Download(ids.data(), token_ids_.Rows(0, num_rows));
  return ids;
}

}  // namespace tidal
