#include "engine/ngram_index.h"

#include <algorithm>
#include <bit>
#include <random>

#include "core/token_hash.h"

namespace tidal {

NgramIndex::NgramIndex() : seed_(std::random_device{}()) {}

int32_t& NgramIndex::SlotOf(std::span<const int32_t> tokens, int64_t n, int64_t end) {
  Slots& slots = SlotsOf(n);
  const auto size = static_cast<size_t>(n);
  const auto ngram = tokens.subspan(static_cast<size_t>(end - n), size);
  for (uint64_t slot = HashOf(ngram, seed_);; ++slot) {
    int32_t& behind = slots[slot & (slots.size() - 1)];
    if (behind == 0) return behind;
    if (std::ranges::equal(tokens.subspan(static_cast<size_t>(behind) - size, size), ngram)) {
      return behind;
    }
  }
}

void NgramIndex::Insert(std::span<const int32_t> tokens, int64_t behind) {
  for (int64_t n = kShortest; n <= std::min(behind, kLongest); ++n) {
    SlotOf(tokens, n, behind) = static_cast<int32_t>(behind);
  }
}

std::optional<int64_t> NgramIndex::Find(std::span<const int32_t> tokens) {
  const auto length = static_cast<int64_t>(tokens.size());
  if (2 * tokens.size() > slots_[0].size()) {
    for (Slots& slots : slots_) slots.assign(std::bit_ceil(2 * tokens.size()), 0);
    for (int64_t behind = 1; behind <= newest_; ++behind) Insert(tokens, behind);
  }
  while (newest_ + 1 < length) {
    Insert(tokens, ++newest_);
    const bool goes_on =
        place_ > 0 && tokens[static_cast<size_t>(place_)] == tokens[static_cast<size_t>(newest_)];
    place_ = goes_on ? place_ + 1 : 0;
    ++num_same_;
  }
  if (place_ > 0 && num_same_ >= kLongest) return place_;
  for (int64_t n = std::min(length, kLongest); n >= kShortest; --n) {
    place_ = SlotOf(tokens, n, length);
    num_same_ = n;
    if (place_ > 0) return place_;
  }
  return std::nullopt;
}

}  // namespace tidal
