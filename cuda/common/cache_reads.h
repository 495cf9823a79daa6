// When a decode attention kernel, which may start before the kernel in front of it has ended
// (dependent_launch.cuh), begins to read.
#pragma once

namespace tidal {

enum class CacheReads {
  kInOrder,  // when the kernel in front has ended
  // At once: the kernel in front writes no page table, lengths or chosen positions, and of the
  // cache at most the newest token of each row, at position seq_len - 1. That token, and q, are
  // still read in order.
  kEarly,
};

}  // namespace tidal
