// Float vectors of the instruction set this translation unit is compiled for, and exp on them.
//
// The kernels (kernels/*.h) are written once over these and compiled three times (kernels_*.cc),
// each time with its own compiler flags and inside its own namespace TIDAL_CPU_ISA. Nothing that
// the linker may share between translation units (std templates, inline functions of core/) is
// called from there: the shared copy could hold instructions that the processor lacks.
#pragma once

#if !defined(TIDAL_CPU_ISA)
#error "include this only from a kernels_*.cc, which defines TIDAL_CPU_ISA"
#endif

#if defined(TIDAL_CPU_ISA_AVX512)
#include "backend/cpu/simd/simd_avx512.h"
#elif defined(TIDAL_CPU_ISA_AVX2)
#include "backend/cpu/simd/simd_avx2.h"
#else
#include "backend/cpu/simd/simd_generic.h"
#endif

namespace tidal::TIDAL_CPU_ISA {

// exp(x) to about 1 ulp; -inf gives 0, above 88.7 inf, NaN stays NaN. Range reduction by ln 2 in
// two parts and the degree-5 polynomial of Cephes' expf.
inline Vec Exp(Vec x) {
  // Outside, the result is 0 or inf anyway. The operand order lets NaN through.
  x = Min(Set1(89.0f), Max(Set1(-104.0f), x));
  Vec n = Round(Mul(x, Set1(1.44269504088896341f)));
  Vec r = Fma(n, Set1(-0.693359375f), x);
  r = Fma(n, Set1(2.12194440e-4f), r);
  Vec p = Set1(1.9875691500e-4f);
  p = Fma(p, r, Set1(1.3981999507e-3f));
  p = Fma(p, r, Set1(8.3334519073e-3f));
  p = Fma(p, r, Set1(4.1665795894e-2f));
  p = Fma(p, r, Set1(1.6666665459e-1f));
  p = Fma(p, r, Set1(5.0000001201e-1f));
  p = Add(Fma(p, Mul(r, r), r), Set1(1.0f));
  return ScaleByPowerOf2(p, n);
}

// One lane of Exp.
inline float ExpScalar(float x) {
  float lanes[kWidth];
  Store(lanes, Exp(Set1(x)));
  return lanes[0];
}

// Calls full(i) for whole vectors of [0, count) and part(i, rest) for what remains.
template <typename Full, typename Part>
inline void ForVectors(int64_t count, Full full, Part part) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) full(i);
  if (i < count) part(i, static_cast<int>(count - i));
}

template <typename A>
inline A Smaller(A a, A b) {
  return b < a ? b : a;
}
template <typename A>
constexpr A Larger(A a, A b) {
  return a < b ? b : a;
}

}  // namespace tidal::TIDAL_CPU_ISA
