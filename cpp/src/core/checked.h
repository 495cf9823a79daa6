// Arithmetic for counts and bytes that settings make as large as they like: what is beyond int64 is
// the largest int64, which no memory holds, and never a wrapped number.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>

namespace tidal {

// The sum of numbers >= 0.
constexpr int64_t Sum(std::initializer_list<int64_t> parts) {
  int64_t total = 0;
  for (int64_t part : parts) {
    if (__builtin_add_overflow(total, part, &total)) return std::numeric_limits<int64_t>::max();
  }
  return total;
}

// The product of numbers >= 0.
constexpr int64_t Product(std::initializer_list<int64_t> factors) {
  int64_t total = 1;
  bool is_beyond = false;
  for (int64_t factor : factors) {
    if (factor == 0) return 0;
    is_beyond = is_beyond || __builtin_mul_overflow(total, factor, &total);
  }
  return is_beyond ? std::numeric_limits<int64_t>::max() : total;
}

}  // namespace tidal
