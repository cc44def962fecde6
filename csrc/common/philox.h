// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), for C++ and CUDA. The specification of how the
// token law uses it is kernels/noise.py.
#pragma once

#include <cstdint>

// Internal linkage on purpose: files compiled for different instruction sets include this, and the linker must not mix their copies.
#if defined(__CUDACC__)
#define ENGINE_HD static __host__ __device__ __forceinline__
#else
#define ENGINE_HD static inline
#endif

namespace engine {

constexpr uint32_t kDomainSample = 0;    // words of the draw itself
constexpr uint32_t kDomainCoin = 1;      // of the decisions of verify_block,
constexpr uint32_t kDomainResidual = 2;  // and of its last draw
constexpr uint32_t kDomainTail = 4;      // added to a domain: the 32 further bits of its words (of the draws those below kTailWords)
constexpr uint32_t kTailWords = 256;

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers of words 0 and 2
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // added to the key after each round
constexpr int kPhiloxRounds = 10;

struct Philox {
    uint32_t word[4];
};

ENGINE_HD Philox philox4x32(Philox c, uint32_t k0, uint32_t k1) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = uint64_t{kPhiloxM0} * c.word[0], p1 = uint64_t{kPhiloxM1} * c.word[2];
        c = {{static_cast<uint32_t>(p1 >> 32) ^ c.word[1] ^ k0, static_cast<uint32_t>(p1), static_cast<uint32_t>(p0 >> 32) ^ c.word[3] ^ k1,
              static_cast<uint32_t>(p0)}};
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    return c;
}

// Where the noise of a row comes from.
struct NoiseKey {
    uint64_t seed;
    uint32_t position, stream;
};

// The words of tokens 4 * index .. 4 * index + 3.
ENGINE_HD Philox noise_words(NoiseKey key, uint32_t index, uint32_t domain) {
    return philox4x32({{index, key.position, key.stream, domain}}, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
}

}  // namespace engine
