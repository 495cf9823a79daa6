// Copies and conversions of large host memory on several threads; the ops of the CPU backend have
// their own (backend/cpu/context.h).
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <exception>

namespace tidal {

// Enough to take more from memory than a bus to a device carries; one thread copies some 10 GB/s.
inline constexpr int64_t kMaxCopyThreads = 16;

// Calls body(begin, end) for pieces of `grain` elements of [0, count), the last one shorter, on
// several threads. If some throw, the exception of the first piece in order is thrown on.
template <typename Body>
void ForPieces(int64_t count, int64_t grain, const Body& body) {
  const int64_t pieces = (count + grain - 1) / grain;
  if (pieces <= 0) return;
  const int64_t threads = std::min({pieces, kMaxCopyThreads, int64_t{omp_get_max_threads()}});
  std::exception_ptr error;
  int64_t error_piece = pieces;
#pragma omp parallel for num_threads(static_cast <int>(threads)) \
    schedule(dynamic, 1) if (threads > 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    try {
      body(piece * grain, std::min(count, (piece + 1) * grain));
    } catch (...) {
#pragma omp critical(tidal_for_pieces)
      if (piece < error_piece) {
        error = std::current_exception();
        error_piece = piece;
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace tidal
