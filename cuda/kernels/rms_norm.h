// RmsNorm on the GPU: from the float32 residual stream to the activation dtype.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// When the next kernel may start. At once: before the kernel in front of this one has ended, too;
// for a next kernel that reads nothing but weights before its wait (an exception to rule 1 of
// dependent_launch.cuh).
enum class LaunchNext { kAfterWait, kAtOnce };

void LaunchRmsNorm(const RmsNormArgs& args, LaunchNext launch_next, cudaStream_t stream);

}  // namespace tidal
