// RopeTable: cos and sin of position x frequency, float32 throughout as in Hugging Face's rotary
// embeddings; the accurate cosf and sinf, whose range reduction holds at position 10^6.
#include "kernels/rope_table.h"

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"

namespace tidal {
namespace {

// grid (T), D / 2 threads: one per frequency. An idle row gets position 0; it is not read.
__global__ void RopeTableKernel(const int32_t* positions, const int32_t* seq_idx,
                                const float* inv_freq, float attention_scaling, float* cos_sin) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  int half = blockDim.x, i = threadIdx.x;
  int32_t position = positions[blockIdx.x];
  float angle = 0.0f, scaling = attention_scaling;
  if (position >= 0) {
    float frequency = inv_freq[static_cast<int64_t>(seq_idx[blockIdx.x]) * half + i];
    angle = static_cast<float>(position) * frequency;
    if (frequency == 0.0f) scaling = 1.0f;
  }
  float* out = cos_sin + static_cast<int64_t>(blockIdx.x) * 2 * half;
  out[i] = cosf(angle) * scaling;
  out[half + i] = sinf(angle) * scaling;
}

}  // namespace

void LaunchRopeTable(const RopeTableArgs& args, cudaStream_t stream) {
  int64_t num_tokens = args.cos_sin.dim(0), half = args.cos_sin.dim(1) / 2;
  if (num_tokens == 0) return;
  TIDAL_CHECK(half >= 1 && half <= 1024, UnsupportedError, "rope_table: head_dim ", 2 * half,
              " on CUDA; expected 2 to 2048");
  LaunchShape shape = {.grid = static_cast<unsigned>(num_tokens),
                       .block = static_cast<unsigned>(half)};
  LaunchOverlapped("rope_table", RopeTableKernel, shape, stream, args.positions.data<int32_t>(),
                   args.seq_idx.data<int32_t>(), args.inv_freq.data<float>(),
                   args.attention_scaling, args.cos_sin.data<float>());
}

}  // namespace tidal
