// NgramIndex: where the last tokens of a text have occurred in it before. What followed them there
// is a guess at what follows now: prompt lookup decoding (Saxena, 2023,
// github.com/apoorvumang/prompt-lookup-decoding). Values only.
//
// For each length the last place of every n-gram is kept, found by its hash, so a look-up takes no
// time that grows with the text, and neither does a new token, on average.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace tidal {

class NgramIndex {
 public:
  static constexpr int64_t kLongest = 4, kShortest = 2;  // tokens of an n-gram

  NgramIndex();

  // Returns the index of the token that followed the last n tokens when they occurred before, the
  // last time that they did, for the largest n of kLongest to kShortest with which they did; none
  // if they never did. A place that the text has gone along with for kLongest tokens or more, since
  // a call that returned it, comes first: nowhere else is known to be as like it. `tokens` must
  // begin with those of the call before.
  std::optional<int64_t> Find(std::span<const int32_t> tokens);

 private:
  // The places of n-grams of one length, by hash, each in the first slot from there on that was
  // free: the index of the token behind the n-gram, 0 in a free slot. At most half are taken.
  using Slots = std::vector<int32_t>;

  // The slot of the n-gram that ends before `end`.
  int32_t& SlotOf(std::span<const int32_t> tokens, int64_t n, int64_t end);
  // Takes in the n-grams in front of the token `behind`.
  void Insert(std::span<const int32_t> tokens, int64_t behind);
  Slots& SlotsOf(int64_t n) { return slots_[static_cast<size_t>(n - kShortest)]; }

  std::array<Slots, kLongest - kShortest + 1> slots_;
  int64_t newest_ = 0;    // index of the newest token
  int64_t place_ = 0;     // of the token behind those that are as the last ones; 0: not known
  int64_t num_same_ = 0;  // how many are known to be so
  uint64_t seed_;         // nobody can write a text whose n-grams all want one slot
};

}  // namespace tidal
