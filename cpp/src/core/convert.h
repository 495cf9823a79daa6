// Numbers of one float type as those of another, on the host.
#pragma once

#include <cstdint>

#include "tidal/dtype.h"

namespace tidal {

// Numbers in memory: float32, bfloat16 or float16.
struct NumbersFrom {
  const void* data;
  DType dtype;
};
struct NumbersTo {
  void* data;
  DType dtype;
};

// Writes `count` numbers, each rounded once.
void ConvertNumbers(const NumbersFrom& from, const NumbersTo& to, int64_t count);

}  // namespace tidal
