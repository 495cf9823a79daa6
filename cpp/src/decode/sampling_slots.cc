#include "decode/sampling_slots.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "decode/token_rules.h"

namespace tidal {

SamplingSlots::SamplingSlots(Backend& backend, int64_t vocab_size, int64_t max_batch_size)
    : backend_(backend), tensors_(backend, "sampling") {
  const auto bias_bytes = kMaxLogitBiases * static_cast<int64_t>(sizeof(TokenBias));
  history_ = tensors_.Make(DType::kInt32, {max_batch_size + 1, vocab_size});
  biases_ = tensors_.Make(DType::kUInt8, {max_batch_size + 1, bias_bytes});
}

void SamplingSlots::Prepare(const Sequence& sequence, int64_t num_tokens) {
  const bool uses_history = UsesHistory(sequence.sampling);
  const bool has_biases = sequence.rules != nullptr && !sequence.rules->biases().empty();
  if (!uses_history && !has_biases) return;
  History history;
  if (uses_history) {
    const auto tokens = std::span(sequence.tokens).first(static_cast<size_t>(num_tokens));
    history.given = tokens.first(static_cast<size_t>(std::min(sequence.num_given, num_tokens)));
    history.generated = tokens.subspan(history.given.size());
  }
  const auto slot = static_cast<size_t>(sequence.sampling.slot);
  if (slot >= contents_.size()) contents_.resize(slot + 1);
  std::optional<Content>& content = contents_[slot];
  const bool is_same_sequence = content && content->sequence_id == sequence.id;
  const bool has_history = is_same_sequence && !content->is_drawing &&
                           content->num_given == history.given.size() &&
                           std::ranges::equal(content->generated, history.generated);
  Content now = {.sequence_id = sequence.id,
                 .num_given = history.given.size(),
                 .generated = {history.generated.begin(), history.generated.end()},
                 .is_drawing = uses_history};
  content.reset();  // should an upload fail
  if (has_biases && !is_same_sequence) UploadBiases(sequence);
  if (uses_history && !has_history) UploadHistory(sequence.sampling.slot, history);
  content = std::move(now);
}

void SamplingSlots::UploadBiases(const Sequence& sequence) {
  const std::vector<TokenBias>& biases = sequence.rules->biases();
  const auto bytes = static_cast<int64_t>(biases.size() * sizeof(TokenBias));
  const TensorView row = biases_.Rows(sequence.sampling.slot, 1);
  backend_.Upload(TensorView(row.ptr, DType::kUInt8, {bytes}), biases.data());
}

void SamplingSlots::UploadHistory(int32_t slot, const History& history) {
  std::vector<int32_t> marks(static_cast<size_t>(history_.dim(1)), 0);
  for (int32_t token : history.given) marks[static_cast<size_t>(token)] = kGivenMark;
  for (int32_t token : history.generated) marks[static_cast<size_t>(token)] += kGeneratedMark;
  backend_.Upload(history_.Rows(slot, 1), marks.data());
}

void SamplingSlots::MarkDrawn(const Sequence& sequence, std::span<const int32_t> drawn) {
  if (!UsesHistory(sequence.sampling)) return;
  Content& content = *contents_[static_cast<size_t>(sequence.sampling.slot)];
  std::ranges::copy_if(drawn, std::back_inserter(content.generated),
                       [](int32_t token) { return token >= 0; });
  content.is_drawing = false;
}

}  // namespace tidal
