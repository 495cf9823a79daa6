// In place of attention_prefill_hopper.cu where no code for compute capability 9.0 is built.
#include "kernels/attention_prefill_hopper.h"
#include "tidal/error.h"

namespace tidal {

bool HasAttentionPrefillHopper(int) {
  return false;
}

bool FitsAttentionPrefillHopper(const AttentionPrefillArgs&) {
  return false;
}

void LaunchAttentionPrefillHopper(const AttentionPrefillArgs&, const AttentionScratch&,
                                  cudaStream_t) {
  throw BackendError("attention_prefill: this build has no code for compute capability 9.0");
}

}  // namespace tidal
