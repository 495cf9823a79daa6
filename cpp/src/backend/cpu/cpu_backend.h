// The CPU backend with a say in its instruction set, for tests; everyone else uses MakeCpuBackend
// of backend/backend.h.
#pragma once

#include <cstdint>
#include <memory>

#include "backend/backend.h"
#include "backend/cpu/kernels/kernels.h"

namespace tidal {

enum class CpuIsa : int32_t { kAuto, kGeneric, kAvx2, kAvx512, kAvx512Vnni };

// Whether this build and this processor have it.
bool HasIsa(CpuIsa isa);

// kAuto: the widest there is. Throws UnsupportedError if the processor lacks `isa`.
const CpuKernels& SelectKernels(CpuIsa isa);

std::unique_ptr<Backend> MakeCpuBackend(const BackendOptions& options, CpuIsa isa);

}  // namespace tidal
