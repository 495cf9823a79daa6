// Copies and conversions of large host memory on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>

#include "core/container.h"
#include "core/thread_pool.h"

namespace tidal {

// The threads of whoever copies: made when they are first needed.
class CopyThreads {
 public:
  // Calls body(begin, end) for pieces of `grain` elements of [0, count), the last one shorter, on
  // several threads. If some throw, the exception of the first piece in order is thrown on.
  template <typename Body>
  void ForPieces(int64_t count, int64_t grain, const Body& body) {
    const int64_t pieces = (count + grain - 1) / grain;
    std::mutex mutex;
    std::exception_ptr error;
    int64_t error_piece = pieces;
    std::atomic<int64_t> next{0};
    auto work = [&](int) {
      for (int64_t piece; (piece = next++) < pieces;) {
        try {
          body(piece * grain, std::min(count, (piece + 1) * grain));
        } catch (...) {
          std::lock_guard lock(mutex);
          if (piece < error_piece) {
            error = std::current_exception();
            error_piece = piece;
          }
        }
      }
    };
    if (pieces <= 1) {
      work(0);
    } else {
      ThreadPool& pool = Pool();
      pool.Run(static_cast<int>(std::min<int64_t>(pieces, pool.num_threads())), work);
    }
    if (error) std::rethrow_exception(error);
  }

 private:
  // Enough to take more from memory than a bus to a device carries; one thread copies some 10 GB/s.
  static constexpr int kMaxCopyThreads = 16;

  ThreadPool& Pool() {
    if (!pool_) {
      pool_ = std::make_unique<ThreadPool>(std::min(kMaxCopyThreads, DefaultNumThreads()));
    }
    return *pool_;
  }

  std::unique_ptr<ThreadPool> pool_;
};

}  // namespace tidal
