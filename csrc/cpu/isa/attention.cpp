// Paged attention of a few rows (queries x heads of one KV group) over splits of 512 tokens.
//
// Within a split: scores of 16 tokens at a time (query element broadcast, keys of 16 tokens in vectors, summed over the head dimension in
// order), softmax on its own (maximum, exp, sum over lanes that are token positions modulo 16), values added in token order. Splits are
// then folded in order (FlashDecoding, Dao et al. 2023). A row's operations depend on its own query and the absolute positions it sees,
// never on the other rows of its tile: a score has its own accumulator, tokens a row may not see get weight exactly 0 in the sum and are
// left out of the loop over values (their slots may hold NaN).
#include "../kernels.h"
#include "../thread_pool.h"
#include "exp.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int kVecs = kSubBlock / kLanes;                  // vectors per 16 tokens
constexpr int kMaxChunks = kAttentionSplit / kSubBlock;    // sub-blocks of a split
constexpr int kScoreStride = kAttentionSplit + kSubBlock;  // not a power of two: rows would share cache sets
constexpr int kTileRows = 6;                               // 6 rows x 2 vectors of accumulators, 2 of keys: 15 registers of 16
constexpr int kAhead = 4;                                  // sub-blocks listed past a split's end, to prefetch
const float kMinusInfinity = -__builtin_inff();

ENGINE_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
ENGINE_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- scores: R rows x B sub-blocks ----
// q: [head_dim][R]. keys[b]: [head_dim][16]. scores: row r at r * kScoreStride. next[b] is prefetched while keys[b] is read.
template <class T, int R, int B>
__attribute__((noinline)) void score_tile(const float* q, const T* const* keys, const T* const* next, int64_t head_dim, float scale,
                                          float* scores) {
    VecF acc[R][B][kVecs];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
            for (int v = 0; v < kVecs; ++v) acc[r][b][v] = zero();
    for (int64_t d = 0; d < head_dim; ++d) {
        for (int b = 0; b < B; ++b) {
            __builtin_prefetch(next[b] + d * kSubBlock);
            VecF k[kVecs];
            for (int v = 0; v < kVecs; ++v) k[v] = load_as_float(keys[b] + d * kSubBlock + v * kLanes);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kVecs; ++v) acc[r][b][v] = fma(set1(q[d * R + r]), k[v], acc[r][b][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
            for (int v = 0; v < kVecs; ++v) store(scores + r * kScoreStride + b * kSubBlock + v * kLanes, mul(acc[r][b][v], set1(scale)));
}

template <class T>
void score_rows(int rows, const float* q, const T* const* keys, const T* const* next, int64_t head_dim, float scale, float* scores) {
    switch (rows) {
        case 1:
            return score_tile<T, 1, 1>(q, keys, next, head_dim, scale, scores);
        case 2:
            return score_tile<T, 2, 1>(q, keys, next, head_dim, scale, scores);
        case 3:
            return score_tile<T, 3, 1>(q, keys, next, head_dim, scale, scores);
        case 4:
            return score_tile<T, 4, 1>(q, keys, next, head_dim, scale, scores);
        case 5:
            return score_tile<T, 5, 1>(q, keys, next, head_dim, scale, scores);
        default:
            return score_tile<T, 6, 1>(q, keys, next, head_dim, scale, scores);
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
// weights: row r at r * kScoreStride, one per token. values: [tokens][head_dim], from the strip's first column. acc: rows head_dim apart.
template <class T, int R, int N>
ENGINE_INLINE void value_strip(const float* weights, const T* values, const T* next, int64_t tokens, int64_t head_dim, float* acc) {
    constexpr int kPerLine = 64 / sizeof(T);
    VecF a[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) a[r][n] = load(acc + r * head_dim + n * kLanes);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int c = 0; c < N * kLanes; c += kPerLine) __builtin_prefetch(next + t * head_dim + c);
        VecF v[N];
        for (int n = 0; n < N; ++n) v[n] = load_as_float(values + t * head_dim + n * kLanes);
        for (int r = 0; r < R; ++r) {
            const VecF w = set1(weights[r * kScoreStride + t]);
            for (int n = 0; n < N; ++n) a[r][n] = fma(w, v[n], a[r][n]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(acc + r * head_dim + n * kLanes, a[r][n]);
}

template <class T, int R>
__attribute__((noinline)) void value_tile(const float* weights, const T* values, const T* next, int64_t tokens, int64_t head_dim,
                                          float* acc) {
    constexpr int kWide = R == 1 ? 8 : R <= 3 ? 4 : 2;  // at most 12 accumulators
    int64_t c = 0;
    for (; c + kWide * kLanes <= head_dim; c += kWide * kLanes)
        value_strip<T, R, kWide>(weights, values + c, next + c, tokens, head_dim, acc + c);
    if (kWide > 4 && c + 4 * kLanes <= head_dim) {
        value_strip<T, R, 4>(weights, values + c, next + c, tokens, head_dim, acc + c);
        c += 4 * kLanes;
    }
    if (kWide > 2 && c + 2 * kLanes <= head_dim) {
        value_strip<T, R, 2>(weights, values + c, next + c, tokens, head_dim, acc + c);
        c += 2 * kLanes;
    }
    if (c + kLanes <= head_dim) {
        value_strip<T, R, 1>(weights, values + c, next + c, tokens, head_dim, acc + c);
        c += kLanes;
    }
    if (c < head_dim) {  // 16 lanes and an odd multiple of 8
        const int n = static_cast<int>(head_dim - c);
        for (int r = 0; r < R; ++r) {
            VecF a = load(acc + r * head_dim + c, n);
            for (int64_t t = 0; t < tokens; ++t)
                a = fma(set1(weights[r * kScoreStride + t]), load_as_float(values + t * head_dim + c, n), a);
            store(acc + r * head_dim + c, a, n);
        }
    }
}

template <class T>
void value_rows(int rows, const float* weights, const T* values, const T* next, int64_t tokens, int64_t head_dim, float* acc) {
    switch (rows) {
        case 1:
            return value_tile<T, 1>(weights, values, next, tokens, head_dim, acc);
        case 2:
            return value_tile<T, 2>(weights, values, next, tokens, head_dim, acc);
        case 3:
            return value_tile<T, 3>(weights, values, next, tokens, head_dim, acc);
        case 4:
            return value_tile<T, 4>(weights, values, next, tokens, head_dim, acc);
        case 5:
            return value_tile<T, 5>(weights, values, next, tokens, head_dim, acc);
        default:
            return value_tile<T, 6>(weights, values, next, tokens, head_dim, acc);
    }
}

// ---- folding splits ----
struct Softmax {
    float maximum, weight;
};

// (state, sum) += (split, split_sum), both relative to their own maximum; the first split is copied.
void fold(bool first, Softmax* state, float* sum, Softmax split, const float* split_sum, int64_t head_dim) {
    if (first) {
        *state = split;
        memcpy(sum, split_sum, static_cast<size_t>(head_dim) * sizeof(float));
        return;
    }
    const float maximum = state->maximum > split.maximum ? state->maximum : split.maximum;
    const float base = maximum == kMinusInfinity ? 0.0f : maximum;
    const float old_factor = exp_nonpositive(state->maximum - base), new_factor = exp_nonpositive(split.maximum - base);
    state->maximum = maximum;
    state->weight = state->weight * old_factor + split.weight * new_factor;
    for (int64_t d = 0; d < head_dim; ++d) sum[d] = sum[d] * old_factor + split_sum[d] * new_factor;
}

float* row_of(float* base, const AttentionArgs& a, const AttentionItem& item, int64_t group, int64_t row) {
    return base + ((item.first_token + row / group) * a.num_heads + item.kv_head * group + row % group) * a.head_dim;
}

void finish(float* out, Softmax state, const float* sum, int64_t head_dim) {
    const float factor = 1.0f / state.weight;
    for (int64_t d = 0; d < head_dim; ++d) out[d] = sum[d] * factor;
}

// ---- one work item ----
// Where the sub-blocks of an item's sequence and KV head lie.
template <class T>
struct Cache {
    const T* keys;
    const T* values;
    const int32_t* table;
    int64_t block_size, block_stride, head_dim;  // block_stride: elements from a block to the next, the same in both caches

    // `sub_block` counts 16 tokens from the start of the sequence.
    const T* at(const T* base, int64_t sub_block) const {
        const int64_t per_block = block_size / kSubBlock;
        return base + table[sub_block / per_block] * block_stride + sub_block % per_block * kSubBlock * head_dim;
    }
};

template <class T>
void run_item(const AttentionArgs& a, const AttentionItem& item) {
    const int64_t head_dim = a.head_dim, group = a.num_heads / a.num_kv_heads, rows = item.row_end - item.row_begin;
    const int64_t head_offset = item.kv_head * a.block_size * head_dim;
    const Cache<T> cache = {static_cast<const T*>(a.key_cache) + head_offset, static_cast<const T*>(a.value_cache) + head_offset,
                            a.block_table + item.sequence * a.max_blocks,     a.block_size,
                            a.num_kv_heads * a.block_size * head_dim,         head_dim};

    float* q = static_cast<float*>(scratch(kThreadScratch, rows * (3 * head_dim + kScoreStride) * int64_t{sizeof(float)}));
    float* split_sums = q + rows * head_dim;
    float* sums = split_sums + rows * head_dim;
    float* scores = sums + rows * head_dim;
    Softmax states[kAttentionMaxRows];
    AttentionRange seen[kAttentionMaxRows];

    // Rows are cut evenly into tiles of at most six; a tile's queries lie as [head_dim][rows].
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    int64_t tile_begin[kAttentionMaxRows + 1];
    for (int64_t i = 0; i <= tiles; ++i) tile_begin[i] = i * rows / tiles;
    for (int64_t i = 0; i < tiles; ++i) {
        const int64_t n = tile_begin[i + 1] - tile_begin[i];
        for (int64_t r = 0; r < n; ++r) {
            const int64_t row = item.row_begin + tile_begin[i] + r;
            const float* source = row_of(const_cast<float*>(a.q), a, item, group, row);
            for (int64_t d = 0; d < head_dim; ++d) q[tile_begin[i] * head_dim + d * n + r] = source[d];
        }
    }
    for (int64_t r = 0; r < rows; ++r) seen[r] = attention_range(item, group, a.window, item.row_begin + r);
    const int64_t oldest = seen[0].begin, newest = seen[rows - 1].end;

    for (int64_t split = item.split_begin; split < item.split_end; ++split) {
        const int64_t base = split * kAttentionSplit, base_chunk = base / kSubBlock;
        // The sub-blocks [first, last) of the split that some row sees: keys, then values, then what comes after, to prefetch.
        const int64_t first = (max64(oldest, base) - base) / kSubBlock;
        const int64_t last = (min64(newest, base + kAttentionSplit) - base + kSubBlock - 1) / kSubBlock;
        const int64_t count = last - first;
        const T* chunks[2 * kMaxChunks + kAhead];
        for (int64_t c = 0; c < count; ++c) {
            chunks[c] = cache.at(cache.keys, base_chunk + first + c);
            chunks[count + c] = cache.at(cache.values, base_chunk + first + c);
        }
        for (int64_t c = 0; c < kAhead; ++c) {
            const int64_t following = base_chunk + last + c;
            const bool exists = split + 1 < item.split_end && following * kSubBlock < newest;
            chunks[2 * count + c] = exists ? cache.at(cache.keys, following) : chunks[2 * count - 1];
        }
        const int64_t ahead = 1;

        int64_t c = 0;
        if (rows == 1) {  // few rows: several sub-blocks at once, for enough independent sums
            for (; c + 4 <= count; c += 4)
                score_tile<T, 1, 4>(q, chunks + c, chunks + c + 4, head_dim, a.scale, scores + (first + c) * kSubBlock);
        } else if (rows == 2) {
            for (; c + 2 <= count; c += 2)
                score_tile<T, 2, 2>(q, chunks + c, chunks + c + 2, head_dim, a.scale, scores + (first + c) * kSubBlock);
        }
        for (; c < count; ++c) {
            const int64_t begin = base + (first + c) * kSubBlock;
            bool fetch = true;
            for (int64_t i = 0; i < tiles; ++i) {
                if (seen[tile_begin[i + 1] - 1].end <= begin || seen[tile_begin[i]].begin >= begin + kSubBlock) continue;
                score_rows<T>(static_cast<int>(tile_begin[i + 1] - tile_begin[i]), q + tile_begin[i] * head_dim, chunks + c,
                              chunks + c + (fetch ? ahead : 0), head_dim, a.scale,
                              scores + tile_begin[i] * kScoreStride + (first + c) * kSubBlock);
                fetch = false;
            }
        }

        AttentionRange inside[kAttentionMaxRows];  // what a row sees of this split, from its start
        Softmax splits[kAttentionMaxRows];
        for (int64_t r = 0; r < rows; ++r) {
            inside[r] = {max64(seen[r].begin - base, 0), min64(seen[r].end - base, kAttentionSplit)};
            if (inside[r].begin < inside[r].end)
                softmax_split(scores + r * kScoreStride, inside[r].begin, inside[r].end, &splits[r].maximum, &splits[r].weight);
        }

        memset(split_sums, 0, static_cast<size_t>(rows * head_dim) * sizeof(float));
        for (c = 0; c < count; ++c) {
            const T* values = chunks[count + c];
            const T* next = chunks[count + c + ahead];
            const int64_t begin = (first + c) * kSubBlock, end = begin + kSubBlock;
            for (int64_t i = 0; i < tiles; ++i) {
                const int64_t r0 = tile_begin[i], r1 = tile_begin[i + 1];
                // All rows of the tile see [from, to); earlier and later tokens are added row by row.
                const int64_t from = max64(inside[r1 - 1].begin, begin), to = max64(min64(inside[r0].end, end), from);
                for (int64_t r = r0; r < r1; ++r) {
                    const int64_t t = max64(inside[r].begin, begin), n = min64(min64(inside[r].end, end), from) - t;
                    if (n > 0)
                        value_rows<T>(1, scores + r * kScoreStride + t, values + (t - begin) * head_dim, values, n, head_dim,
                                      split_sums + r * head_dim);
                }
                if (from < to)
                    value_rows<T>(static_cast<int>(r1 - r0), scores + r0 * kScoreStride + from, values + (from - begin) * head_dim,
                                  i == 0 ? next : values, to - from, head_dim, split_sums + r0 * head_dim);
                for (int64_t r = r0; r < r1; ++r) {
                    const int64_t t = max64(max64(inside[r].begin, begin), to), n = min64(inside[r].end, end) - t;
                    if (n > 0)
                        value_rows<T>(1, scores + r * kScoreStride + t, values + (t - begin) * head_dim, values, n, head_dim,
                                      split_sums + r * head_dim);
                }
            }
        }

        for (int64_t r = 0; r < rows; ++r) {
            if (inside[r].begin >= inside[r].end) continue;
            const float* sum = split_sums + r * head_dim;
            if (item.partial_offset >= 0) {
                float* partial = a.partials + item.partial_offset + ((split - item.partial_split) * rows + r) * (head_dim + 2);
                memcpy(partial, sum, static_cast<size_t>(head_dim) * sizeof(float));
                partial[head_dim] = splits[r].maximum;
                partial[head_dim + 1] = splits[r].weight;
            } else {
                fold(split == seen[r].begin / kAttentionSplit, &states[r], sums + r * head_dim, splits[r], sum, head_dim);
            }
        }
    }
    if (item.partial_offset >= 0) return;
    for (int64_t r = 0; r < rows; ++r) finish(row_of(a.out, a, item, group, item.row_begin + r), states[r], sums + r * head_dim, head_dim);
}

}  // namespace

void attention_item(const AttentionArgs& args, const AttentionItem& item) {
    if (args.dtype == kF32) {
        run_item<float>(args, item);
    } else {
        run_item<BF16>(args, item);
    }
}

void attention_merge(const AttentionArgs& a, const AttentionItem& item) {
    const int64_t head_dim = a.head_dim, group = a.num_heads / a.num_kv_heads, rows = item.row_end - item.row_begin;
    float* sum = static_cast<float*>(scratch(kThreadScratch, head_dim * int64_t{sizeof(float)}));
    for (int64_t r = 0; r < rows; ++r) {
        const AttentionRange seen = attention_range(item, group, a.window, item.row_begin + r);
        const int64_t first = seen.begin / kAttentionSplit, last = (seen.end - 1) / kAttentionSplit;
        Softmax state;
        for (int64_t split = first; split <= last; ++split) {
            const float* partial = a.partials + item.partial_offset + ((split - item.partial_split) * rows + r) * (head_dim + 2);
            fold(split == first, &state, sum, {partial[head_dim], partial[head_dim + 1]}, partial, head_dim);
        }
        finish(row_of(a.out, a, item, group, item.row_begin + r), state, sum, head_dim);
    }
}

}  // namespace ENGINE_ISA
}  // namespace engine
