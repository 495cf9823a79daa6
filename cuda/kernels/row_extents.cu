// RowExtents: lengths and element offsets of each row.
#include "kernels/row_extents.h"

#include "common/check.h"

namespace tidal {
namespace {

constexpr int kThreads = 128;

// One thread for each of the B + 1 starts.
__global__ void RowExtentsKernel(const int32_t* q_starts, const int32_t* seq_lens, int num_rows,
                                 int elements_per_query, RowExtents out) {
  int row = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (row > num_rows) return;
  int32_t start = q_starts[row];
  out.q_offsets[row] = start * elements_per_query;
  if (row == num_rows) return;
  out.q_lens[row] = q_starts[row + 1] - start;
  out.kv_lens[row] = seq_lens[row];
}

}  // namespace

void LaunchRowExtents(const TensorView& q_starts, const TensorView& seq_lens,
                      int64_t elements_per_query, const RowExtents& out, cudaStream_t stream) {
  auto num_rows = static_cast<int>(seq_lens.dim(0));
  int num_blocks = num_rows / kThreads + 1;
  RowExtentsKernel<<<num_blocks, kThreads, 0, stream>>>(q_starts.data<int32_t>(),
                                                        seq_lens.data<int32_t>(), num_rows,
                                                        static_cast<int>(elements_per_query), out);
  TIDAL_LAUNCH_CHECK("row_extents");
}

}  // namespace tidal
