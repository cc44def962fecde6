// The inner loops of attention.cpp: tiles of rows over sub-blocks of 16 keys or values, and the softmax of a split.
//
// A row and 16 tokens of head dimension D take 2 D multiply-adds (of a vector of 16) and 2 D * 16 elements of the cache. A tile gives a
// vector of keys or values, once loaded, to all its rows, so from few rows on the multiply-adds are the limit, not the loads.
#pragma once

#include "../kernels.h"
#include "exp.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {

ENGINE_INLINE VecF load_as_float(const int8_t* p) {
#if ENGINE_ISA_LEVEL == 2
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#elif ENGINE_ISA_LEVEL == 1
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
#else
    float t[kLanes];
    for (int i = 0; i < kLanes; ++i) t[i] = p[i];
    return load(t);
#endif
}
ENGINE_INLINE VecF load_as_float(const int8_t* p, int n) {
    int8_t t[kLanes] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load_as_float(t);
}

namespace {

constexpr int kVecs = kSubBlock / kLanes;                    // vectors per 16 tokens
constexpr int kMaxChunks = kAttentionSplit / kSubBlock;      // sub-blocks of a split
constexpr int kTreeChunks = kMaxTreeTokens / kSubBlock + 1;  // sub-blocks of a tree, which may begin inside one
// A row's scores of a split, then those of the tree's sub-blocks. Not a power of two: rows would share cache sets.
constexpr int kScoreStride = kAttentionSplit + kTreeChunks * kSubBlock;
constexpr int kRegisters = ENGINE_ISA_LEVEL == 2 ? 32 : 16;
constexpr int kAccumulators = kRegisters / 4 * 3;  // the rest is for keys or values, and what they are multiplied by
constexpr int kTileRows = kAccumulators / 2;       // a tile's rows x 2 vectors
const float kMinusInfinity = -__builtin_inff();

ENGINE_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
ENGINE_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- elements of the cache ----
// int8 is computed with unscaled; the scales of keys go to the scores, those of values to the weights, once for all of head_dim.
ENGINE_INLINE const float* chunk_scales(const int8_t* chunk, int64_t head_dim) {
    return reinterpret_cast<const float*>(chunk + kSubBlock * head_dim);
}

// ---- elements in pairs of vectors ----
// Two vectors of consecutive elements. Those of bf16 may come in *pair order* (even elements, then odd ones), which takes one load and two
// cheap operations; what is computed from them is put back by `unpair`.
template <class T>
ENGINE_INLINE void load_pair(const T* p, VecF* a, VecF* b) {
    *a = load_as_float(p);
    *b = load_as_float(p + kLanes);
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
template <class T>
ENGINE_INLINE void unpair(const T*, VecF*, VecF*) {}
ENGINE_INLINE void unpair(const BF16*, [[maybe_unused]] VecF* a, [[maybe_unused]] VecF* b) {
#if ENGINE_ISA_LEVEL == 1
    const __m256 low = _mm256_unpacklo_ps(a->v, b->v), high = _mm256_unpackhi_ps(a->v, b->v);
    a->v = _mm256_permute2f128_ps(low, high, 0x20);
    b->v = _mm256_permute2f128_ps(low, high, 0x31);
#endif
}

// ---- prefetch ----
// Sub-blocks lie anywhere, too short for the hardware to learn where the next one is. So each is asked for while the one kAhead before it
// in the list is used: keys of the split, values, keys of the next split.
template <class T>
constexpr int kAhead = sizeof(T) == 4 ? 4 : 8;
constexpr int kLine = 64;  // bytes of a cache line
ENGINE_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

// ---- scores: R rows x B sub-blocks ----
// q: [head_dim][R]. keys[b]: [head_dim][16]. scores: row r at r * kScoreStride.
template <class T, int R, int B>
ENGINE_INLINE void score_tile(const float* q, const T* const* keys, int64_t head_dim, float scale, float* scores) {
    VecF acc[R][B][kVecs];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
            for (int v = 0; v < kVecs; ++v) acc[r][b][v] = zero();
    constexpr int kLineRows = kLine / (kSubBlock * static_cast<int>(sizeof(T)));  // elements of the head dimension in a line of keys
    for (int64_t line = 0; line < head_dim; line += kLineRows) {
        for (int b = 0; b < B; ++b) prefetch(keys[b + kAhead<T>] + line * kSubBlock);
        for (int64_t d = line; d < line + kLineRows; ++d) {
            VecF k[B][kVecs];
            for (int b = 0; b < B; ++b) {
                if constexpr (kVecs == 2) {
                    load_pair(keys[b] + d * kSubBlock, &k[b][0], &k[b][1]);
                } else {
                    k[b][0] = load_as_float(keys[b] + d * kSubBlock);
                }
            }
            for (int r = 0; r < R; ++r) {
                const VecF x = set1(q[d * R + r]);
                for (int b = 0; b < B; ++b)
                    for (int v = 0; v < kVecs; ++v) acc[r][b][v] = fma(x, k[b][v], acc[r][b][v]);
            }
        }
    }
    for (int b = 0; b < B; ++b) {
        VecF factor[kVecs];
        for (int v = 0; v < kVecs; ++v) {
            factor[v] = set1(scale);
            if constexpr (sizeof(T) == 1) factor[v] = mul(factor[v], load(chunk_scales(keys[b], head_dim) + v * kLanes));
        }
        for (int r = 0; r < R; ++r) {
            if constexpr (kVecs == 2) unpair(keys[b], &acc[r][b][0], &acc[r][b][1]);
            for (int v = 0; v < kVecs; ++v) store(scores + r * kScoreStride + b * kSubBlock + v * kLanes, mul(acc[r][b][v], factor[v]));
        }
    }
}

// Sub-blocks taken together, a power of two: as many as the registers allow, for enough independent sums and few broadcasts of queries.
constexpr int score_blocks(int rows) {
    int b = 8 / kVecs;
    while (b > 1 && rows > 1 && (rows + 1) * b * kVecs >= kRegisters) b /= 2;
    return b;
}

template <class T, int R, int B>
ENGINE_INLINE void score_tiles(const float* q, const T* const* keys, int64_t count, int64_t head_dim, float scale, float* scores) {
    int64_t c = 0;
    for (; c + B <= count; c += B) score_tile<T, R, B>(q, keys + c, head_dim, scale, scores + c * kSubBlock);
    if constexpr (B > 1) score_tiles<T, R, B / 2>(q, keys + c, count - c, head_dim, scale, scores + c * kSubBlock);
}

// Scores of R rows over `count` sub-blocks.
template <class T, int R>
__attribute__((noinline)) void score_rows_of(const float* q, const T* const* keys, int64_t count, int64_t head_dim, float scale,
                                             float* scores) {
    score_tiles<T, R, score_blocks(R)>(q, keys, count, head_dim, scale, scores);
}

template <class T, int R = kTileRows>
void score_rows(int rows, const float* q, const T* const* keys, int64_t count, int64_t head_dim, float scale, float* scores) {
    if constexpr (R > 1)
        if (rows < R) return score_rows<T, R - 1>(rows, q, keys, count, head_dim, scale, scores);
    score_rows_of<T, R>(q, keys, count, head_dim, scale, scores);
}

// ---- softmax of one row's split ----
// scores[begin, end) become weights exp(score - maximum); the rest of their sub-blocks becomes 0.
void softmax_split(float* scores, int64_t begin, int64_t end, float* maximum, float* weight) {
    const int64_t first = begin / kSubBlock * kSubBlock, last = (end + kSubBlock - 1) / kSubBlock * kSubBlock;
    for (int64_t t = first; t < begin; ++t) scores[t] = kMinusInfinity;
    for (int64_t t = end; t < last; ++t) scores[t] = kMinusInfinity;
    VecF top[4];  // several: one would wait for itself
    for (VecF& lane : top) lane = set1(kMinusInfinity);
    for (int64_t t = first, i = 0; t < last; t += kLanes, ++i) top[i % 4] = max(load(scores + t), top[i % 4]);
    *maximum = reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
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

// weights[0, n) *= scales[0, n), n <= 16.
void scale_by(float* weights, const float* scales, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const int m = static_cast<int>(min64(n - i, kLanes));
        store(weights + i, mul(load(weights + i, m), load(scales + i, m)), m);
    }
}

// ---- weighted sum of values: R rows x N vectors of the head dimension ----
// Tokens [from, to), counted from values[0]; values[c]: [16][head_dim], of which c0 is the strip's first column. weights: row r at
// r * kScoreStride, from token 0 on. acc: rows head_dim apart, in pair order up to the last even vector.
template <class T, int R, int N>
ENGINE_INLINE void value_strip(const float* weights, const T* const* values, int64_t from, int64_t to, int64_t head_dim, float* acc,
                               int64_t c0) {
    VecF a[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) a[r][n] = load(acc + r * head_dim + c0 + n * kLanes);
    for (int64_t t = from; t < to;) {
        const T* row = values[t / kSubBlock] + t % kSubBlock * head_dim + c0;
        const int64_t end = min64(to, (t / kSubBlock + 1) * kSubBlock);
        const T* next = values[t / kSubBlock + kAhead<T>] + t % kSubBlock * head_dim + c0;
        for (; t < end; ++t, row += head_dim, next += head_dim) {
            for (int n = 0; n < N * kLanes; n += kLine / static_cast<int>(sizeof(T))) prefetch(next + n);
            VecF v[N];
            if constexpr (N % 2 == 0) {
                for (int n = 0; n < N; n += 2) load_pair(row + n * kLanes, &v[n], &v[n + 1]);
            } else {
                v[0] = load_as_float(row);
            }
            for (int r = 0; r < R; ++r) {
                const VecF w = set1(weights[r * kScoreStride + t]);
                for (int n = 0; n < N; ++n) a[r][n] = fma(w, v[n], a[r][n]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(acc + r * head_dim + c0 + n * kLanes, a[r][n]);
}

// Widest strip of a tile of R rows, a power of two. Elements that must be widened take registers besides those of the sums.
constexpr int value_vectors(int rows, int element_size) {
    int n = 8;
    while (n > 1 && (rows * n > kAccumulators || (rows > 1 && element_size < 4 && rows * n + n + 2 > kRegisters))) n /= 2;
    return n;
}

template <class T, int R, int N>
ENGINE_INLINE void value_strips(const float* weights, const T* const* values, int64_t from, int64_t to, int64_t head_dim, float* acc,
                                int64_t c) {
    for (; c + N * kLanes <= head_dim; c += N * kLanes) value_strip<T, R, N>(weights, values, from, to, head_dim, acc, c);
    if constexpr (N > 1) {
        value_strips<T, R, N / 2>(weights, values, from, to, head_dim, acc, c);
    } else if (c < head_dim) {  // vectors of 16 and an odd multiple of 8
        const int n = static_cast<int>(head_dim - c);
        for (int r = 0; r < R; ++r) {
            VecF a = load(acc + r * head_dim + c, n);
            for (int64_t t = from; t < to; ++t)
                a = fma(set1(weights[r * kScoreStride + t]), load_as_float(values[t / kSubBlock] + t % kSubBlock * head_dim + c, n), a);
            store(acc + r * head_dim + c, a, n);
        }
    }
}

template <class T, int R>
__attribute__((noinline)) void value_rows_of(const float* weights, const T* const* values, int64_t from, int64_t to, int64_t head_dim,
                                             float* acc) {
    value_strips<T, R, value_vectors(R, sizeof(T))>(weights, values, from, to, head_dim, acc, 0);
}

template <class T, int R = kTileRows>
void value_rows(int rows, const float* weights, const T* const* values, int64_t from, int64_t to, int64_t head_dim, float* acc) {
    if constexpr (R > 1)
        if (rows < R) return value_rows<T, R - 1>(rows, weights, values, from, to, head_dim, acc);
    value_rows_of<T, R>(weights, values, from, to, head_dim, acc);
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
