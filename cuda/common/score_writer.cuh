// How decode attention writes its scores: from the lanes that computed them to rows in device
// memory, four tokens a store.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/op_args.h"
#include "common/launch_config.h"
#include "common/reduce.cuh"

namespace tidal {

// Where scores go: [B, Hq, row_length].
struct ScoreRows {
  float* first;
  int64_t row_length;
  bool are_aligned;  // all rows begin at a multiple of 16 bytes
};

inline ScoreRows MakeScoreRows(const TensorView& scores) {
  float* first = scores.data<float>();
  int64_t row_length = scores.dim(2);
  return {.first = first,
          .row_length = row_length,
          .are_aligned =
              reinterpret_cast<uintptr_t>(first) % sizeof(float4) == 0 && row_length % 4 == 0};
}

// Stores the scores of a block's heads, a warp a tile.
class ScoreWriter {
 public:
  // first_row: batch * Hq + q_head of the block's first head.
  __device__ __forceinline__ ScoreWriter(const ScoreRows& rows, int64_t first_row, int num_heads)
      : stores_(Head() < num_heads),
        are_aligned_(rows.are_aligned),
        lane_target_(rows.first + (first_row + Head()) * rows.row_length + Token()) {}

  // `scores` as of DecodeWarp::Scores; of the tokens in `valid`. They pass through `staging`, 640
  // bytes of shared memory, so that a lane has four tokens of one head and the warp needs one store
  // instruction.
  __device__ __forceinline__ void Store(int first_token, const float (&scores)[4], unsigned valid,
                                        float* staging) const {
    constexpr int kStride = kDecodeWarpTile + 4;  // heads 2 apart begin 8 banks apart
    int lane = threadIdx.x % kWarpSize;
    __syncwarp();  // staging is free
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int head = lane % 4 * 2 + c % 2, token = lane / 4 + c / 2 * 8;
      staging[head * kStride + token] = scores[c];
    }
    __syncwarp();
    float4 four = *reinterpret_cast<const float4*>(staging + Head() * kStride + Token());
    float* target = lane_target_ + first_token;
    unsigned present = stores_ ? (valid >> Token()) & 0xfu : 0u;
    if (present == 0xfu && are_aligned_) {
      __stcg(reinterpret_cast<float4*>(target), four);
    } else {
      if ((present & 1u) != 0) target[0] = four.x;
      if ((present & 2u) != 0) target[1] = four.y;
      if ((present & 4u) != 0) target[2] = four.z;
      if ((present & 8u) != 0) target[3] = four.w;
    }
  }

 private:
  // What this lane stores: four tokens of one head of a tile.
  __device__ __forceinline__ static int Head() {
    return threadIdx.x % kWarpSize / 4;
  }
  __device__ __forceinline__ static int Token() {
    return threadIdx.x % 4 * 4;
  }

  bool stores_;
  bool are_aligned_;
  float* lane_target_;  // of a tile that begins at token 0
};

}  // namespace tidal
