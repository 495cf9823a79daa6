// OpenBLAS behind Sgemm, and its version. Found by third_party/FindOpenBlas.cmake; the build in the
// scipy-openblas32 package prefixes its symbols.
#include "backend/cpu/blas.h"

#include <cblas.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "backend/cpu/cpu_info.h"
#include "core/thread_pool.h"
#include "tidal/error.h"

#ifndef TIDAL_BLAS_PREFIX
#define TIDAL_BLAS_PREFIX
#endif
#define TIDAL_BLAS_PASTE(prefix, name) prefix##name
#define TIDAL_BLAS_EXPAND(prefix, name) TIDAL_BLAS_PASTE(prefix, name)
#define TIDAL_BLAS(name) TIDAL_BLAS_EXPAND(TIDAL_BLAS_PREFIX, name)

namespace tidal {
namespace {

// What a buffer takes of the address space.
#if defined(__x86_64__)
constexpr int64_t kBufferBytes = int64_t{34} << 20;
#else
constexpr int64_t kBufferBytes = int64_t{130} << 20;
#endif

// OpenBLAS ends the process when its table of buffers is full; the smallest one has 640 places.
constexpr int kMostBuffers = 512;

// The state of OpenBLAS in this process. A fork waits until no product runs: a child could never
// take the locks that one holds.
class BlasState {
 public:
  static BlasState& Get() {
    static auto* state = new BlasState;  // products may run until the process ends
    return *state;
  }

  // Waits while as many products run as there are buffers, and while the process forks.
  void BeginProduct() {
    while (++num_products_ > most_products_ || is_forking_) {
      --num_products_;
      std::this_thread::yield();
    }
  }
  void EndProduct() { --num_products_; }

  void Add(int count) {
    std::lock_guard lock(mutex_);
    int wanted = std::min(num_threads_ + count, kMostBuffers);
    if (wanted > num_buffers_) TakeBuffers(wanted);
    num_threads_ += count;
  }
  void Remove(int count) {
    std::lock_guard lock(mutex_);
    num_threads_ -= count;
  }

 private:
  BlasState() {
    // The threads of a product are ours, not OpenBLAS's.
    TIDAL_BLAS(openblas_set_num_threads)(1);
    pthread_atfork([] { Get().BeginFork(); }, [] { Get().EndFork(); }, [] { Get().EndFork(); });
  }

  void BeginFork() {
    mutex_.lock();
    is_forking_ = true;
    while (num_products_ > 0) std::this_thread::yield();
  }
  void EndFork() {
    is_forking_ = false;
    mutex_.unlock();
  }

  void TakeBuffers(int count);

  std::mutex mutex_;
  int num_threads_ = 0;  // of all BlasThreads
  int num_buffers_ = 0;
  std::atomic<int> most_products_{1};  // at a time; at least one, for who has no BlasThreads
  std::atomic<int> num_products_{0};   // that run, or are about to
  std::atomic<bool> is_forking_{false};
};

// Runs `count` products at the same time.
void BlasState::TakeBuffers(int count) {
  auto bytes = static_cast<size_t>((count - num_buffers_) * kBufferBytes);
  void* room = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TIDAL_CHECK(room != MAP_FAILED, OutOfMemoryError, "cpu: the buffers of OpenBLAS for ", count,
              " threads need ", bytes >> 20,
              " MiB of address space, which are not there; lower num_threads, or raise the limit");
  munmap(room, bytes);
  // Each takes far longer than the threads need to leave the barrier.
  constexpr int64_t kSize = 512;
  std::vector<float> factor(kSize * kSize, 0.0f);
  std::vector<std::vector<float>> products(static_cast<size_t>(count), factor);
  std::atomic<int> num_there{0};
  ThreadPool pool(count);
  most_products_ = count;
  pool.Run(count, [&](int thread) {
    ++num_there;
    while (num_there < count) std::this_thread::yield();
    SgemmArgs args;
    args.m = args.n = args.k = args.lda = args.ldb = args.ldc = kSize;
    args.a = args.b = factor.data();
    args.c = products[static_cast<size_t>(thread)].data();
    Sgemm(args);
  });
  num_buffers_ = count;
}

}  // namespace

BlasThreads::BlasThreads(int count) : count_(count) {
  BlasState::Get().Add(count);
}

BlasThreads::~BlasThreads() {
  BlasState::Get().Remove(count_);
}

void Sgemm(const SgemmArgs& args) {
  BlasState& state = BlasState::Get();
  state.BeginProduct();
  TIDAL_BLAS(cblas_sgemm)
  (CblasRowMajor, CblasNoTrans, args.b_transposed ? CblasTrans : CblasNoTrans,
   static_cast<blasint>(args.m), static_cast<blasint>(args.n), static_cast<blasint>(args.k), 1.0f,
   args.a, static_cast<blasint>(args.lda), args.b, static_cast<blasint>(args.ldb),
   args.accumulate ? 1.0f : 0.0f, args.c, static_cast<blasint>(args.ldc));
  state.EndProduct();
}

std::string BlasDescription() {
  std::string config = TIDAL_BLAS(openblas_get_config)();
  const std::string name = "OpenBLAS ";
  if (config.rfind(name, 0) == 0) config.erase(0, name.size());
  return config;
}

}  // namespace tidal
