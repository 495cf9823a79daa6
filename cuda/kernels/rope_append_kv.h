// RopeAppendKv on the GPU: splits qkv, normalises and rotates q and k, appends k and v to the
// cache.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// head_dim 64, 80, 96, 128 or 256 (common/head_dims.h); anything else is an UnsupportedError.
void LaunchRopeAppendKv(const RopeAppendKvArgs& args, cudaStream_t stream);

}  // namespace tidal
