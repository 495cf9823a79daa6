// Bulk copies from global to shared memory by the copy engine, and the barriers in shared memory
// that they complete on (PTX ISA, cp.async.bulk and mbarrier; compute capability 9.0 and later).
//
// A barrier goes through phases: a phase ends when all arrivals it was initialised for have come
// and all announced bytes have landed. Waiters name the parity of the phase they wait for: 0 for
// the first, 1 for the second, and so on.
#pragma once

#include <cstdint>

namespace tidal {

using SharedBarrier = uint64_t;

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

__device__ __forceinline__ uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// By one thread; then FenceBarrierInit and a block barrier before anyone uses it.
__device__ __forceinline__ void InitBarrier(SharedBarrier* barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(SharedAddress(barrier)),
               "r"(num_arrivals)
               : "memory");
}

// Makes the initialisation visible to the copy engine.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void Arrive(SharedBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(SharedAddress(barrier))
               : "memory");
}

// Arrives and announces `bytes` of copies that the phase waits for.
__device__ __forceinline__ void ArriveExpectingBytes(SharedBarrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

// Returns when the phase of this parity has ended; what was written before its arrivals, and the
// copies it waited for, are visible then.
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

// Starts a copy; its bytes count towards the barrier's phase. Addresses and `bytes` are multiples
// of 16.
__device__ __forceinline__ void CopyBulk(void* shared, const void* global, uint32_t bytes,
                                         SharedBarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}

#endif

}  // namespace tidal
