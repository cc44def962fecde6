// Tiles of the integer products: up to kTileRows rows of x against one panel. Included by linear_int.cpp only.
//
// All instruction sets take four neighbours along K at once: lane i of a vector of bytes holds four weights of output i, a broadcast word
// holds the same four places of a row of x. Weights are stored as u = q + z, not negative (z = 128 or 8), and
//     sum q x = sum u x - z sum x,
// so an output's sum starts at the row's -z sum x. With VNNI one instruction multiplies and adds four bytes to a lane, exactly. Without it
// weights are taken as nibbles: a sum of two products of a nibble and x lies within 2 * 15 * 127 = 3810, so eight such fit in 16 bits.
#pragma once

#include "linear.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

// ---- vectors of bytes: 4 * kLanes of them ----

#if ENGINE_ISA_LEVEL == 2
using Bytes = __m512i;
ENGINE_INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
ENGINE_INLINE Bytes broadcast(int32_t word) { return _mm512_set1_epi32(word); }
ENGINE_INLINE Bytes low_nibbles(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
ENGINE_INLINE Bytes high_nibbles(Bytes a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
ENGINE_INLINE VecF words_as_floats(Bytes a) { return {_mm512_cvtepi32_ps(a)}; }
#if defined(__AVX512VNNI__)
#define ENGINE_VNNI
// Not the intrinsic: GCC 12 copies every sum twice per step of a loop with it.
ENGINE_INLINE Bytes add_products(Bytes total, Bytes w, Bytes x) {
    asm("vpdpbusd %[x], %[w], %[total]" : [total] "+v"(total) : [w] "v"(w), [x] "v"(x));
    return total;
}
#else
ENGINE_INLINE Bytes add_words(Bytes a, Bytes b) { return _mm512_add_epi32(a, b); }
ENGINE_INLINE Bytes add_pairs(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
ENGINE_INLINE Bytes multiply_pairs(Bytes w, Bytes x) { return _mm512_maddubs_epi16(w, x); }
ENGINE_INLINE Bytes sum_pairs(Bytes a, int16_t factor) { return _mm512_madd_epi16(a, _mm512_set1_epi16(factor)); }
#endif

#elif ENGINE_ISA_LEVEL == 1
using Bytes = __m256i;
ENGINE_INLINE Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ENGINE_INLINE Bytes broadcast(int32_t word) { return _mm256_set1_epi32(word); }
ENGINE_INLINE Bytes low_nibbles(Bytes a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
ENGINE_INLINE Bytes high_nibbles(Bytes a) { return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15)); }
ENGINE_INLINE VecF words_as_floats(Bytes a) { return {_mm256_cvtepi32_ps(a)}; }
ENGINE_INLINE Bytes add_words(Bytes a, Bytes b) { return _mm256_add_epi32(a, b); }
ENGINE_INLINE Bytes add_pairs(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
ENGINE_INLINE Bytes multiply_pairs(Bytes w, Bytes x) { return _mm256_maddubs_epi16(w, x); }
ENGINE_INLINE Bytes sum_pairs(Bytes a, int16_t factor) { return _mm256_madd_epi16(a, _mm256_set1_epi16(factor)); }

#else
#define ENGINE_VNNI  // in plain code a product of four bytes has room too
struct Bytes {
    union {
        uint8_t byte[4 * kLanes];
        int32_t word[kLanes];
    };
};
ENGINE_INLINE Bytes load_bytes(const uint8_t* p) {
    Bytes a;
    memcpy(a.byte, p, sizeof(a));
    return a;
}
ENGINE_INLINE Bytes broadcast(int32_t word) {
    Bytes a;
    for (int i = 0; i < kLanes; ++i) a.word[i] = word;
    return a;
}
ENGINE_INLINE Bytes low_nibbles(Bytes a) {
    for (uint8_t& byte : a.byte) byte &= 15;
    return a;
}
ENGINE_INLINE Bytes high_nibbles(Bytes a) {
    for (uint8_t& byte : a.byte) byte = static_cast<uint8_t>(byte >> 4);
    return a;
}
ENGINE_INLINE VecF words_as_floats(Bytes a) {
    float t[kLanes];
    for (int i = 0; i < kLanes; ++i) t[i] = static_cast<float>(a.word[i]);
    return load(t);
}
ENGINE_INLINE Bytes add_products(Bytes total, Bytes w, Bytes x) {
    for (int i = 0; i < kLanes; ++i)
        for (int b = 4 * i; b < 4 * i + 4; ++b) total.word[i] += w.byte[b] * static_cast<int8_t>(x.byte[b]);
    return total;
}
#endif

// ---- exact sums of kLanes outputs of one row ----

constexpr int64_t kWord = 4;  // elements along K that a lane takes at once
constexpr int64_t kGroup = kActivationGroup;
constexpr int kPanelVectors = kPanel / kLanes;

template <WeightFormat kFormat>
struct Format;
#if defined(ENGINE_VNNI)
constexpr int64_t kSettle = kGroup / kWord;  // words that may be added before a sum must settle: a whole group
struct Int8Weights {
    Bytes bytes;
    ENGINE_METHOD void set(Bytes a) { bytes = a; }
};
struct Int8Sum {
    Bytes total;
    ENGINE_METHOD void begin(int32_t start) { total = broadcast(start); }
    ENGINE_METHOD void add(Int8Weights w, Bytes x) { total = add_products(total, w.bytes, x); }
    ENGINE_METHOD void settle() {}
};
struct Int4Sum {
    Bytes total;
    ENGINE_METHOD void begin(int32_t start) { total = broadcast(start); }
    ENGINE_METHOD void add(Bytes w, Bytes x) { total = add_products(total, w, x); }
    ENGINE_METHOD Bytes get(int32_t) const { return total; }
};
#else
constexpr int64_t kSettle = 8;
struct Int8Weights {
    Bytes low, high;
    ENGINE_METHOD void set(Bytes a) {
        low = low_nibbles(a);
        high = high_nibbles(a);
    }
};
struct Int8Sum {
    Bytes total, low, high;  // of words; of pairs, since it last settled
    ENGINE_METHOD void begin(int32_t start) {
        total = broadcast(start);
        low = high = broadcast(0);
    }
    ENGINE_METHOD void add(Int8Weights w, Bytes x) {
        low = add_pairs(low, multiply_pairs(w.low, x));
        high = add_pairs(high, multiply_pairs(w.high, x));
    }
    ENGINE_METHOD void settle() {
        total = add_words(total, add_words(sum_pairs(low, 1), sum_pairs(high, 16)));
        low = high = broadcast(0);
    }
};
struct Int4Sum {
    Bytes pairs;
    ENGINE_METHOD void begin(int32_t) { pairs = broadcast(0); }
    ENGINE_METHOD void add(Bytes w, Bytes x) { pairs = add_pairs(pairs, multiply_pairs(w, x)); }
    ENGINE_METHOD Bytes get(int32_t start) const { return add_words(broadcast(start), sum_pairs(pairs, 1)); }
};
#endif

// ---- tiles ----

// Rows of a tile and vectors of outputs that it takes at once: as many sums as the registers hold (int4: each has a float beside it).
#if ENGINE_ISA_LEVEL == 2
constexpr int vectors_of(int) { return 2; }
#if defined(ENGINE_VNNI)
constexpr int kInt8Rows = 12, kInt4Rows = 6;
#else
constexpr int kInt8Rows = 5, kInt4Rows = 6;
#endif
#else
constexpr int vectors_of(int rows) { return rows <= 2 ? 2 : 1; }
constexpr int kInt8Rows = 4, kInt4Rows = 4;
#endif

// A group of x of the rows of a tile, in words: each row's scale (float); where each row's sums start, for each of kStarts pieces of the
// group; each row's first four values, and so on.
template <>
struct Format<kPanelsInt8> {
    static constexpr int kRows = kInt8Rows;
    static constexpr int32_t kZero = 128;  // what a weight of 0 is stored as
    static constexpr int64_t kStarts = 1, kXWords = 1 + kStarts + kGroup / kWord, kGroupBytes = kPanel * kGroup;
    static constexpr int64_t kHalfBytes = kGroupBytes / 2;  // what a tile with kFetch = 1 has fetched of a group
};
template <>
struct Format<kPanelsInt4> {
    static constexpr int kRows = kInt4Rows;
    static constexpr int32_t kZero = 8;
    static constexpr int64_t kStarts = kGroup / kInt4Group, kXWords = 1 + kStarts + kGroup / kWord;
    static constexpr int64_t kGroupBytes = kStarts * kInt4GroupBytes;
    static constexpr int64_t kHalfBytes = 4 * 64;  // of each group of weights, all but the last of its lines
};

// part[i][v] = the products of row i and outputs (v0 + v) * kLanes on of a panel, summed over k elements of a group. kFetch lines are
// fetched from `ahead` on for every word of K.
template <int MR, int NV, int kFetch>
ENGINE_INLINE void multiply_int8(const uint8_t* w, int v0, int64_t k, const int32_t* x, const uint8_t* ahead, VecF (&part)[MR][NV]) {
    const int32_t* values = x + (1 + Format<kPanelsInt8>::kStarts) * MR;
    Int8Sum sum[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v].begin(x[MR + i]);
    const int64_t steps = ceil_div(k, kWord);
    for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 2
        for (int f = 0; f < kFetch; ++f) __builtin_prefetch(ahead + (s * kFetch + f) * 64);
        Int8Weights weights[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) weights[v].set(load_bytes(w + (s * kPanel + (v0 + v) * kLanes) * kWord));
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
            const Bytes value = broadcast(values[s * MR + i]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[i][v].add(weights[v], value);
        }
        if ((s + 1) % kSettle == 0 || s + 1 == steps) {
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) sum[i][v].settle();
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) part[i][v] = words_as_floats(sum[i][v].total);
}

template <int MR, int NV, int kFetch>
ENGINE_INLINE void multiply_int4(const uint8_t* w, int v0, int64_t k, const int32_t* x, const uint8_t* ahead, VecF (&part)[MR][NV]) {
    const int32_t* values = x + (1 + Format<kPanelsInt4>::kStarts) * MR;
    constexpr int64_t kHalf = kInt4Group / kWord / 2;  // words in the low nibbles; as many in the high ones
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) part[i][v] = zero();
    for (int64_t k0 = 0; k0 < k; k0 += kInt4Group, w += kInt4GroupBytes, ahead += kInt4GroupBytes, values += 2 * kHalf * MR) {
        x += MR;
        Int4Sum sum[MR][NV];
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[i][v].begin(x[i]);
#pragma GCC unroll 4
        for (int64_t s = 0; s < kHalf; ++s) {
#pragma GCC unroll 2
            for (int f = 0; f < kFetch; ++f) __builtin_prefetch(ahead + (s * kFetch + f) * 64);
            Bytes low[NV], high[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                const int64_t output = (v0 + v) * kLanes;
                const Bytes both = load_bytes(w + ((output / 16 * kHalf + s) * 16 + output % 16) * kWord);
                low[v] = low_nibbles(both);
                high[v] = high_nibbles(both);
            }
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i) {
                const Bytes first = broadcast(values[s * MR + i]), second = broadcast(values[(kHalf + s) * MR + i]);
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) {
                    sum[i][v].add(low[v], first);
                    sum[i][v].add(high[v], second);
                }
            }
        }
        if (kFetch > 0) __builtin_prefetch(ahead + kHalf * kFetch * 64);  // the ninth line of nine, or the fifth
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            uint16_t halves[kLanes];
            memcpy(halves, w + kPanel * kInt4Group / 2 + (v0 + v) * kLanes * 2, sizeof(halves));
            const VecF scale = load_f16(halves);
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i) part[i][v] = add(part[i][v], mul(words_as_floats(sum[i][v].get(x[i])), scale));
        }
    }
}

template <WeightFormat kFormat, int kFetch, int MR, int NV>
ENGINE_INLINE void multiply_group(const uint8_t* w, int v0, int64_t k, const int32_t* x, const uint8_t* ahead, VecF (&part)[MR][NV]) {
    if constexpr (kFormat == kPanelsInt8)
        multiply_int8<MR, NV, kFetch>(w, v0, k, x, ahead, part);
    else
        multiply_int4<MR, NV, kFetch>(w, v0, k, x, ahead, part);
}

// sums[i * kPanel + o] += the products over k elements, times the row's scale, group by group: MR rows of x (its groups x_step apart) and
// all outputs o of a panel (int8: without the outputs' scales). Of the groups from `ahead` on, kFetch lines are fetched per word of K.
template <WeightFormat kFormat, int MR, int kFetch>
__attribute__((noinline)) void tile(const uint8_t* w, int64_t k, const int32_t* x, int64_t x_step, float* sums, const uint8_t* ahead) {
    using F = Format<kFormat>;
    constexpr int NV = vectors_of(MR);
    for (int64_t k0 = 0; k0 < k; k0 += kGroup, w += F::kGroupBytes, ahead += F::kGroupBytes, x += x_step) {
        const int64_t length = smaller(kGroup, k - k0);
        asm volatile("" ::: "memory");  // else GCC keeps two copies of the sums, one on the stack
        for (int v0 = 0; v0 < kPanelVectors; v0 += NV) {
            VecF part[MR][NV];
            if (v0 == 0)
                multiply_group<kFormat, kFetch>(w, v0, length, x, ahead, part);
            else
                multiply_group<kFormat, 0>(w, v0, length, x, ahead, part);
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i) {
                const VecF scale = set1(float_of_bits(static_cast<uint32_t>(x[i])));
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) {
                    float* to = sums + i * kPanel + (v0 + v) * kLanes;
                    store(to, add(load(to), mul(part[i][v], scale)));
                }
            }
        }
    }
}

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
