// The inner tile of linear_panels.cpp: a few rows of x against 32 outputs (or half of them) over a stretch of K.
//
// Every output is one chain of fused multiply-adds over K, begun at 0: acc = fma(w[k], x[k], acc), in the order of K; with bf16 weights x
// is rounded to bf16 too, and of each two neighbours along K the second comes first, for that is what vdpbf16ps does (the product of two
// bf16 is exact in float32). No shape, tile, cut of K or thread changes it, nor the width of a vector: only the portable build, which has
// no fused operation, rounds twice, and vdpbf16ps takes subnormal numbers for zeros.
#pragma once

#include "../kernels.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int kPanelVectors = kPanel / kLanes;

// Rows of x in a tile, at most, by the vectors of outputs it has; accumulators, weights and one broadcast fit the registers: 12 x 2 + 3 of
// AVX-512's 32; 6 x 2 + 3 or 3 x 4 + 2 of AVX2's 16. A portable vector is two registers.
#if ENGINE_ISA_LEVEL == 2
constexpr int kWideRows = 12, kNarrowRows = 12, kNarrowVectors = 2;
#elif ENGINE_ISA_LEVEL == 1
constexpr int kWideRows = 3, kNarrowRows = 6, kNarrowVectors = 2;
#else
constexpr int kWideRows = 1, kNarrowRows = 2, kNarrowVectors = 2;
#endif

// How a format walks K: kDepth elements a step, whose weights for 32 outputs are kLines cache lines and whose x are kWords entries of type
// X in the packed rows. multiply: one step; w: the step's weights from the tile's first output, x: its entries, those of a tile's rows
// together.
template <class T>
struct Walk;

// acc += weights * x[i] for every row i of the tile.
template <int MR, int NV>
ENGINE_INLINE void add_products(const VecF (&weights)[NV], const float* x, VecF (&acc)[MR][NV]) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
        const VecF one = set1(x[i]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[i][v] = fma(weights[v], one, acc[i][v]);
    }
}

template <>
struct Walk<float> {
    using X = float;
    static constexpr int kDepth = 1, kLines = 2, kWords = 1;
    template <int MR, int NV>
    ENGINE_METHOD static void multiply(const float* w, const float* x, VecF (&acc)[MR][NV]) {
        VecF weights[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) weights[v] = load(w + v * kLanes);
        add_products(weights, x, acc);
    }
};
template <>
struct Walk<F16> {
    using X = float;
    static constexpr int kDepth = 1, kLines = 1, kWords = 1;
    template <int MR, int NV>
    ENGINE_METHOD static void multiply(const F16* w, const float* x, VecF (&acc)[MR][NV]) {
        VecF weights[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) weights[v] = load_f16(&w[v * kLanes].bits);
        add_products(weights, x, acc);
    }
};

#if defined(__AVX512BF16__)
template <>
struct Walk<BF16> {  // an entry of x: two neighbours along K, as the weights have them
    using X = uint32_t;
    static constexpr int kDepth = 2, kLines = 2, kWords = 1;
    template <int MR, int NV>
    ENGINE_METHOD static void multiply(const BF16* w, const uint32_t* x, VecF (&acc)[MR][NV]) {
        __m512bh weights[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(w + v * kLanes * 2);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[i]));
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[i][v].v = _mm512_dpbf16_ps(acc[i][v].v, weights[v], pair);
        }
    }
};
#else
template <>
struct Walk<BF16> {  // entries of x: one of two neighbours along K, then the other; a mask widens the second weight, a shift the first
    using X = float;
    static constexpr int kDepth = 2, kLines = 2, kWords = 2;
    template <int MR, int NV>
    ENGINE_METHOD static void multiply(const BF16* w, const float* x, VecF (&acc)[MR][NV]) {
        VecF first[NV], second[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) widen(w + v * kLanes * 2, &first[v], &second[v]);
        add_products(second, x + MR, acc);
        add_products(first, x, acc);
    }

  private:
    ENGINE_METHOD static void widen(const BF16* p, VecF* first, VecF* second) {
#if ENGINE_ISA_LEVEL == 2
        const __m512i words = _mm512_loadu_si512(p), high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
        *first = {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
        *second = {_mm512_castsi512_ps(_mm512_and_si512(words, high))};
#elif ENGINE_ISA_LEVEL == 1
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        *first = {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
        *second = {_mm256_castsi256_ps(_mm256_and_si256(words, high))};
#else
        float even[kLanes], odd[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            even[i] = from_bf16(p[2 * i].bits);
            odd[i] = from_bf16(p[2 * i + 1].bits);
        }
        *first = load(even);
        *second = load(odd);
#endif
    }
};
#endif

// sums[i * kPanel + ...] (first: from 0, else going on) over `steps` steps; x: [steps][kWords][MR]. Each of the first `fetching` steps
// fetches kFetch cache lines, one after the other from `ahead` on.
template <class T, int MR, int NV, int kFetch>
void tile(const T* w, const typename Walk<T>::X* x, int64_t steps, float* sums, bool first, const char* ahead, int64_t fetching) {
    VecF acc[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[i][v] = first ? zero() : load(sums + i * kPanel + v * kLanes);
    for (int64_t s = 0; s < fetching; ++s) {
#pragma GCC unroll 2
        for (int line = 0; line < kFetch; ++line) __builtin_prefetch(ahead + 64 * line);
        ahead += 64 * kFetch;
        Walk<T>::multiply(w, x, acc);
        w += Walk<T>::kDepth * kPanel;
        x += Walk<T>::kWords * MR;
    }
    for (int64_t s = fetching; s < steps; ++s) {
        Walk<T>::multiply(w, x, acc);
        w += Walk<T>::kDepth * kPanel;
        x += Walk<T>::kWords * MR;
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(sums + i * kPanel + v * kLanes, acc[i][v]);
}

template <class T>
using Tile = void (*)(const T* w, const typename Walk<T>::X* x, int64_t steps, float* sums, bool first, const char* ahead,
                      int64_t fetching);

// The tile of `rows` rows.
template <class T, int NV, int kFetch, int MR>
Tile<T> tile_of(int64_t rows) {
    if constexpr (MR > 1) {
        if (rows < MR) return tile_of<T, NV, kFetch, MR - 1>(rows);
    }
    return tile<T, MR, NV, kFetch>;
}

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
