// Checks of every CUDA and cuBLASLt call and of every kernel launch: a failure is a BackendError
// that carries the call, file:line, the error's name and, where a user can do something, the
// remedy.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "tidal/error.h"

namespace tidal {

// What a user can do about `status`; empty if nothing but reporting it.
inline std::string CudaRemedy(cudaError_t status) {
  switch (status) {
    case cudaErrorInsufficientDriver:
      return "; update the NVIDIA driver, or use device=\"cpu\"";
    case cudaErrorNoDevice:
      return "; use device=\"cpu\", or make a GPU visible (CUDA_VISIBLE_DEVICES)";
    case cudaErrorNoKernelImageForDevice:
      return "; this build has no code for this GPU: rebuild with CMAKE_CUDA_ARCHITECTURES set to "
             "it";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorAssert:
      return "; the GPU context of this process is lost: start a new process";
    default:
      return "";
  }
}

// Throws BackendError unless `status` is success. An asynchronous failure of an earlier kernel is
// reported by whichever call comes next, so the message does not blame `what` alone.
inline void CheckCuda(cudaError_t status, const char* what, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it if it is not sticky; a sticky error stays and fails every later
                       // call
  throw BackendError(Concat("CUDA: ", what, " (", file, ":", line, "): ", cudaGetErrorName(status),
                            ": ", cudaGetErrorString(status),
                            ", in this call or in work queued before it", CudaRemedy(status)));
}

}  // namespace tidal

#define TIDAL_CUDA_CHECK(call) ::tidal::CheckCuda((call), #call, __FILE__, __LINE__)

// Right after every <<<>>>; `kernel_name` names the op for the message.
#define TIDAL_LAUNCH_CHECK(kernel_name) \
  ::tidal::CheckCuda(cudaGetLastError(), "launch of " kernel_name, __FILE__, __LINE__)
