// Launches combine_splits.cuh for the dtype and head_dim at hand.
#include "kernels/combine_splits.h"

#include "common/check.h"
#include "common/dispatch.h"
#include "kernels/combine_splits.cuh"

namespace tidal {
namespace {

template <typename T, int kHeadDim>
void RunCombineSplits(const CombineSplitsArgs& args, cudaStream_t stream) {
  dim3 grid(static_cast<unsigned>(args.num_q_heads), static_cast<unsigned>(args.batch_size));
  auto kernel = CombineSplitsKernel<T, kHeadDim>;
  kernel<<<grid, kHeadDim, 0, stream>>>(args.partials, args.attended, args.num_splits,
                                        static_cast<T*>(args.out), args.lse);
  TIDAL_LAUNCH_CHECK("combine_splits");
}

}  // namespace

void LaunchCombineSplits(const CombineSplitsArgs& args, cudaStream_t stream) {
  TIDAL_CHECK(args.head_dim == 64 || args.head_dim == 128, UnsupportedError,
              "combine_splits: head_dim ", args.head_dim, "; compiled in are 64 and 128");
  DispatchHalf(args.dtype, "combine_splits", [&](auto type) {
    using T = typename decltype(type)::Type;
    if (args.head_dim == 64) {
      RunCombineSplits<T, 64>(args, stream);
    } else {
      RunCombineSplits<T, 128>(args, stream);
    }
  });
}

}  // namespace tidal
