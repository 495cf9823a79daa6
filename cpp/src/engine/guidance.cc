#include "engine/guidance.h"

#include <algorithm>
#include <utility>

namespace tidal {

std::vector<uint32_t> Guidance::Masks(int64_t num_drafts, int64_t count) const {
  std::vector<uint32_t> masks;
  for (int64_t i = num_drafts; i < num_drafts + count; ++i) {
    const std::vector<uint32_t>& mask = masks_.at(static_cast<size_t>(i));
    masks.insert(masks.end(), mask.begin(), mask.end());
  }
  return masks;
}

int64_t Guidance::NumAllowed(std::span<const int32_t> drafts) const {
  const size_t num_known = std::min(masks_.size(), drafts.size());
  for (size_t i = 0; i < num_known; ++i) {
    const auto token = static_cast<size_t>(drafts[i]);
    if ((masks_[i].at(token / 32) >> (token % 32) & 1) == 0) return static_cast<int64_t>(i);
  }
  return static_cast<int64_t>(drafts.size());
}

std::optional<GuideQuestion> Guidance::Ask(std::span<const int32_t> generated, int64_t num_drafts) {
  const int64_t num_decided = static_cast<int64_t>(generated.size()) - num_drafts;
  if (num_decided != num_decided_) {
    masks_.clear();
    num_decided_ = num_decided;
    is_complete_ = has_ended_ = false;
  }
  const auto num_known = std::min(masks_.size(), static_cast<size_t>(num_drafts) + 1);
  masks_.resize(num_known);
  const bool is_known = HasMask(num_drafts);
  if (!is_known) generated = generated.first(static_cast<size_t>(num_decided) + num_known);
  const auto mismatch =
      std::mismatch(told_.begin(), told_.end(), generated.begin(), generated.end());
  const bool is_told = mismatch.first == told_.end() && mismatch.second == generated.end();
  if (!is_told || is_known) is_asking_ = false;
  if (is_asking_ || is_known || has_ended_ || !error_.empty()) return std::nullopt;
  GuideQuestion question = {.number = ++number_,
                            .keep = mismatch.first - told_.begin(),
                            .tokens = {mismatch.second, generated.end()}};
  told_.erase(mismatch.first, told_.end());
  told_.insert(told_.end(), question.tokens.begin(), question.tokens.end());
  num_drafts_asked_ = static_cast<int64_t>(num_known);
  is_asking_ = true;
  return question;
}

void Guidance::Take(GuideAnswer answer) {
  if (!is_asking_ || answer.number != number_) return;
  is_asking_ = false;
  const bool is_dead = std::all_of(answer.allowed.begin(), answer.allowed.end(),
                                   [](uint32_t word) { return !word; });
  if (num_drafts_asked_ > 0) {
    // A draft may lead where the text never gets: no draw there is kept.
    if (answer.allowed.empty()) answer.allowed.assign(masks_.front().size(), 0);
  } else {
    error_ = std::move(answer.error);
    is_complete_ = answer.is_complete;
    has_ended_ = is_complete_ && is_dead;
    if (has_ended_ || !error_.empty()) return;
  }
  masks_.push_back(std::move(answer.allowed));
}

}  // namespace tidal
