// The kernels of kernels_avx512.cc, but those that gain by AVX-512 VNNI.
#define TIDAL_CPU_ISA isa_avx512_vnni
#define TIDAL_CPU_ISA_AVX512
#define TIDAL_CPU_ISA_VNNI

#include "backend/cpu/kernels/shadow.h"

namespace tidal {

const CpuKernels& Avx512VnniKernels() {
  static const CpuKernels table = [] {
    CpuKernels kernels = Avx512Kernels();
    kernels.name = "AVX-512 VNNI";
    kernels.score_shadow = isa_avx512_vnni::ScoreShadow;
    return kernels;
  }();
  return table;
}

}  // namespace tidal
