// The CPU kernels for AVX2, FMA and F16C (compiler flags: CMakeLists.txt).
#define TIDAL_CPU_ISA isa_avx2
#define TIDAL_CPU_ISA_AVX2
#define TIDAL_CPU_ISA_NAME "AVX2"

#include "backend/cpu/kernels/table.h"

namespace tidal {

const CpuKernels& Avx2Kernels() {
  return isa_avx2::kTable;
}

}  // namespace tidal
