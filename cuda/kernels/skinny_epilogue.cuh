// What the finishing warp of a skinny product does with a tile of 16 outputs by 8 tokens
// (skinny_block.cuh, Epilogue).
#pragma once

#include <cstdint>

#include "common/elementwise.cuh"
#include "common/float8.cuh"
#include "common/paged_kv.cuh"
#include "common/vec.cuh"
#include "kernels/skinny_block.cuh"

namespace tidal {

// Tokens of lane l: 2 (l % 4) behind the first, and the next; weight rows l / 4 of both halves of a
// tile.
struct FinishLane {
  // What Begin hands to Finish; an epilogue that reads nothing before has nothing to say.
  struct Started {};

  int row;    // 0 to 7
  int token;  // the first of two

  __device__ FinishLane(int lane, int first_token)
      : row(lane / 4), token(first_token + lane % 4 * 2) {}
};

// Tiles that take the weight's rows one after the other.
__device__ __forceinline__ TileRows RowsInTurn(int tile) {
  return {tile * kTileRows, tile * kTileRows + kTileRows / 2};
}

// out [T, N] = product + bias.
template <typename T, typename Out>
struct StoreEpilogue {
  Out* out;
  const T* bias;  // [N] or null
  int num_outputs;
  int num_tokens;

  __device__ TileRows Rows(int tile) const { return RowsInTurn(tile); }

  struct Lane : FinishLane {
    const StoreEpilogue& e;
    __device__ Lane(const StoreEpilogue& epilogue, int lane, int first_token)
        : FinishLane(lane, first_token), e(epilogue) {}
    __device__ Started Begin(int) const { return {}; }
    __device__ void Finish(int tile, const Started&, const float (&values)[4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int output = tile * kTileRows + row + i / 2 * 8, t = token + i % 2;
        if (output >= e.num_outputs || t >= e.num_tokens) continue;
        e.out[int64_t{t} * e.num_outputs + output] =
            FromFloat32<Out>(values[i] + BiasOf(e.bias, output));
      }
    }
  };
};

// out [T, N] float32 += product + bias: the residual stream.
template <typename T>
struct AccumulateEpilogue {
  float* out;
  const T* bias;  // [N] or null
  int num_outputs;
  int num_tokens;

  __device__ TileRows Rows(int tile) const { return RowsInTurn(tile); }

  struct Lane : FinishLane {
    struct Started {
      float residual[4];
    };
    const AccumulateEpilogue& e;
    __device__ Lane(const AccumulateEpilogue& epilogue, int lane, int first_token)
        : FinishLane(lane, first_token), e(epilogue) {}
    __device__ float* Target(int tile, int i) const {
      int output = tile * kTileRows + row + i / 2 * 8, t = token + i % 2;
      return output < e.num_outputs && t < e.num_tokens
                 ? e.out + int64_t{t} * e.num_outputs + output
                 : nullptr;
    }
    __device__ Started Begin(int tile) const {
      Started started;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* target = Target(tile, i);
        started.residual[i] =
            target == nullptr ? 0.0f : *target + BiasOf(e.bias, tile * kTileRows + row + i / 2 * 8);
      }
      return started;
    }
    __device__ void Finish(int tile, const Started& started, const float (&values)[4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* target = Target(tile, i);
        if (target != nullptr) *target = started.residual[i] + values[i];
      }
    }
  };
};

// out [T, I] = what GateRule says; a tile is 8 rows of gate and the same 8 of up.
template <typename T>
struct GateMulEpilogue {
  T* out;
  const T* bias;  // [2 I] or null
  GateRule rule;
  int intermediate_size;
  int num_tokens;

  __device__ TileRows Rows(int tile) const { return {tile * 8, intermediate_size + tile * 8}; }

  struct Lane : FinishLane {
    const GateMulEpilogue& e;
    __device__ Lane(const GateMulEpilogue& epilogue, int lane, int first_token)
        : FinishLane(lane, first_token), e(epilogue) {}
    __device__ Started Begin(int) const { return {}; }
    __device__ void Finish(int tile, const Started&, const float (&values)[4]) const {
      int output = tile * 8 + row;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (token + i >= e.num_tokens) continue;
        float gate = values[i] + BiasOf(e.bias, output);
        float up = values[i + 2] + BiasOf(e.bias, e.intermediate_size + output);
        e.out[int64_t{token + i} * e.intermediate_size + output] =
            FromFloat32<T>(ActivationTimes(e.rule, gate, up));
      }
    }
  };
};

// q and k rotated (rotate-half layout), k and v appended to the paged cache; a tile is 8 elements
// of the first half of a head and their partners in the second half.
template <typename T>
struct RopeAppendEpilogue {
  const T* bias;              // [(Hq + 2 Hkv) * D] or null
  const float* q_cos_sin;     // [T, D]
  const float* k_cos_sin;     // [T, D]
  const int32_t* positions;   // [T]; -1 = idle
  const int32_t* seq_idx;     // [T]
  const int32_t* page_table;  // [B, max_pages]
  T* q;                       // [T, Hq, D]
  void* k_pages;              // [num_pages, Hkv, page_size, D] T, or Float8 of an fp8 cache
  void* v_pages;
  bool is_float8;
  float k_scale;  // of an fp8 cache
  float v_scale;
  int64_t max_pages;
  int num_q_heads;
  int num_kv_heads;
  int head_dim;
  int page_size;
  int num_tokens;

  __device__ TileRows Rows(int tile) const {
    int half = head_dim / 2, tiles_per_head = half / 8;
    int head = tile / tiles_per_head, within = tile - head * tiles_per_head;
    int first = head * head_dim + within * 8;
    return {first, first + half};
  }

  struct Lane : FinishLane {
    const RopeAppendEpilogue& e;
    int position[2];
    int64_t cache_row[2];  // of the token in the cache, for KV head 0

    __device__ Lane(const RopeAppendEpilogue& epilogue, int lane, int first_token)
        : FinishLane(lane, first_token), e(epilogue) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        position[i] = token + i < e.num_tokens ? e.positions[token + i] : -1;
        cache_row[i] = 0;
        if (position[i] < 0) continue;
        const int32_t* pages = e.page_table + e.seq_idx[token + i] * e.max_pages;
        cache_row[i] = PagedRow(pages, position[i], e.num_kv_heads, e.page_size);
      }
    }
    __device__ Started Begin(int) const {
      return {};
    }
    __device__ void Finish(int tile, const Started&, const float (&values)[4]) const {
      TileRows rows = e.Rows(tile);
      int head = rows.first / e.head_dim, half = e.head_dim / 2;
      int dim = rows.first - head * e.head_dim + row;  // in the first half
      float bias_low = BiasOf(e.bias, rows.first + row);
      float bias_high = BiasOf(e.bias, rows.second + row);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (token + i >= e.num_tokens) continue;
        float low = values[i] + bias_low, high = values[i + 2] + bias_high;
        if (position[i] < 0) {
          low = high = 0.0f;
        } else if (head < e.num_q_heads + e.num_kv_heads) {
          const float* angles =
              (head < e.num_q_heads ? e.q_cos_sin : e.k_cos_sin) + int64_t{token + i} * e.head_dim;
          RotatePair(low, high, angles[dim], angles[dim + half]);
        }
        if (head < e.num_q_heads) {
          T* target = e.q + (int64_t{token + i} * e.num_q_heads + head) * e.head_dim;
          target[dim] = FromFloat32<T>(low);
          target[dim + half] = FromFloat32<T>(high);
        } else if (position[i] >= 0) {
          Append(head - e.num_q_heads, i, dim, low, high);
        }
      }
    }

    // Elements dim and dim + D / 2 of a head of K, or behind those of V. Where a number of an fp8
    // row is not finite, all are not, unless a weight is not.
    __device__ void Append(int head, int i, int dim, float low, float high) const {
      bool is_v = head >= e.num_kv_heads;
      int kv_head = head - (is_v ? e.num_kv_heads : 0), half = e.head_dim / 2;
      int64_t row = cache_row[i] + int64_t{kv_head} * e.page_size;
      void* pages = is_v ? e.v_pages : e.k_pages;
      if (e.is_float8) {
        auto target = static_cast<Float8*>(pages) + row * e.head_dim + dim;
        float scale = is_v ? e.v_scale : e.k_scale;
        auto divided = [&](float value) {
          return isfinite(value) ? __fdiv_rn(value, scale) : __int_as_float(0x7fffffff);
        };
        target[0] = EncodeFloat8(divided(low));
        target[half] = EncodeFloat8(divided(high));
      } else {
        auto target = static_cast<T*>(pages) + row * e.head_dim + dim;
        target[0] = FromFloat32<T>(low);
        target[half] = FromFloat32<T>(high);
      }
    }
  };
};

}  // namespace tidal
