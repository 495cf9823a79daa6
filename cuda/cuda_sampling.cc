// The ops of the CUDA backend behind the layers: from logits to tokens, and what is told of these.
#include "backend/check_args.h"
#include "cuda_backend.h"
#include "kernels/logprobs.h"
#include "kernels/sample.h"

namespace tidal {

void CudaBackend::Sample(const SampleArgs& args) {
  Enter();
  Check(args);
  LaunchSample(args, stream());
}

void CudaBackend::Logprobs(const LogprobsArgs& args) {
  Enter();
  Check(args);
  LaunchLogprobs(args, stream());
}

}  // namespace tidal
