// The CPU kernels for AVX-512 F, BW, VL and DQ (compiler flags: CMakeLists.txt).
#define TIDAL_CPU_ISA isa_avx512
#define TIDAL_CPU_ISA_AVX512
#define TIDAL_CPU_ISA_NAME "AVX-512"

#include "backend/cpu/kernels/table.h"

namespace tidal {

const CpuKernels& Avx512Kernels() {
  return isa_avx512::kTable;
}

}  // namespace tidal
