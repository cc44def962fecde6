// The inner tile of linear.cpp: dot products of a few rows of x with four weight rows over one chunk of K.
//
// The order of every output, which no shape, split or thread may change: the steps of the chunk in turn (kStep elements each; first one
// half, then the other) into one vector accumulator; sum4 of its lanes; added to the sum of the chunks before.
#pragma once

#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kStep = 2 * kLanes;  // elements of K per step: two vectors

// Rows of x per tile, at most: rows are shared out evenly. 3 x 4 outputs are 12 accumulators; with 3 vectors of x and one of weights they
// fill the 16 registers of AVX2 and hide the latency of its two FMA pipes (2 x 4 cycles). AVX-512 has 32, of which 5 x 4 accumulators take
// 26 (6 x 4 were slower). A portable vector is two registers.
#if ENGINE_ISA_LEVEL == 2
constexpr int kTileRows = 5;
#elif ENGINE_ISA_LEVEL == 1
constexpr int kTileRows = 3;
#elif defined(__aarch64__)
constexpr int kTileRows = 2;
#else
constexpr int kTileRows = 1;
#endif
constexpr int kTileColumns = 4;

typedef float Quad __attribute__((vector_size(16)));

// Half 0 or 1 of a step of weights as floats. For bf16, half 0 holds the even elements and half 1 the odd ones (two bf16 are one 32-bit
// word: a shift or a mask widens them); pack_step arranges x to match.
template <int half>
ENGINE_INLINE VecF half_step(const float* w) {
    return load(w + half * kLanes);
}
template <int half>
ENGINE_INLINE VecF half_step(const F16* w) {
    return load_f16(&w[half * kLanes].bits);
}
template <int half>
ENGINE_INLINE VecF half_step(const BF16* w) {
#if ENGINE_ISA_LEVEL == 2
    const __m512i v = _mm512_loadu_si512(w);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(half == 0 ? _mm512_slli_epi32(v, 16) : _mm512_and_si512(v, high))};
#elif ENGINE_ISA_LEVEL == 1
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_castsi256_ps(half == 0 ? _mm256_slli_epi32(v, 16) : _mm256_and_si256(v, high))};
#else
    float t[kLanes];
    for (int i = 0; i < kLanes; ++i) t[i] = from_bf16(w[2 * i + half].bits);
    return load(t);
#endif
}

// A step of x in the order of half_step of the weights' type.
template <class T>
ENGINE_INLINE void pack_step(const float* x, float* to) {
    memcpy(to, x, kStep * sizeof(float));
}
template <>
inline __attribute__((always_inline)) void pack_step<BF16>(const float* x, float* to) {
#if ENGINE_ISA_LEVEL == 1
    const __m256 low = _mm256_loadu_ps(x), high = _mm256_loadu_ps(x + kLanes);
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88)), odd = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xdd));
    _mm256_storeu_ps(to, _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)));
    _mm256_storeu_ps(to + kLanes, _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8)));
#else
    for (int i = 0; i < kLanes; ++i) {
        to[i] = x[2 * i];
        to[kLanes + i] = x[2 * i + 1];
    }
#endif
}

// The sums over the lanes of four vectors, each ((l0 + l2) + (l1 + l3)) + ((l4 + l6) + (l5 + l7)), 16 lanes folded to 8 before.
ENGINE_INLINE Quad sum4(VecF a, VecF b, VecF c, VecF d) {
#if ENGINE_ISA_LEVEL == 0
    const VecF v[4] = {a, b, c, d};
    Quad sum = {};
    for (int i = 0; i < 4; ++i)
        sum[i] = ((v[i].lo[0] + v[i].lo[2]) + (v[i].lo[1] + v[i].lo[3])) + ((v[i].hi[0] + v[i].hi[2]) + (v[i].hi[1] + v[i].hi[3]));
    return sum;
#else
#if ENGINE_ISA_LEVEL == 2
    const auto fold = [](VecF v) { return _mm256_add_ps(_mm512_castps512_ps256(v.v), _mm512_extractf32x8_ps(v.v, 1)); };
#else
    const auto fold = [](VecF v) { return v.v; };
#endif
    const __m256 a8 = fold(a), b8 = fold(b), c8 = fold(c), d8 = fold(d);
    const __m256d ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a8, b8), _mm256_unpackhi_ps(a8, b8)));
    const __m256d cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c8, d8), _mm256_unpackhi_ps(c8, d8)));
    const __m256 s = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
#endif
}

#if ENGINE_ISA_LEVEL == 1
// acc[i] += w * x[i], i = 0..2, with one temporary register. In assembly because 12 accumulators, 3 vectors of x and this temporary are all
// the registers there are: left to itself GCC 12 takes x from memory in every FMA or spills accumulators (bf16: 73 % of the FMA peak
// against 92 %).
#define ENGINE_FMA3 "vfmadd231ps %[t], %[x0], %[a0]\n\tvfmadd231ps %[t], %[x1], %[a1]\n\tvfmadd231ps %[t], %[x2], %[a2]"
#define ENGINE_FMA3_OPERANDS \
    [a0] "+x"(a0.v), [a1] "+x"(a1.v), [a2] "+x"(a2.v), [t] "=&x"(t) : [x0] "x"(x0.v), [x1] "x"(x1.v), [x2] "x"(x2.v)
template <int half>
ENGINE_INLINE void fma3(const float* w, VecF x0, VecF x1, VecF x2, VecF& a0, VecF& a1, VecF& a2) {
    __m256 t;
    asm volatile("vmovups %[w], %[t]\n\t" ENGINE_FMA3
                 : ENGINE_FMA3_OPERANDS, [w] "m"(*reinterpret_cast<const __m256_u*>(w + half * kLanes)));
}
template <int half>
ENGINE_INLINE void fma3(const F16* w, VecF x0, VecF x1, VecF x2, VecF& a0, VecF& a1, VecF& a2) {
    __m256 t;
    asm volatile("vcvtph2ps %[w], %[t]\n\t" ENGINE_FMA3
                 : ENGINE_FMA3_OPERANDS, [w] "m"(*reinterpret_cast<const __m128i_u*>(w + half * kLanes)));
}
alignas(32) constexpr uint32_t kHighHalves[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
template <int half>
ENGINE_INLINE void fma3(const BF16* w, VecF x0, VecF x1, VecF x2, VecF& a0, VecF& a1, VecF& a2) {
    __m256 t;
    if constexpr (half == 0) {
        asm volatile("vmovdqu %[w], %[t]\n\tvpslld $16, %[t], %[t]\n\t" ENGINE_FMA3
                     : ENGINE_FMA3_OPERANDS, [w] "m"(*reinterpret_cast<const __m256_u*>(w)));
    } else {
        asm volatile("vmovdqa %[high], %[t]\n\tvpand %[w], %[t], %[t]\n\t" ENGINE_FMA3
                     : ENGINE_FMA3_OPERANDS, [w] "m"(*reinterpret_cast<const __m256_u*>(w)),
                       [high] "m"(*reinterpret_cast<const __m256*>(kHighHalves)));
    }
}
#undef ENGINE_FMA3
#undef ENGINE_FMA3_OPERANDS
#endif

// One half of a step: acc[i][j] += x[i] * w[j].
template <int half, class T, int MR, int NR>
ENGINE_INLINE void multiply_half(const T* w, int64_t w_stride, const float* x, int64_t x_stride, VecF (&acc)[MR][NR]) {
    VecF xv[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) xv[i] = load(x + i * x_stride + half * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) {
#if ENGINE_ISA_LEVEL == 1
        if constexpr (MR == 3) {
            fma3<half>(w + j * w_stride, xv[0], xv[1], xv[2], acc[0][j], acc[1][j], acc[2][j]);
            continue;
        }
#endif
        const VecF wv = half_step<half>(w + j * w_stride);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) acc[i][j] = fma(wv, xv[i], acc[i][j]);
    }
}

// What a tile fetches ahead while it computes: each time it has used a cache line of every weight row, the kFetch lines at p, p + stride,
// ...; then p += advance.
struct Ahead {
    const char* p;
    int64_t stride, advance;
};

// sums[i * ld + j] (first: =, else +=) the products of x[i] and w[j] over k < len; x is packed and padded with zeros to a full step.
template <class T, int MR, int NR, int kFetch>
ENGINE_INLINE void tile(const T* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t len, float* sums, int64_t ld, bool first,
                        Ahead ahead) {
    static_assert(NR == 1 || NR == kTileColumns, "one or four columns");
    VecF acc[MR][NR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < NR; ++j) acc[i][j] = zero();
    int64_t k = 0;
    for (; k + kStep <= len; k += kStep) {
        if (kFetch > 0 && k * static_cast<int64_t>(sizeof(T)) % 64 == 0) {
            for (int64_t bytes = 0; bytes < kStep * static_cast<int64_t>(sizeof(T)); bytes += 64) {
#pragma GCC unroll 8
                for (int j = 0; j < kFetch; ++j) __builtin_prefetch(ahead.p + j * ahead.stride);
                ahead.p += ahead.advance;
            }
        }
        multiply_half<0>(w + k, w_stride, x + k, x_stride, acc);
        multiply_half<1>(w + k, w_stride, x + k, x_stride, acc);
    }
    if (k < len) {  // the weights end inside a step: as if zeros followed
        T tail[NR * kStep];
        memset(static_cast<void*>(tail), 0, sizeof(tail));
        for (int j = 0; j < NR; ++j)
            memcpy(static_cast<void*>(tail + j * kStep), w + j * w_stride + k, static_cast<size_t>(len - k) * sizeof(T));
        multiply_half<0>(tail, kStep, x + k, x_stride, acc);
        multiply_half<1>(tail, kStep, x + k, x_stride, acc);
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
        Quad sum = sum4(acc[i][0], acc[i][1 % NR], acc[i][2 % NR], acc[i][3 % NR]);
        float* at = sums + i * ld;
        if (!first) {
            Quad before = {};
            memcpy(&before, at, NR * sizeof(float));
            sum = before + sum;
        }
        memcpy(at, &sum, NR * sizeof(float));
    }
}

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
