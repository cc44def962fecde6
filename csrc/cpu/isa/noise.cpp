// The intermediates of the noise and of the masses, for tests.
#include "noise.h"

#include "../kernels.h"
#include "weight.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

void noise_of_row(int64_t seed, int32_t position, int32_t stream, int64_t vocab, uint32_t* words, uint32_t* lows) {
    const NoiseKey key = {static_cast<uint64_t>(seed), static_cast<uint32_t>(position), static_cast<uint32_t>(stream)};
    const RowNoise noise = row_noise(key);
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        uint32_t block[kBlock];
        block_words(noise, static_cast<uint32_t>(begin), block);
        const int64_t n = smaller(kBlock, vocab - begin);
        memcpy(words + begin, block, static_cast<size_t>(n) * 4);
        memset(lows + begin, 0, static_cast<size_t>(n) * 4);
        if (!any_at_most(block, kTailWords - 1)) continue;
        for (int64_t i = begin; i < begin + n; ++i)
            if (words[i] < kTailWords) lows[i] = noise_words(key, static_cast<uint32_t>(i / 4), kDomainTail).word[i & 3];
    }
}

void noise_of_words(const uint32_t* words, const uint32_t* lows, int64_t n, float* exponential, float* log_exponential) {
    for (int64_t i = 0; i < n; ++i) {
        exponential[i] = noise_exponential(words[i], lows[i]);
        log_exponential[i] = fixed_log(exponential[i]);
    }
}

void weights_of_values(const float* values, int64_t n, int64_t* weights) {
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        float w[kBlock];
        const int64_t count = smaller(kBlock, n - begin);
        weights_of(values + begin, count, 0.0f, w);
        for (int64_t i = 0; i < count; ++i) weights[begin + i] = static_cast<int64_t>(w[i]);
    }
}

}  // namespace ENGINE_ISA
}  // namespace engine
