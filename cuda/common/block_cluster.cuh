// Blocks that share one row of work: a thread block cluster, whose blocks run at the same time and
// reach each other's shared memory (CUDA programming guide, thread block clusters; compute
// capability 9.0 and later). Before that every block is a cluster of its own.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"

namespace tidal {

inline constexpr int kMaxClusterSize = 16;  // more than 8 is allowed where the device can

// The cluster of the calling block. A block may leave only when no other one can still reach for
// its shared memory: after a barrier that follows the last access.
class BlockCluster {
 public:
#if __CUDA_ARCH__ >= 900
  __device__ int rank() const {
    return static_cast<int>(group().block_rank());
  }
  __device__ int size() const {
    return static_cast<int>(group().num_blocks());
  }

  // The same variable in the shared memory of block `rank`.
  template <typename T>
  __device__ T* Map(T* shared, int rank) const {
    return group().map_shared_rank(shared, rank);
  }

  // A barrier of all threads of the cluster, for their writes too; or its two halves, the first of
  // them also for reads alone.
  __device__ void Sync() const {
    group().sync();
  }
  __device__ void Arrive() const {
    group().barrier_arrive();
  }
  __device__ void ArriveAfterReads() const {
    __cluster_barrier_arrive_relaxed();
  }
  __device__ void Wait() const {
    group().barrier_wait();
  }

 private:
  __device__ static cooperative_groups::cluster_group group() {
    return cooperative_groups::this_cluster();
  }
#else
  __device__ int rank() const {
    return 0;
  }
  __device__ int size() const {
    return 1;
  }
  template <typename T>
  __device__ T* Map(T* shared, int) const {
    return shared;
  }
  __device__ void Sync() const {
    __syncthreads();
  }
  __device__ void Arrive() const {}
  __device__ void ArriveAfterReads() const {}
  __device__ void Wait() const {
    __syncthreads();
  }
#endif
};

// One value of each block, by rank, to all blocks; `value` is the same in all threads of a block.
// Between a use of `slots` and the next lies another barrier of the cluster.
template <typename T>
__device__ __forceinline__ void ShareWithCluster(const BlockCluster& cluster, T value,
                                                 T (&slots)[kMaxClusterSize]) {
  int other = static_cast<int>(threadIdx.x);
  if (other < cluster.size()) *cluster.Map(&slots[cluster.rank()], other) = value;
  cluster.Sync();
}

// How many bytes of dynamic shared memory a block of `kernel` may have; allows them.
template <typename... Params>
int64_t AllowSharedBytes(void (*kernel)(Params...)) {
  int device = 0, limit = 0;
  cudaFuncAttributes compiled = {};
  TIDAL_CUDA_CHECK(cudaGetDevice(&device));
  TIDAL_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  TIDAL_CUDA_CHECK(cudaFuncGetAttributes(&compiled, kernel));
  int dynamic = limit - static_cast<int>(compiled.sharedSizeBytes);
  TIDAL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic));
  return dynamic;
}

// How many clusters of this shape run at once; 0: the device cannot run one.
template <typename... Params>
int64_t MaxActiveClusters(void (*kernel)(Params...), const LaunchShape& shape) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {shape.cluster_size, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // it names a size that the device does not have
    return 0;
  }
  return count;
}

// Blocks for each of `num_clusters` pieces of work, a power of two, at most max_size: so that all
// run in as few waves as can be, and then as many as can be. shared_bytes(size): dynamic shared
// memory of a block. 0 if that is too much for every size.
template <typename SharedBytes, typename... Params>
unsigned ChooseClusterSize(void (*kernel)(Params...), int num_threads, int64_t num_clusters,
                           int64_t max_size, const SharedBytes& shared_bytes) {
  int64_t allowed_bytes = AllowSharedBytes(kernel);
  if (!RunsHopperCode(kernel)) {
    return shared_bytes(1) <= allowed_bytes ? 1 : 0;
  }
  TIDAL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  unsigned best_size = 0;
  int64_t best_waves = 0;
  for (unsigned size = kMaxClusterSize; size > 0 && best_waves != 1; size /= 2) {
    if (size > max_size || shared_bytes(size) > allowed_bytes) continue;
    LaunchShape shape = {.grid = dim3(size),
                         .block = dim3(static_cast<unsigned>(num_threads)),
                         .shared_bytes = static_cast<size_t>(shared_bytes(size)),
                         .cluster_size = size};
    int64_t active = MaxActiveClusters(kernel, shape);
    if (active == 0 && size > 1) continue;
    int64_t waves = CeilDiv(num_clusters, std::max<int64_t>(active, 1));
    if (best_size == 0 || waves < best_waves) {
      best_size = size;
      best_waves = waves;
    }
  }
  return best_size;
}

}  // namespace tidal
