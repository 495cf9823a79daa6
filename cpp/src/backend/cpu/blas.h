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

// Memory that a thread's products fill of a buffer of OpenBLAS; the rest of it stays untouched.
inline constexpr int64_t kBlasThreadBytes = int64_t{4} << 20;

// Buffers of OpenBLAS for threads that call Sgemm at the same time as all other BlasThreads.
//
// OpenBLAS takes a buffer when more products run at once than ever before, keeps it until the
// process ends, and ends the process where there is no memory for it. So all are taken here.
class BlasThreads {
 public:
  // Throws OutOfMemoryError.
  explicit BlasThreads(int count);
  ~BlasThreads();
  BlasThreads(const BlasThreads&) = delete;
  BlasThreads& operator=(const BlasThreads&) = delete;

 private:
  int count_;
};

}  // namespace tidal
