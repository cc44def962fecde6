// Step 7 of the contract: the token with the best score of a block. Scores need two logarithms, bounds of them none
// (kernels/triton/noise.py has the proof): a first walk finds the largest lower bound, a second works out only the scores whose upper bound
// reaches it.
#pragma once

#include "cuda/sample_block.h"

namespace engine::cuda {

struct Bounds {
    float lower, upper;
};

// lower <= -log(E) <= upper of a word, whatever its tail; rounding the sums with z keeps that order.
ENGINE_DEVICE Bounds noise_bounds(uint32_t word) {
    constexpr float kStep = 0x1.62e43p-24f;  // ln(2) / 2^23
    const float cut = bits_to_float(word >> 9 | 0x3F800000u) - 1.0f;
    const float g = static_cast<float>(0x3F800000 - static_cast<int32_t>(float_to_bits(cut))) * kStep;
    return {word < 1u << 28 ? (g < 12.47f ? g : 12.47f) - 0.17f : -3.2f, g + 1e-4f};
}

// One of the four; chosen, for an index would put them into memory.
ENGINE_DEVICE uint32_t word_of(const Philox& words, uint32_t which) {
    return which < 2 ? (which == 0 ? words.word[0] : words.word[1]) : (which == 2 ? words.word[2] : words.word[3]);
}

// log(E) of token 4 * index + which.
ENGINE_DEVICE float log_exponential(NoiseKey key, uint32_t index, uint32_t which, uint32_t word) {
    const uint32_t low = word < kTailWords ? word_of(noise_words(key, index, kDomainTail), which) : 0;
    return fixed_log(noise_exponential(word, low));
}

// The key of the best score of the block's tokens with z at or above `threshold`, to all threads; 0 where there is none.
ENGINE_DEVICE uint64_t race(Shared& s, const uint32_t* z, int first, int chunk, NoiseKey noise, uint32_t threshold) {
    uint32_t lower = 0, upper = 0;
#pragma unroll 1
    for (int i = 4 * thread_index(); i < chunk; i += 4 * kSampleThreads) {
        const Words four = *reinterpret_cast<const Words*>(z + i);
        if (larger(larger(four.word[0], four.word[1]), larger(four.word[2], four.word[3])) < threshold) continue;
        const Philox words = noise_words(noise, static_cast<uint32_t>(first + i) / 4, kDomainSample);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (four.word[j] < threshold) continue;
            const Bounds bounds = noise_bounds(words.word[j]);
            lower = larger(lower, ordered(unordered(four.word[j]) + bounds.lower));
            upper = larger(upper, ordered(unordered(four.word[j]) + bounds.upper));
        }
    }
    const uint32_t reach = static_cast<uint32_t>(block_largest(s, lower));
    uint64_t best = 0;
#pragma unroll 1
    for (int i = upper >= reach ? 4 * thread_index() : chunk; i < chunk; i += 4 * kSampleThreads) {
        const Words four = *reinterpret_cast<const Words*>(z + i);
        if (larger(larger(four.word[0], four.word[1]), larger(four.word[2], four.word[3])) < threshold) continue;
        const uint32_t index = static_cast<uint32_t>(first + i) / 4;
        const Philox words = noise_words(noise, index, kDomainSample);
#pragma unroll 1
        for (uint32_t j = 0; j < 4; ++j) {
            const uint32_t word = word_of(words, j);
            const float value = unordered(z[i + j]);
            if (z[i + j] < threshold || ordered(value + noise_bounds(word).upper) < reach) continue;
            best = larger(best, make_key(ordered(value - log_exponential(noise, index, j, word)), 4 * index + j));
        }
    }
    return block_largest(s, best);
}

// The same for a greedy row: the best z.
ENGINE_DEVICE uint64_t best_z(Shared& s, const uint32_t* z, int first, int chunk, uint32_t threshold) {
    uint64_t best = 0;
#pragma unroll 1
    for (int i = thread_index(); i < chunk; i += kSampleThreads)
        if (z[i] >= threshold) best = larger(best, make_key(z[i], static_cast<uint32_t>(first + i)));
    return block_largest(s, best);
}

}  // namespace engine::cuda
