// Barriers in shared memory (PTX ISA, mbarrier; compute capability 9.0 and later), for threads that
// wait for others without stopping them.
//
// A barrier goes through phases: a phase ends when all arrivals it was initialised for have come.
// Waiters name the parity of the phase they wait for: 0 for the first, 1 for the second, and so on.
#pragma once

#include <cstdint>

namespace tidal {

using SharedBarrier = uint64_t;

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

__device__ __forceinline__ uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// By one thread; then a block barrier before anyone uses it.
__device__ __forceinline__ void InitBarrier(SharedBarrier* barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(SharedAddress(barrier)),
               "r"(num_arrivals)
               : "memory");
}

__device__ __forceinline__ void Arrive(SharedBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(SharedAddress(barrier))
               : "memory");
}

// Returns when the phase of this parity has ended; what was written before its arrivals is
// visible then.
__device__ __forceinline__ void WaitBarrier(SharedBarrier* barrier, uint32_t parity) {
  uint32_t address = SharedAddress(barrier), done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  }
}

#endif

}  // namespace tidal
