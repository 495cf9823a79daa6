// Asynchronous copies of 16 bytes, and of 4, from global to shared memory (PTX ISA, cp.async; sm_80
// and later).
//
// Each thread counts its own groups. A thread sees its own copies after WaitCopies; other threads
// see them after a barrier that follows it.
#pragma once

#include <cstdint>

namespace tidal {

// Copies 16 bytes, or writes 16 zero bytes without reading `global` if not `valid`. Both addresses
// are multiples of 16. L1 is bypassed: a cache row is read once.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global, bool valid) {
  auto destination = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  int source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(destination),
               "l"(global), "r"(source_bytes)
               : "memory");
}

// The same under an L2 policy.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global, bool valid,
                                            uint64_t policy) {
  auto destination = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  int source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;\n" ::"r"(
                   destination),
               "l"(global), "r"(source_bytes), "l"(policy)
               : "memory");
}

// Copies 4 bytes; both addresses are multiples of 4.
__device__ __forceinline__ void CopyAsync4(void* shared, const void* global) {
  auto destination = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(destination), "l"(global)
               : "memory");
}

// An L2 policy for what is read once: it makes room before anything else does.
__device__ __forceinline__ uint64_t EvictFirstPolicy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}

// Closes a group: all copies of this thread since the last commit, possibly none.
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's newest groups are still under way.
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace tidal
