// The CPU kernels for the baseline of the target, on every architecture (compiler flags:
// CMakeLists.txt).
#define TIDAL_CPU_ISA isa_generic
#define TIDAL_CPU_ISA_NAME "generic"

#include "backend/cpu/kernels/table.h"

namespace tidal {

const CpuKernels& GenericKernels() {
  return isa_generic::kTable;
}

}  // namespace tidal
