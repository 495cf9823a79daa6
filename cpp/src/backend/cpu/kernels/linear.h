// Matrix product for few rows: decode steps of up to some dozens of sequences.
//
// Every out[t, n] has one accumulator vector that walks in_features in order and is summed across
// lanes in one order, whatever the register tile: that makes a batch row equal to the row alone,
// bit for bit. Weights are widened in registers, so one row runs at the speed of reading them.
#pragma once

#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/simd/simd.h"

namespace tidal::TIDAL_CPU_ISA {

// Four weight rows at a time are four streams for the hardware prefetcher; four by four
// accumulators fit the registers of AVX-512, four by two those of the others.
inline constexpr int kTileOutputs = 4;
inline constexpr int kTileRows = kWidth == 16 ? 4 : 2;

template <typename W, int kRows, int kOutputs>
void LinearBlock(const LinearTile& tile, int64_t row, int64_t output) {
  const int64_t size = tile.in_features;
  const float* x = tile.x + row * size;
  const W* weight = static_cast<const W*>(tile.weight) + output * size;
  // The first rows of a batch read the weights from memory. Short rows end before the hardware has
  // seen a stream: there the same place of the next outputs is asked for.
  constexpr int64_t kShort = 16 * 1024 / sizeof(W);
  constexpr int64_t kLongAhead = 1024 / sizeof(W);
  const int64_t next = kTileOutputs * size <= kShort ? kTileOutputs * size : kLongAhead;
  const int64_t ahead = row == 0 ? next : 0;
  Vec acc[kRows][kOutputs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kOutputs; ++c) acc[r][c] = Zero();
  }
  auto step = [&](auto load, int64_t k) {
    Vec w[kOutputs];
#pragma GCC unroll 4
    for (int c = 0; c < kOutputs; ++c) {
      w[c] = load(weight + c * size + k);
      __builtin_prefetch(weight + c * size + k + ahead);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Vec a = load(x + r * size + k);
#pragma GCC unroll 4
      for (int c = 0; c < kOutputs; ++c) acc[r][c] = Fma(a, w[c], acc[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + kWidth <= size; k += kWidth) {
    step([](const auto* p) { return Load(p); }, k);
  }
  if (k < size) {
    const int rest = static_cast<int>(size - k);
    step([rest](const auto* p) { return LoadPartial(p, rest); }, k);
  }
  const W* bias = static_cast<const W*>(tile.bias);
  for (int r = 0; r < kRows; ++r) {
    float* out = tile.out + (row + r) * tile.out_stride + output;
    for (int c = 0; c < kOutputs; ++c) {
      float sum = ReduceAdd(acc[r][c]);
      if (bias != nullptr) sum += LoadScalar(bias + output + c);
      out[c] = tile.accumulate ? out[c] + sum : sum;
    }
  }
}

template <typename W, int kOutputs>
void LinearColumn(const LinearTile& tile, int64_t output) {
  int64_t row = 0;
  for (; row + kTileRows <= tile.num_rows; row += kTileRows) {
    LinearBlock<W, kTileRows, kOutputs>(tile, row, output);
  }
  for (; row < tile.num_rows; ++row) LinearBlock<W, 1, kOutputs>(tile, row, output);
}

template <typename W>
void Linear(const LinearTile& tile) {
  int64_t output = 0;
  for (; output + kTileOutputs <= tile.num_outputs; output += kTileOutputs) {
    LinearColumn<W, kTileOutputs>(tile, output);
  }
  for (; output < tile.num_outputs; ++output) LinearColumn<W, 1>(tile, output);
}

}  // namespace tidal::TIDAL_CPU_ISA
