// The inner loops of attention.cpp: tiles of up to six rows over sub-blocks of 16 keys or values, and the softmax of a split.
#pragma once

#include "../kernels.h"
#include "exp.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int kVecs = kSubBlock / kLanes;                    // vectors per 16 tokens
constexpr int kMaxChunks = kAttentionSplit / kSubBlock;      // sub-blocks of a split
constexpr int kTreeChunks = kMaxTreeTokens / kSubBlock + 1;  // sub-blocks of a tree, which may begin inside one
// A row's scores of a split, then those of the tree's sub-blocks. Not a power of two: rows would share cache sets.
constexpr int kScoreStride = kAttentionSplit + kTreeChunks * kSubBlock;
constexpr int kTileRows = 6;  // 6 rows x 2 vectors of accumulators, 2 of keys: 15 registers of 16
const float kMinusInfinity = -__builtin_inff();

ENGINE_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
ENGINE_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- elements in pairs of vectors ----
// Two vectors of consecutive elements. Those of bf16 may come in *pair order* (even elements, then odd ones), which takes one load and two
// cheap operations; what is computed from them is put back by `unpair`.
ENGINE_INLINE void load_pair(const float* p, VecF* a, VecF* b) {
    *a = load(p);
    *b = load(p + kLanes);
}
ENGINE_INLINE void load_pair(const BF16* p, VecF* a, VecF* b) {
#if ENGINE_ISA_LEVEL == 1
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a->v = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    b->v = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
#else
    *a = load_as_float(p);
    *b = load_as_float(p + kLanes);
#endif
}
ENGINE_INLINE void unpair(const float*, VecF*, VecF*) {}
ENGINE_INLINE void unpair(const BF16*, [[maybe_unused]] VecF* a, [[maybe_unused]] VecF* b) {
#if ENGINE_ISA_LEVEL == 1
    const __m256 low = _mm256_unpacklo_ps(a->v, b->v), high = _mm256_unpackhi_ps(a->v, b->v);
    a->v = _mm256_permute2f128_ps(low, high, 0x20);
    b->v = _mm256_permute2f128_ps(low, high, 0x31);
#endif
}

// ---- scores: R rows x B sub-blocks ----
// q: [head_dim][R]. keys[b]: [head_dim][16]. scores: row r at r * kScoreStride.
template <class T, int R, int B>
__attribute__((noinline)) void score_tile(const float* q, const T* const* keys, int64_t head_dim, float scale, float* scores) {
    VecF acc[R][B][kVecs];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
            for (int v = 0; v < kVecs; ++v) acc[r][b][v] = zero();
    for (int64_t d = 0; d < head_dim; ++d) {
        for (int b = 0; b < B; ++b) {
            VecF k[kVecs];
            if constexpr (kVecs == 2) {
                load_pair(keys[b] + d * kSubBlock, &k[0], &k[1]);
            } else {
                k[0] = load_as_float(keys[b] + d * kSubBlock);
            }
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kVecs; ++v) acc[r][b][v] = fma(set1(q[d * R + r]), k[v], acc[r][b][v]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int b = 0; b < B; ++b) {
            if constexpr (kVecs == 2) unpair(keys[b], &acc[r][b][0], &acc[r][b][1]);
            for (int v = 0; v < kVecs; ++v) store(scores + r * kScoreStride + b * kSubBlock + v * kLanes, mul(acc[r][b][v], set1(scale)));
        }
    }
}

template <class T>
void score_rows(int rows, const float* q, const T* const* keys, int64_t head_dim, float scale, float* scores) {
    switch (rows) {
        case 1:
            return score_tile<T, 1, 1>(q, keys, head_dim, scale, scores);
        case 2:
            return score_tile<T, 2, 1>(q, keys, head_dim, scale, scores);
        case 3:
            return score_tile<T, 3, 1>(q, keys, head_dim, scale, scores);
        case 4:
            return score_tile<T, 4, 1>(q, keys, head_dim, scale, scores);
        case 5:
            return score_tile<T, 5, 1>(q, keys, head_dim, scale, scores);
        default:
            return score_tile<T, 6, 1>(q, keys, head_dim, scale, scores);
    }
}

// ---- softmax of one row's split ----
// scores[begin, end) become weights exp(score - maximum); the rest of their sub-blocks becomes 0.
void softmax_split(float* scores, int64_t begin, int64_t end, float* maximum, float* weight) {
    const int64_t first = begin / kSubBlock * kSubBlock, last = (end + kSubBlock - 1) / kSubBlock * kSubBlock;
    for (int64_t t = first; t < begin; ++t) scores[t] = kMinusInfinity;
    for (int64_t t = end; t < last; ++t) scores[t] = kMinusInfinity;
    VecF top = set1(kMinusInfinity);
    for (int64_t t = first; t < last; t += kLanes) top = max(load(scores + t), top);
    *maximum = reduce_max(top);
    const VecF base = set1(*maximum == kMinusInfinity ? 0.0f : *maximum);  // all -inf: weights 0, not NaN
    VecF sum[kVecs];
    for (int v = 0; v < kVecs; ++v) sum[v] = zero();
    for (int64_t t = first; t < last; t += kSubBlock) {
        for (int v = 0; v < kVecs; ++v) {
            const VecF e = exp_nonpositive(sub(load(scores + t + v * kLanes), base));
            store(scores + t + v * kLanes, e);
            sum[v] = add(sum[v], e);
        }
    }
    for (int v = 1; v < kVecs; ++v) sum[0] = add(sum[0], sum[v]);
    *weight = reduce_add(sum[0]);
}

// ---- weighted sum of values: R rows x N vectors of the head dimension ----
// weights: row r at r * kScoreStride, one per token. values: [tokens][head_dim], from the strip's first column. acc: rows head_dim apart,
// in pair order up to the last even vector.
template <class T, int R, int N>
ENGINE_INLINE void value_strip(const float* weights, const T* values, int64_t tokens, int64_t head_dim, float* acc) {
    VecF a[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) a[r][n] = load(acc + r * head_dim + n * kLanes);
    for (int64_t t = 0; t < tokens; ++t) {
        VecF v[N];
        if constexpr (N % 2 == 0) {
            for (int n = 0; n < N; n += 2) load_pair(values + t * head_dim + n * kLanes, &v[n], &v[n + 1]);
        } else {
            v[0] = load_as_float(values + t * head_dim);
        }
        for (int r = 0; r < R; ++r) {
            const VecF w = set1(weights[r * kScoreStride + t]);
            for (int n = 0; n < N; ++n) a[r][n] = fma(w, v[n], a[r][n]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(acc + r * head_dim + n * kLanes, a[r][n]);
}

// Widest strip of a tile of R rows: at most 12 accumulators.
constexpr int value_vectors(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

template <class T, int R, int N>
ENGINE_INLINE void value_strips(const float* weights, const T* values, int64_t tokens, int64_t head_dim, float* acc, int64_t c) {
    for (; c + N * kLanes <= head_dim; c += N * kLanes) value_strip<T, R, N>(weights, values + c, tokens, head_dim, acc + c);
    if constexpr (N > 1) {
        value_strips<T, R, N / 2>(weights, values, tokens, head_dim, acc, c);
    } else if (c < head_dim) {  // vectors of 16 and an odd multiple of 8
        const int n = static_cast<int>(head_dim - c);
        for (int r = 0; r < R; ++r) {
            VecF a = load(acc + r * head_dim + c, n);
            for (int64_t t = 0; t < tokens; ++t)
                a = fma(set1(weights[r * kScoreStride + t]), load_as_float(values + t * head_dim + c, n), a);
            store(acc + r * head_dim + c, a, n);
        }
    }
}

template <class T, int R>
__attribute__((noinline)) void value_tile(const float* weights, const T* values, int64_t tokens, int64_t head_dim, float* acc) {
    value_strips<T, R, value_vectors(R)>(weights, values, tokens, head_dim, acc, 0);
}

template <class T>
void value_rows(int rows, const float* weights, const T* values, int64_t tokens, int64_t head_dim, float* acc) {
    switch (rows) {
        case 1:
            return value_tile<T, 1>(weights, values, tokens, head_dim, acc);
        case 2:
            return value_tile<T, 2>(weights, values, tokens, head_dim, acc);
        case 3:
            return value_tile<T, 3>(weights, values, tokens, head_dim, acc);
        case 4:
            return value_tile<T, 4>(weights, values, tokens, head_dim, acc);
        case 5:
            return value_tile<T, 5>(weights, values, tokens, head_dim, acc);
        default:
            return value_tile<T, 6>(weights, values, tokens, head_dim, acc);
    }
}

// Put a finished row into the order of the head dimension.
template <class T>
void unpair_row(const T* type, float* acc, int64_t head_dim) {
    for (int64_t c = 0; c + 2 * kLanes <= head_dim; c += 2 * kLanes) {
        VecF a = load(acc + c), b = load(acc + c + kLanes);
        unpair(type, &a, &b);
        store(acc + c, a);
        store(acc + c + kLanes, b);
    }
}

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
