// RopeTable: cos and sin of position x frequency, float32 throughout as in Hugging Face's rotary
// embeddings; the accurate cosf and sinf, whose range reduction holds at position 10^6.
#include "kernels/rope_table.h"

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"

namespace tidal {
namespace {

struct RopeTableParams {
  const int32_t* positions;  // [T]
  const int32_t* seq_idx;    // [T]
  const float* inv_freq;     // [B, D / 2]
  float attention_scaling;
  float* cos_sin;    // [T, D]
  float* q_cos_sin;  // [T, D] or null
  float query_scale_beta;
  int64_t original_len;
};

// grid (T), D / 2 threads: one per frequency. An idle row gets position 0; it is not read.
__global__ void RopeTableKernel(const RopeTableParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  int half = blockDim.x, i = threadIdx.x;
  int32_t position = p.positions[blockIdx.x];
  float angle = 0.0f, scaling = p.attention_scaling;
  if (position >= 0) {
    float frequency = p.inv_freq[static_cast<int64_t>(p.seq_idx[blockIdx.x]) * half + i];
    angle = static_cast<float>(position) * frequency;
    if (frequency == 0.0f) scaling = 1.0f;
  }
  float cosine = cosf(angle) * scaling, sine = sinf(angle) * scaling;
  int64_t place = static_cast<int64_t>(blockIdx.x) * 2 * half + i;
  p.cos_sin[place] = cosine;
  p.cos_sin[place + half] = sine;
  if (p.q_cos_sin == nullptr) return;
  float lengths = 0.0f;
  if (position >= 0) lengths = static_cast<float>(position / p.original_len);
  float scale = 1.0f + p.query_scale_beta * logf(1.0f + lengths);
  p.q_cos_sin[place] = cosine * scale;
  p.q_cos_sin[place + half] = sine * scale;
}

}  // namespace

void LaunchRopeTable(const RopeTableArgs& args, cudaStream_t stream) {
  int64_t num_tokens = args.cos_sin.dim(0), half = args.cos_sin.dim(1) / 2;
  if (num_tokens == 0) return;
  TIDAL_CHECK(half >= 1 && half <= 1024, UnsupportedError, "rope_table: head_dim ", 2 * half,
              " on CUDA; expected 2 to 2048");
  LaunchShape shape = {.grid = static_cast<unsigned>(num_tokens),
                       .block = static_cast<unsigned>(half)};
  RopeTableParams params = {
      .positions = args.positions.data<int32_t>(),
      .seq_idx = args.seq_idx.data<int32_t>(),
      .inv_freq = args.inv_freq.data<float>(),
      .attention_scaling = args.attention_scaling,
      .cos_sin = args.cos_sin.data<float>(),
      .q_cos_sin = args.q_cos_sin ? args.q_cos_sin.data<float>() : nullptr,
      .query_scale_beta = args.query_scale_beta,
      .original_len = args.original_len,
  };
  LaunchOverlapped("rope_table", RopeTableKernel, shape, stream, params);
}

}  // namespace tidal
