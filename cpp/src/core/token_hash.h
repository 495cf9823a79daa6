// The hash of a run of tokens.
#pragma once

#include <cstdint>
#include <span>

namespace tidal {

// The finaliser of MurmurHash3: every bit of the input reaches every bit of the output.
inline uint64_t Mix(uint64_t bits) {
  bits = (bits ^ (bits >> 33)) * 0xff51afd7ed558ccdULL;
  bits = (bits ^ (bits >> 33)) * 0xc4ceb9fe1a85ec53ULL;
  return bits ^ (bits >> 33);
}

inline uint64_t HashOf(std::span<const int32_t> tokens, uint64_t seed) {
  uint64_t hash = seed;
  for (int32_t token : tokens) hash = Mix(hash ^ static_cast<uint32_t>(token));
  return hash;
}

}  // namespace tidal
