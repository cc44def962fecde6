// The words of the token law, 128 tokens at a time: what common/philox.h computes one counter at a time. 256-bit vectors under AVX-512 too.
#pragma once

#include "../../common/fixed_math.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {

constexpr int kBlock = 128;    // tokens whose words are made at once
constexpr int kMaskLanes = 8;  // of at_most and at_least

#if ENGINE_ISA_LEVEL >= 1

// The round keys of a row and the three counter words that all its tokens share.
struct BlockNoise {
    __m256i round_key[kPhiloxRounds][2], position, stream;
};

ENGINE_INLINE BlockNoise block_noise(NoiseKey key) {
    BlockNoise n;
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
        n.round_key[round][0] = _mm256_set1_epi32(static_cast<int>(k0));
        n.round_key[round][1] = _mm256_set1_epi32(static_cast<int>(k1));
    }
    n.position = _mm256_set1_epi32(static_cast<int>(key.position));
    n.stream = _mm256_set1_epi32(static_cast<int>(key.stream));
    return n;
}

// Each 64-bit lane holds one word of one counter in its low half, so that a multiplication yields high and low half side by side; what is
// in the high halves never matters. 8 counters (32 tokens) per step: two chains, to fill the pipeline.
ENGINE_INLINE void block_words(const BlockNoise& noise, uint32_t first_token, uint32_t* words) {
    const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
    // Counters 0, 2, 1, 3: the unpacking below works on 128-bit halves and brings them into order.
    __m256i index = _mm256_add_epi64(_mm256_set1_epi64x(first_token / 4), _mm256_setr_epi64x(0, 2, 1, 3));
    for (int token = 0; token < kBlock; token += 32) {
        __m256i c[2][4];
        for (int half = 0; half < 2; ++half) {
            c[half][0] = _mm256_add_epi64(index, _mm256_set1_epi64x(4 * half));
            c[half][1] = noise.position;
            c[half][2] = noise.stream;
            c[half][3] = _mm256_set1_epi32(kDomainSample);
        }
#pragma GCC unroll 10
        for (int round = 0; round < kPhiloxRounds; ++round) {
            const __m256i k0 = noise.round_key[round][0], k1 = noise.round_key[round][1];
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const __m256i p0 = _mm256_mul_epu32(c[half][0], m0), p1 = _mm256_mul_epu32(c[half][2], m1);
                c[half][0] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c[half][1], k0));
                c[half][1] = p1;
                c[half][2] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c[half][3], k1));
                c[half][3] = p0;
            }
        }
        for (int half = 0; half < 2; ++half) {
            const __m256i w01 = _mm256_blend_epi32(c[half][0], _mm256_slli_epi64(c[half][1], 32), 0xaa);
            const __m256i w23 = _mm256_blend_epi32(c[half][2], _mm256_slli_epi64(c[half][3], 32), 0xaa);
            __m256i* out = reinterpret_cast<__m256i*>(words + token + 16 * half);
            _mm256_storeu_si256(out, _mm256_unpacklo_epi64(w01, w23));      // counters 0, 1
            _mm256_storeu_si256(out + 1, _mm256_unpackhi_epi64(w01, w23));  // counters 2, 3
        }
        index = _mm256_add_epi64(index, _mm256_set1_epi64x(8));
    }
}

// Bit i set where words[i] <= limit, for 8 words.
ENGINE_INLINE uint32_t at_most(const uint32_t* words, uint32_t limit) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    const __m256i is_less = _mm256_cmpeq_epi32(_mm256_min_epu32(w, _mm256_set1_epi32(static_cast<int>(limit))), w);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is_less)));
}

ENGINE_INLINE uint32_t at_least(const float* values, float limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(values), _mm256_set1_ps(limit), _CMP_GE_OQ)));
}

// Whether any of a block's words is <= limit.
ENGINE_INLINE bool any_at_most(const uint32_t* words, uint32_t limit) {
    const __m256i* w = reinterpret_cast<const __m256i*>(words);
    __m256i least[4];
    for (int j = 0; j < 4; ++j) least[j] = _mm256_loadu_si256(w + j);
    for (int i = 4; i < kBlock / 8; i += 4)
        for (int j = 0; j < 4; ++j) least[j] = _mm256_min_epu32(least[j], _mm256_loadu_si256(w + i + j));
    const __m256i all = _mm256_min_epu32(_mm256_min_epu32(least[0], least[1]), _mm256_min_epu32(least[2], least[3]));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_min_epu32(all, _mm256_set1_epi32(static_cast<int>(limit))), all)) != 0;
}

#else

using BlockNoise = NoiseKey;

ENGINE_INLINE BlockNoise block_noise(NoiseKey key) { return key; }

ENGINE_INLINE void block_words(const BlockNoise& noise, uint32_t first_token, uint32_t* words) {
    for (int i = 0; i < kBlock / 4; ++i) {
        const Philox four = noise_words(noise, first_token / 4 + i, kDomainSample);
        memcpy(words + 4 * i, four.word, sizeof four.word);
    }
}

ENGINE_INLINE uint32_t at_most(const uint32_t* words, uint32_t limit) {
    uint32_t bits = 0;
    for (int i = 0; i < kMaskLanes; ++i) bits |= static_cast<uint32_t>(words[i] <= limit) << i;
    return bits;
}

ENGINE_INLINE uint32_t at_least(const float* values, float limit) {
    uint32_t bits = 0;
    for (int i = 0; i < kMaskLanes; ++i) bits |= static_cast<uint32_t>(values[i] >= limit) << i;
    return bits;
}

ENGINE_INLINE bool any_at_most(const uint32_t* words, uint32_t limit) {
    bool any = false;
    for (int i = 0; i < kBlock; ++i) any |= words[i] <= limit;
    return any;
}

#endif

// Which tokens of a block whose largest z is `top` can still reach `best`: false if none, else those with a word <= *limit.
//
// With t = top - best + margin < 0: E >= u > e^t makes the exact score z - log(E) < best - margin. The computed score differs from the
// exact one by less than 2.1e-7 (E) + 8.3e-8 * 17.4 (log(E), for a word of kTailWords or more) + 2^-24 (|top| + 18) (last subtraction),
// all within the margin. A smaller word's u reaches down to 2^-65, a score of top + 45.06. e^t = 2^x is bounded above by its chord
// (1 + x - floor(x)) * 2^floor(x).
ENGINE_INLINE bool word_limit(float top, float best, uint32_t* limit) {
    const double magnitude = top < 0 ? -static_cast<double>(top) : top;
    const double t = static_cast<double>(top) - best + (1e-4 + magnitude * 0x1p-22);
    *limit = ~0u;
    if (!(t < 0)) return true;
    if (t < -45.5) return false;
    *limit = kTailWords - 1;
    const double x = t * 1.4426950408889634;
    const int whole = static_cast<int>(x) - 1;  // floor(x), or one less where x is an integer: the chord ends there with the same value
    if (whole < -25) return true;
    const double bound = (1.0 + (x - whole)) * static_cast<double>(uint64_t{1} << (32 + whole));
    const uint64_t words = static_cast<uint64_t>(bound) + 1;
    *limit = words > ~0u ? ~0u : words < kTailWords ? kTailWords - 1 : static_cast<uint32_t>(words);
    return true;
}

}  // namespace ENGINE_ISA
}  // namespace engine
