// The inner tile of linear_panels.cpp: a few rows of x against 32 outputs (or half of them) over a stretch of K.
//
// Every output is one chain of fused multiply-adds in the order of K: acc = fma(w[k], x[k], acc), begun at 0. No shape, tile, cut of K or
// thread changes it, nor the width of a vector (only the portable build, which has no fused operation, rounds twice).
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

// How a format walks K: kDepth elements a step, whose weights for 32 outputs are kLines cache lines. weights<h>: of element h of the step,
// for the outputs of vector v.
template <class T>
struct Walk;

template <>
struct Walk<float> {
    static constexpr int kDepth = 1, kLines = 2;
    template <int h>
    ENGINE_METHOD static VecF weights(const float* w, int v) {
        return load(w + v * kLanes);
    }
};
template <>
struct Walk<F16> {
    static constexpr int kDepth = 1, kLines = 1;
    template <int h>
    ENGINE_METHOD static VecF weights(const F16* w, int v) {
        return load_f16(&w[v * kLanes].bits);
    }
};
template <>
struct Walk<BF16> {  // two neighbours along K are one 32-bit word: a shift widens the first, a mask the second
    static constexpr int kDepth = 2, kLines = 2;
    template <int h>
    ENGINE_METHOD static VecF weights(const BF16* w, int v) {
        const BF16* p = w + v * kLanes * 2;
#if ENGINE_ISA_LEVEL == 2
        const __m512i words = _mm512_loadu_si512(p);
        return {_mm512_castsi512_ps(h == 0 ? _mm512_slli_epi32(words, 16)
                                           : _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
#elif ENGINE_ISA_LEVEL == 1
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm256_castsi256_ps(h == 0 ? _mm256_slli_epi32(words, 16)
                                           : _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
#else
        float t[kLanes];
        for (int i = 0; i < kLanes; ++i) t[i] = from_bf16(p[2 * i + h].bits);
        return load(t);
#endif
    }
};

template <class T, int h, int MR, int NV>
ENGINE_INLINE void multiply(const T* w, const float* x, VecF (&acc)[MR][NV]) {
    VecF weights[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) weights[v] = Walk<T>::template weights<h>(w, v);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
        const VecF one = set1(x[i]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[i][v] = fma(weights[v], one, acc[i][v]);
    }
}

// sums[i * kPanel + ...] (first: from 0, else going on) over `steps` steps; w: the panel at the first of them and the tile's first output;
// x: [steps * kDepth][MR]. Fetches kFetch cache lines a step ahead, from `ahead` on.
template <class T, int MR, int NV, int kFetch>
void tile(const T* w, const float* x, int64_t steps, float* sums, bool first, const char* ahead) {
    constexpr int kDepth = Walk<T>::kDepth;
    VecF acc[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[i][v] = first ? zero() : load(sums + i * kPanel + v * kLanes);
    for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 2
        for (int line = 0; line < kFetch; ++line) __builtin_prefetch(ahead + 64 * line);
        ahead += 64 * kFetch;
        multiply<T, 0>(w, x, acc);
        if constexpr (kDepth == 2) multiply<T, 1>(w, x + MR, acc);
        w += kDepth * kPanel;
        x += kDepth * MR;
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(sums + i * kPanel + v * kLanes, acc[i][v]);
}

template <class T>
using Tile = void (*)(const T* w, const float* x, int64_t steps, float* sums, bool first, const char* ahead);

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
