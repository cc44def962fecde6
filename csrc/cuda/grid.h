// What the kernels use of the device, behind names that a C++ compiler knows too: threads and blocks, barriers, shuffles, atomics. Without
// nvcc `grid_emulated.h` (tests/ops/) takes its place: it runs the threads of a few blocks as coroutines that switch at barriers and
// shuffles, in any order between them, so that the same source is tested without a GPU.
//
// Shuffles are between all 32 threads of a warp, barriers between all threads of a block: no kernel calls them where threads differ.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define ENGINE_DEVICE static __device__ __forceinline__
#define ENGINE_DEVICE_METHOD __device__ __forceinline__
#else
#define ENGINE_DEVICE static inline
#define ENGINE_DEVICE_METHOD inline
#endif

namespace engine::cuda {

constexpr int kWarp = 32;

// 16 bytes that are loaded and stored at once.
struct alignas(16) Words {
    uint32_t word[4];
};

#if defined(__CUDACC__)

ENGINE_DEVICE int thread_index() { return int(threadIdx.x); }
ENGINE_DEVICE int block_index() { return int(blockIdx.x); }
ENGINE_DEVICE void block_barrier() { __syncthreads(); }
ENGINE_DEVICE uint32_t shuffle_xor(uint32_t x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
ENGINE_DEVICE uint64_t shuffle_xor(uint64_t x, int lanes) {
    return __shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(x), lanes);
}
// Of the thread `lanes` below; the first `lanes` threads of a warp get their own.
ENGINE_DEVICE uint64_t shuffle_up(uint64_t x, int lanes) { return __shfl_up_sync(0xffffffffu, static_cast<unsigned long long>(x), lanes); }

// Atomics, in global or shared memory; they order nothing else.
ENGINE_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t x) { return atomicAdd(at, x); }
ENGINE_DEVICE void atomic_add(uint64_t* at, uint64_t x) { atomicAdd(reinterpret_cast<unsigned long long*>(at), x); }
ENGINE_DEVICE void atomic_max(uint32_t* at, uint32_t x) { atomicMax(at, x); }
ENGINE_DEVICE uint32_t atomic_or(uint32_t* at, uint32_t x) { return atomicOr(at, x); }

// What other blocks wrote in this launch: from L2, past this SM's own cache.
ENGINE_DEVICE uint32_t load_shared_by_blocks(const uint32_t* at) { return __ldcg(at); }
ENGINE_DEVICE uint64_t load_shared_by_blocks(const uint64_t* at) { return __ldcg(reinterpret_cast<const unsigned long long*>(at)); }

// Between what a thread (after a block barrier: its block) wrote or read before and what it writes or reads after, for all blocks.
ENGINE_DEVICE void fence() { __threadfence(); }
ENGINE_DEVICE uint32_t load_volatile(const uint32_t* at) { return *static_cast<const volatile uint32_t*>(at); }
// Return when *at is something else than x.
ENGINE_DEVICE void wait_while(const uint32_t* at, uint32_t x) {
    while (load_volatile(at) == x) {
    }
}

ENGINE_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
ENGINE_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
ENGINE_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }

#else

ENGINE_DEVICE float bits_to_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
ENGINE_DEVICE uint32_t float_to_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

#endif

}  // namespace engine::cuda

#if !defined(__CUDACC__)
#include "grid_emulated.h"
#endif
