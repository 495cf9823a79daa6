// Host memory of the CPU backend: from the system page by page, so that a large cache costs nothing
// until it is used.
#include <sys/mman.h>

#include <cerrno>

#include "backend/cpu/context.h"
#include "backend/cpu/cpu_info.h"
#include "tidal/error.h"

namespace tidal {
namespace {

constexpr int64_t kMiB = 1 << 20;

[[noreturn]] void ThrowOutOfMemory(int64_t bytes, const std::string& what, int64_t have) {
  throw OutOfMemoryError(Concat("cpu: ", what, " needs ", (bytes + kMiB - 1) / kMiB, " MiB, have ",
                                have / kMiB,
                                " MiB of memory; lower max_seq_len, max_batch_size or ",
                                "num_pages, or use a smaller dtype"));
}

}  // namespace

Buffer AllocateHostMemory(int64_t bytes, const std::string& what) {
  if (bytes <= 0) return Buffer();
  // mmap itself promises more than there is.
  constexpr int64_t kAlwaysFits = 16 * kMiB;
  if (bytes > kAlwaysFits) {
    const int64_t have = ReadHostMemory().free_bytes;
    if (bytes > have) ThrowOutOfMemory(bytes, what, have);
  }
  const size_t size = static_cast<size_t>(bytes);
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) ThrowOutOfMemory(bytes, what, ReadHostMemory().free_bytes);
#ifdef MADV_HUGEPAGE
  // Fewer translation misses where pages of the cache are read in any order. Only a hint.
  madvise(data, size, MADV_HUGEPAGE);
#endif
  return Buffer(data, bytes, [size](void* pointer) { munmap(pointer, size); });
}

}  // namespace tidal
