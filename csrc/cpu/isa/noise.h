// The words of the token law for many tokens at once: what common/philox.h computes one counter at a time.
#pragma once

#include "../../common/fixed_math.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {

constexpr int kBlock = 128;  // tokens whose words are made at once

#if ENGINE_ISA_LEVEL >= 1

// A vector of 64-bit lanes, each holding one word of one counter in its low half, so that a multiplication yields high and low half side by
// side; what is in the high halves never matters.
#if ENGINE_ISA_LEVEL == 2
using Wide = __m512i;
constexpr int kCounters = 8;  // of a vector
ENGINE_INLINE Wide wide(uint32_t a) { return _mm512_set1_epi64(a); }
ENGINE_INLINE Wide wide_multiply(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
ENGINE_INLINE Wide wide_high(Wide a) { return _mm512_srli_epi64(a, 32); }
ENGINE_INLINE Wide wide_xor(Wide a, Wide b) { return _mm512_xor_si512(a, b); }
ENGINE_INLINE Wide wide_xor(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
ENGINE_INLINE Wide wide_add(Wide a, Wide b) { return _mm512_add_epi64(a, b); }
ENGINE_INLINE Wide wide_load(const uint32_t* p) { return _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
ENGINE_INLINE Wide wide_pair(Wide low, Wide high) { return _mm512_mask_mov_epi32(low, 0xaaaa, _mm512_slli_epi64(high, 32)); }
ENGINE_INLINE void wide_store(uint32_t* out, Wide w01, Wide w23) {  // counters of lanes 0, 2, 4, 6, then 1, 3, 5, 7
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(w01, w23));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(w01, w23));
}
ENGINE_INLINE Wide wide_order() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }  // whose store is in order
#else
using Wide = __m256i;
constexpr int kCounters = 4;
ENGINE_INLINE Wide wide(uint32_t a) { return _mm256_set1_epi64x(a); }
ENGINE_INLINE Wide wide_multiply(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
ENGINE_INLINE Wide wide_high(Wide a) { return _mm256_srli_epi64(a, 32); }
ENGINE_INLINE Wide wide_xor(Wide a, Wide b) { return _mm256_xor_si256(a, b); }
ENGINE_INLINE Wide wide_xor(Wide a, Wide b, Wide c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
ENGINE_INLINE Wide wide_add(Wide a, Wide b) { return _mm256_add_epi64(a, b); }
ENGINE_INLINE Wide wide_load(const uint32_t* p) { return _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
ENGINE_INLINE Wide wide_pair(Wide low, Wide high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xaa); }
ENGINE_INLINE void wide_store(uint32_t* out, Wide w01, Wide w23) {  // counters of lanes 0, 2, then 1, 3
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(w01, w23));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(w01, w23));
}
ENGINE_INLINE Wide wide_order() { return _mm256_setr_epi64x(0, 2, 1, 3); }
#endif

// What all tokens of a row share. Only the first of the four counter words differs between them, so that half of the first two rounds is
// done here: after them the counter is (high(M1 * x) ^ first, M1 * x, low(M0 * index) ^ second, third), x = high(M0 * index) ^ zeroth.
struct RowNoise {
    Wide key[kPhiloxRounds][2], zeroth, first, second, third;
};

ENGINE_INLINE RowNoise row_noise(NoiseKey key, uint32_t domain = kDomainSample) {
    RowNoise n;
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    const uint64_t p1 = uint64_t{kPhiloxM1} * key.stream;
    const uint64_t p0 = uint64_t{kPhiloxM0} * (static_cast<uint32_t>(p1 >> 32) ^ key.position ^ k0);
    n.zeroth = wide(domain ^ k1);
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
        n.key[round][0] = wide(k0);
        n.key[round][1] = wide(k1);
        if (round == 1) {
            n.first = wide(static_cast<uint32_t>(p1) ^ k0);
            n.second = wide(static_cast<uint32_t>(p0 >> 32) ^ k1);
            n.third = wide(static_cast<uint32_t>(p0));
        }
    }
    return n;
}

// The four words of each of 2 * kCounters counters, in the order of wide_store; two chains, to fill the pipeline.
ENGINE_INLINE void wide_words(const RowNoise& noise, const Wide (&index)[2], uint32_t* out) {
    const Wide m0 = wide(kPhiloxM0), m1 = wide(kPhiloxM1);
    Wide c[2][4];
    for (int half = 0; half < 2; ++half) {
        const Wide p0 = wide_multiply(index[half], m0);
        const Wide p1 = wide_multiply(wide_xor(wide_high(p0), noise.zeroth), m1);
        c[half][0] = wide_xor(wide_high(p1), noise.first);
        c[half][1] = p1;
        c[half][2] = wide_xor(p0, noise.second);
        c[half][3] = noise.third;
    }
#pragma GCC unroll 10
    for (int round = 2; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const Wide p0 = wide_multiply(c[half][0], m0), p1 = wide_multiply(c[half][2], m1);
            c[half][0] = wide_xor(wide_high(p1), c[half][1], noise.key[round][0]);
            c[half][1] = p1;
            c[half][2] = wide_xor(wide_high(p0), c[half][3], noise.key[round][1]);
            c[half][3] = p0;
        }
    }
    for (int half = 0; half < 2; ++half)
        wide_store(out + 4 * kCounters * half, wide_pair(c[half][0], c[half][1]), wide_pair(c[half][2], c[half][3]));
}

// The words of the kBlock tokens from first_token on.
ENGINE_INLINE void block_words(const RowNoise& noise, uint32_t first_token, uint32_t* words) {
    Wide index = wide_add(wide(first_token / 4), wide_order());
    for (int token = 0; token < kBlock; token += 8 * kCounters) {
        const Wide both[2] = {index, wide_add(index, wide(kCounters))};
        wide_words(noise, both, words + token);
        index = wide_add(index, wide(2 * kCounters));
    }
}

constexpr int kTokens = 2 * kCounters;  // of token_words

// The words of kTokens tokens that lie anywhere.
ENGINE_INLINE void token_words(const RowNoise& noise, const int32_t* tokens, uint32_t* words) {
    uint32_t index[kTokens], all[4 * kTokens];
    for (int i = 0; i < kTokens; ++i) index[i] = static_cast<uint32_t>(tokens[i]) / 4;
    const Wide both[2] = {wide_load(index), wide_load(index + kCounters)};
    wide_words(noise, both, all);
    for (int i = 0; i < kTokens; ++i) {
        const int lane = i % kCounters;  // even lanes are stored first
        words[i] = all[4 * (i - lane + lane / 2 + lane % 2 * (kCounters / 2)) + (tokens[i] & 3)];
    }
}

#if ENGINE_ISA_LEVEL == 2

// Bit i set where words[i] <= limit, for kLanes words.
ENGINE_INLINE uint32_t at_most(const uint32_t* words, uint32_t limit) {
    return _mm512_cmple_epu32_mask(_mm512_loadu_si512(words), _mm512_set1_epi32(static_cast<int>(limit)));
}
// Whether any of a block's words is <= limit.
ENGINE_INLINE bool any_at_most(const uint32_t* words, uint32_t limit) {
    __m512i least = _mm512_loadu_si512(words);
    for (int i = 16; i < kBlock; i += 16) least = _mm512_min_epu32(least, _mm512_loadu_si512(words + i));
    return _mm512_cmple_epu32_mask(least, _mm512_set1_epi32(static_cast<int>(limit))) != 0;
}

#else

ENGINE_INLINE uint32_t at_most(const uint32_t* words, uint32_t limit) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    const __m256i is_less = _mm256_cmpeq_epi32(_mm256_min_epu32(w, _mm256_set1_epi32(static_cast<int>(limit))), w);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is_less)));
}
ENGINE_INLINE bool any_at_most(const uint32_t* words, uint32_t limit) {
    const __m256i* w = reinterpret_cast<const __m256i*>(words);
    __m256i least[4];
    for (int j = 0; j < 4; ++j) least[j] = _mm256_loadu_si256(w + j);
    for (int i = 4; i < kBlock / 8; i += 4)
        for (int j = 0; j < 4; ++j) least[j] = _mm256_min_epu32(least[j], _mm256_loadu_si256(w + i + j));
    const __m256i all = _mm256_min_epu32(_mm256_min_epu32(least[0], least[1]), _mm256_min_epu32(least[2], least[3]));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_min_epu32(all, _mm256_set1_epi32(static_cast<int>(limit))), all)) != 0;
}

#endif
#else

struct RowNoise {
    NoiseKey key;
    uint32_t domain;
};

ENGINE_INLINE RowNoise row_noise(NoiseKey key, uint32_t domain = kDomainSample) { return {key, domain}; }

ENGINE_INLINE void block_words(const RowNoise& noise, uint32_t first_token, uint32_t* words) {
    for (int i = 0; i < kBlock / 4; ++i) {
        const Philox four = noise_words(noise.key, first_token / 4 + i, noise.domain);
        memcpy(words + 4 * i, four.word, sizeof four.word);
    }
}

constexpr int kTokens = 8;

ENGINE_INLINE void token_words(const RowNoise& noise, const int32_t* tokens, uint32_t* words) {
    for (int i = 0; i < kTokens; ++i)
        words[i] = noise_words(noise.key, static_cast<uint32_t>(tokens[i]) / 4, noise.domain).word[tokens[i] & 3];
}

ENGINE_INLINE uint32_t at_most(const uint32_t* words, uint32_t limit) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(words[i] <= limit) << i;
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
