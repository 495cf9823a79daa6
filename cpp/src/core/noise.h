// Noise: normal random values as fast as memory is copied, for weights and caches that are only
// there to be measured.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tidal/dtype.h"

namespace tidal {

struct Normal {
  double mean = 0.0;
  double stddev = 1.0;
};

// One block of values, thought of as repeated without end: drawing gigabytes would take minutes.
class Noise {
 public:
  // A prime, some millions: repeats line up with no row, page or tensor.
  static constexpr int64_t kBlockElements = (int64_t{1} << 23) + 9;

  // Codes of int8 that stand for 1.
  static constexpr float kInt8PerUnit = 32.0f;

  // `dtype`: float32, bfloat16, float16, int8 or fp8. Equal arguments give equal values.
  // `block_elements` may be less where less is needed.
  Noise(DType dtype, Normal normal, uint64_t seed, int64_t block_elements = kBlockElements);

  // The values' bytes from byte `offset` on, as far as they lie in one piece.
  std::span<const char> From(int64_t offset) const;

  // Copies `bytes` bytes from byte `offset` on.
  void Read(int64_t offset, int64_t bytes, void* dst) const;

 private:
  std::vector<char> block_;
};

}  // namespace tidal
