// x as the tiles of linear_panels.cpp want it: [steps][kWords][rows], entries that are needed together side by side.
#pragma once

#include "../kernels.h"
#include "linear_panels_tile.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

#if ENGINE_ISA_LEVEL == 2
// to[c * rows + r] = from[r][c] of 32-bit entries, for 16 columns and up to 16 rows (the others are not written).
ENGINE_INLINE void transpose16(const __m512i (&from)[16], int64_t rows, void* to) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm512_unpacklo_epi32(from[2 * i], from[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(from[2 * i], from[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    // b[4 i + j]: of rows 4 i .. 4 i + 3, columns j, 4 + j, 8 + j, 12 + j in its quarters.
    const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1);
    char* p = static_cast<char*>(to);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i even_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), odd_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        const __m512i columns[4] = {_mm512_shuffle_i32x4(even_low, even_high, 0x88), _mm512_shuffle_i32x4(odd_low, odd_high, 0x88),
                                    _mm512_shuffle_i32x4(even_low, even_high, 0xdd), _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd)};
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) _mm512_mask_storeu_epi32(p + (4 * q + j) * rows * 4, mask, columns[q]);
    }
}
#endif

// The first `count` elements of a row, then zeros, as n entries of float: bf16 walks round them.
template <class T>
ENGINE_INLINE float entry(float x) {
    return x;
}
template <>
inline __attribute__((always_inline)) float entry<BF16>(float x) {
    return from_bf16(to_bf16(x));
}

// `rows` rows of k elements, x_stride apart, to `steps` steps; zeros past k.
template <class T>
void pack_tile(const float* x, int64_t x_stride, int64_t rows, int64_t k, int64_t steps, typename Walk<T>::X* to) {
    const int64_t entries = steps * Walk<T>::kWords;
    int64_t e = 0;
#if defined(__AVX512BF16__)
    if constexpr (Walk<T>::kDepth == 2) {  // an entry is a word of two
        const auto words = [&](int64_t row, int64_t at) {
            const float* p = x + row * x_stride + 2 * at;
            const int64_t left = k - 2 * at;
            const auto some = [](int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1); };
            return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(some(left - 16), p + 16), _mm512_maskz_loadu_ps(some(left), p));
        };
        for (; e < entries; e += 16) {
            __m512i block[16];
            const int64_t n = entries - e < 16 ? entries - e : 16;
            if (rows == 1) {
                _mm512_mask_storeu_epi32(to + e, static_cast<__mmask16>((1u << n) - 1), words(0, e));
                continue;
            }
            for (int64_t r = 0; r < 16; ++r) block[r] = r < rows ? words(r, e) : _mm512_setzero_si512();
            if (n == 16) {
                transpose16(block, rows, to + e * rows);
            } else {
                uint32_t last[16 * 16];
                transpose16(block, rows, last);
                memcpy(to + e * rows, last, static_cast<size_t>(n * rows) * sizeof(uint32_t));
            }
        }
    } else
#endif
    {
#if ENGINE_ISA_LEVEL == 2
        if (Walk<T>::kDepth == 1 && rows > 1) {
            for (; e + 16 <= k; e += 16) {
                __m512i block[16];
                for (int64_t r = 0; r < 16; ++r) block[r] = r < rows ? _mm512_loadu_si512(x + r * x_stride + e) : _mm512_setzero_si512();
                transpose16(block, rows, to + e * rows);
            }
        }
#endif
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = e; c < entries; ++c) to[c * rows + r] = c < k ? entry<T>(x[r * x_stride + c]) : 0;
    }
}

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
