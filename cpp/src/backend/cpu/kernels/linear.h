// Matrix product for few rows: decode steps of up to some dozens of sequences.
//
// Every out[t, n] has one accumulator vector that walks in_features in order and is summed across
// lanes in one order, whatever the register tile: that makes a batch row equal to the row alone,
// bit for bit. Weights become float32 in registers, so one row runs at the speed of reading them.
#pragma once

#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/kernels/weight_rows.h"
#include "backend/cpu/simd/simd.h"

namespace tidal::TIDAL_CPU_ISA {

// Four by four accumulators fit the registers of AVX-512, four by two those of the others. One row
// takes more outputs: their sums do not wait for each other.
inline constexpr int kTileOutputs = 4;
inline constexpr int kTileRows = kWidth == 16 ? 4 : 2;
inline constexpr int kOneRowOutputs = kWidth == 16 ? 8 : 4;

// sums: of kOutputs outputs of each row.
template <int kRows, int kOutputs>
void StoreSums(const LinearTile& tile, int64_t row, int64_t output, const float* sums) {
  float bias[WholeVectors(kOutputs)] = {};
  if (tile.bias != nullptr) LoadLanes(tile.bias, tile.bias_dtype, output, kOutputs, bias);
  for (int r = 0; r < kRows; ++r) {
    float* out = tile.out + (row + r) * tile.out_stride + output;
    for (int c = 0; c < kOutputs; ++c) {
      const float sum = sums[r * kOutputs + c] + bias[c];
      out[c] = tile.accumulate ? out[c] + sum : sum;
    }
  }
}

template <typename W, int kRows, int kOutputs>
void LinearBlock(const LinearTile& tile, int64_t row, int64_t output) {
  const WeightRows& weight = tile.weight;
  const int64_t size = weight.in_features, row_bytes = BytesOf<W>(size);
  const float* x = tile.x + row * size;
  const uint8_t* data = static_cast<const uint8_t*>(weight.data) + output * row_bytes;
  // The first rows of a batch read the weights from memory. A row may end before the hardware has
  // seen a stream, but the outputs lie one behind the other: each step asks for what comes later.
  constexpr int64_t kStepBytes = kOutputs * BytesOf<W>(kWidth);
  const uint8_t* ahead = data + (row > 0 ? 0 : Larger(kOutputs * row_bytes, kLeastAhead));
  constexpr int kSums = WholeVectors(kRows * kOutputs);
  Vec acc[kSums];  // of output c and row r at r * kOutputs + c
#pragma GCC unroll 16
  for (Vec& sum : acc) sum = Zero();
  typename W::Group group[kOutputs];
  auto step = [&](int64_t k, auto load_x, auto load_weight) {
    for (int64_t byte = 0; byte < kStepBytes; byte += 64) {
      __builtin_prefetch(ahead + kOutputs * BytesOf<W>(k) + byte);
    }
    Vec w[kOutputs];
#pragma GCC unroll 8
    for (int c = 0; c < kOutputs; ++c) {
      w[c] = load_weight(data + c * row_bytes + BytesOf<W>(k), group[c]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Vec a = load_x(x + r * size + k);
#pragma GCC unroll 8
      for (int c = 0; c < kOutputs; ++c) {
        acc[r * kOutputs + c] = Fma(a, w[c], acc[r * kOutputs + c]);
      }
    }
  };
  int64_t k = 0;
  for (int64_t g = 0; k < size; ++g) {
    W::Open(weight, output, g, group);
    const int64_t end = Smaller((g + 1) * weight.group_size, size);
    for (; k + kWidth <= end; k += kWidth) {
      step(
          k, [](const float* p) { return Load(p); },
          [](const uint8_t* p, const auto& of) { return W::Load(p, of); });
    }
    if (k < end) {
      const int rest = static_cast<int>(end - k);
      step(
          k, [rest](const float* p) { return LoadPartial(p, rest); },
          [rest](const uint8_t* p, const auto& of) { return W::LoadPartial(p, of, rest); });
      k = end;
    }
  }
  float sums[kSums];
#pragma GCC unroll 4
  for (int i = 0; i < kSums; i += kWidth) Store(sums + i, ReduceAddEach(acc + i));
  StoreSums<kRows, kOutputs>(tile, row, output, sums);
}

// Rows from `row` on, kRows at a time, and those that are left together.
template <typename W, int kRows, int kOutputs>
void LinearRows(const LinearTile& tile, int64_t row, int64_t output) {
  for (; row + kRows <= tile.num_rows; row += kRows) {
    LinearBlock<W, kRows, kOutputs>(tile, row, output);
  }
  if constexpr (kRows > 1) LinearRows<W, kRows - 1, kOutputs>(tile, row, output);
}

template <typename W>
void Linear(const LinearTile& tile) {
  const int64_t num_outputs = tile.weight.num_outputs;
  int64_t output = 0;
  if (tile.num_rows == 1) {
    for (; output + kOneRowOutputs <= num_outputs; output += kOneRowOutputs) {
      LinearBlock<W, 1, kOneRowOutputs>(tile, 0, output);
    }
  }
  for (; output + kTileOutputs <= num_outputs; output += kTileOutputs) {
    LinearRows<W, kTileRows, kTileOutputs>(tile, 0, output);
  }
  for (; output < num_outputs; ++output) LinearRows<W, kTileRows, 1>(tile, 0, output);
}

}  // namespace tidal::TIDAL_CPU_ISA
