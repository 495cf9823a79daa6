// AppendShadow on the GPU: keys of the cache to 4 bits.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

void LaunchAppendShadow(const AppendShadowArgs& args, cudaStream_t stream);

}  // namespace tidal
