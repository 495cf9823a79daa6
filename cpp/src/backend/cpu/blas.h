// The one matrix product that the CPU backend takes from OpenBLAS.
#pragma once

#include <cstdint>

namespace tidal {

// All row-major. c[m, n] = a . b (+ c), on the calling thread.
struct SgemmArgs {
  int64_t m = 0, n = 0, k = 0;
  const float* a = nullptr;  // [m, k], rows lda apart
  int64_t lda = 0;
  const float* b = nullptr;  // [n, k] if b_transposed, else [k, n], rows ldb apart
  int64_t ldb = 0;
  bool b_transposed = false;
  float* c = nullptr;  // [m, n], rows ldc apart
  int64_t ldc = 0;
  bool accumulate = false;
};

void Sgemm(const SgemmArgs& args);

// The threads of a product are ours, not OpenBLAS's. Call once before the first Sgemm.
void UseOneBlasThread();

}  // namespace tidal
