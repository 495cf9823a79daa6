// Embed: rows of the embedding table, widened to the float32 residual stream.
#include "kernels/embed.h"

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/vec.cuh"

namespace tidal {
namespace {

constexpr int kThreads = 256;

// grid (T); a block copies one row, a thread every kThreads-th group of kVec elements. An id
// outside the table gives zeros: the row of a sequence that ended with an error holds token -1.
template <typename T, int kVec>
__global__ void EmbedKernel(const int32_t* token_ids, const T* table, float* out,
                            int64_t vocab_size, int64_t hidden_size, float scale) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  int64_t token_id = token_ids[blockIdx.x];
  bool valid = token_id >= 0 && token_id < vocab_size;
  const T* source = table + (valid ? token_id : 0) * hidden_size;
  float* destination = out + blockIdx.x * hidden_size;
  for (int64_t i = threadIdx.x * kVec; i < hidden_size; i += kThreads * kVec) {
    float values[kVec] = {};
    if (valid) LoadFloats<kVec>(source + i, values);
    for (float& value : values) value *= scale;
    StoreFloats<kVec>(destination + i, values);
  }
}

}  // namespace

void LaunchEmbed(const EmbedArgs& args, cudaStream_t stream) {
  int64_t num_tokens = args.out.dim(0), hidden_size = args.out.dim(1);
  if (num_tokens == 0) return;
  bool vectorize =
      IsVectorizable(args.table, hidden_size, 4) && IsVectorizable(args.out, hidden_size, 4);
  DispatchHalf(args.table.dtype, "embed", [&](auto tag) {
    using T = typename decltype(tag)::Type;
    auto kernel = vectorize ? EmbedKernel<T, 4> : EmbedKernel<T, 1>;
    LaunchOverlapped("embed", kernel,
                     {.grid = static_cast<unsigned>(num_tokens), .block = kThreads}, stream,
                     args.token_ids.data<int32_t>(), static_cast<const T*>(args.table.ptr),
                     args.out.data<float>(), args.table.dim(0), hidden_size, args.scale);
  });
}

}  // namespace tidal
