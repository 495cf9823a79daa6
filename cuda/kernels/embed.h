// Embed on the GPU: rows of the embedding table, widened to the float32 residual stream.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

void LaunchEmbed(const EmbedArgs& args, cudaStream_t stream);

}  // namespace tidal
