// Paged attention of a few rows (queries x heads of one KV group) over splits of 512 tokens.
//
// Within a split: scores of 16 tokens at a time (query element broadcast, keys of 16 tokens in vectors, summed over the head dimension in
// order), softmax on its own (maximum, exp, sum over lanes that are token positions modulo 16), values added in token order. Splits are
// then folded in order (FlashDecoding, Dao et al. 2023). A row's operations depend on its own query and the absolute positions it sees,
// never on the other rows of its tile: a score has its own accumulator, tokens a row may not see get weight exactly 0 in the sum and are
// left out of the loop over values (their slots may hold NaN).
//
// An int8 key k of scale s gives the score (q . k) * (scale * s), an int8 value v of scale s adds (w * s) * v, w being the token's weight.
//
// Trees of drafts (tree attention, Miao et al. 2024). The nodes of a row's path stand anywhere in the tree but count as positions
// tree_start, tree_start + 1, ... So all nodes are scored once per item, beside the split; each split takes a row's own from there to the
// columns of their positions, and adds their values after those of the tokens before the tree, one by one in the order of the path: to
// every accumulator the same operations as if the path were the end of a sequence. Nodes off the path are scored too but never taken.
#include "../kernels.h"
#include "../thread_pool.h"
#include "attention_tiles.h"
#include "exp.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

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

void finish(float* out, Softmax state, const float* sum, int64_t head_dim) {
    const float factor = 1.0f / state.weight;
    for (int64_t d = 0; d < head_dim; ++d) out[d] = sum[d] * factor;
}

// ---- one work item ----
constexpr int64_t kPanel = 4;  // sub-blocks that all tiles go over before the next ones: they stay in the first-level cache

__attribute__((noinline)) void spread(const float* source, int64_t n, float* target, int64_t step) {
    for (int64_t i = 0; i < n; ++i) target[i * step] = source[i];
}

template <class T>
struct Work {
    const AttentionArgs& a;
    const AttentionItem& item;
    const int64_t head_dim = a.head_dim, group = a.num_heads / a.num_kv_heads, rows = item.row_end - item.row_begin;
    // Rows are cut evenly into tiles of at most kTileRows.
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;

    int64_t tile[kAttentionMaxRows / kTileRows + 2];  // tile i: rows [tile[i], tile[i + 1])
    float *q, *split_sums, *sums, *scores;            // scratch
    AttentionRange seen[kAttentionMaxRows];
    int64_t oldest, newest;  // [oldest, newest) is what some row sees of the tokens before a tree
    int64_t committed;       // where the tree begins, or the context ends
    Softmax states[kAttentionMaxRows];

    // The sub-blocks from that in which the tree begins to the newest node of the rows; none in splits before the tree.
    int64_t tree_count = 0;
    const T* tree_chunks[2 * kTreeChunks + kAhead<T>];  // as `chunks`

    // Of the current split, which starts at token `base`:
    int64_t base, first_chunk, count;             // the sub-blocks [first_chunk, first_chunk + count) from its start are seen by some row
    const T* chunks[2 * kMaxChunks + kAhead<T>];  // where their keys lie, then their values, then the next keys
    AttentionRange inside[kAttentionMaxRows];     // what each row sees, from `base`
    Softmax splits[kAttentionMaxRows];

    Work(const AttentionArgs& args, const AttentionItem& work_item) : a(args), item(work_item) {}  // the arrays stay uninitialised

    int tile_rows(int64_t i) const { return static_cast<int>(tile[i + 1] - tile[i]); }

    float* row_of(float* tensor, int64_t row) const {
        row += item.row_begin;
        return tensor + ((item.first_token + row / group) * a.num_heads + item.kv_head * group + row % group) * head_dim;
    }

    // Call visit(column, node) for the nodes of row r's path that lie in the current split, in order: the column of their position there,
    // and where they are among the tree's sub-blocks.
    template <class Visit>
    ENGINE_METHOD void visit_path(int64_t r, const Visit& visit) const {
        int64_t column = item.tree_start - base;
        for (uint64_t bits = item.ancestors[(item.row_begin + r) / group]; bits != 0; bits &= bits - 1, ++column)
            if (column >= inside[r].begin && column < inside[r].end) visit(column, item.tree_start % kSubBlock + __builtin_ctzll(bits));
    }

    void prepare() {
        q = static_cast<float*>(scratch(kThreadScratch, rows * (3 * head_dim + kScoreStride) * int64_t{sizeof(float)}));
        split_sums = q + rows * head_dim;
        sums = split_sums + rows * head_dim;
        scores = sums + rows * head_dim;
        for (int64_t i = 0; i <= tiles; ++i) tile[i] = i * rows / tiles;
        for (int64_t i = 0; i < tiles; ++i)  // a tile's queries as [head_dim][rows]
            for (int64_t r = tile[i]; r < tile[i + 1]; ++r)
                spread(row_of(const_cast<float*>(a.q), r), head_dim, q + tile[i] * head_dim + r - tile[i], tile_rows(i));
        for (int64_t r = 0; r < rows; ++r) seen[r] = attention_range(item, group, a.window, item.row_begin + r);
        committed = item.ancestors == nullptr ? item.context : item.tree_start;
        oldest = seen[0].begin;
        newest = min64(seen[rows - 1].end, committed);
        if (committed < min64(item.context, item.split_end * kAttentionSplit)) score_tree();
    }

    // Where the keys of n sub-blocks lie, from the sequence's sub-block `start` on.
    void list_keys(int64_t start, int64_t n, const T** keys) const {
        const int64_t per_block = a.block_size / kSubBlock, chunk = sub_block_elements(head_dim, sizeof(T));
        const int32_t* block = a.block_table + item.sequence * a.max_blocks + start / per_block;
        int64_t sub_block = start % per_block;
        for (int64_t c = 0; c < n; ++c) {
            keys[c] = static_cast<const T*>(a.key_cache) + ((*block * a.num_kv_heads + item.kv_head) * per_block + sub_block) * chunk;
            if (++sub_block == per_block) {
                sub_block = 0;
                ++block;
            }
        }
    }

    // The keys of n >= 1 sub-blocks, their values, and what is prefetched after them: of sub-blocks from `next` on, `ahead` keys.
    void list_chunks(int64_t start, int64_t n, int64_t next, int64_t ahead, const T** list) const {
        list_keys(start, n, list);
        for (int64_t c = 0; c < n; ++c) list[n + c] = static_cast<const T*>(a.value_cache) + (list[c] - static_cast<const T*>(a.key_cache));
        ahead = max64(min64(ahead, kAhead<T>), 0);
        list_keys(next, ahead, list + 2 * n);
        for (int64_t c = ahead; c < kAhead<T>; ++c) list[2 * n + c] = list[2 * n - 1];  // nothing is left to prefetch
    }

    void score_tree() {
        const int64_t start = item.tree_start / kSubBlock, end = item.context - item.queries + (item.row_end - 1) / group + 1;
        tree_count = (end + kSubBlock - 1) / kSubBlock - start;
        list_chunks(start, tree_count, 0, 0, tree_chunks);
        for (int64_t i = 0; i < tiles; ++i)
            score_rows<T>(tile_rows(i), q + tile[i] * head_dim, tree_chunks, tree_count, head_dim, a.scale,
                          scores + tile[i] * kScoreStride + kAttentionSplit);
    }

    void enter_split(int64_t split) {
        base = split * kAttentionSplit;
        first_chunk = max64(oldest - base, 0) / kSubBlock;
        const int64_t last_chunk = (min64(newest - base, kAttentionSplit) + kSubBlock - 1) / kSubBlock;
        count = max64(last_chunk - first_chunk, 0);  // a split may hold nothing but nodes
        if (count == 0) return;
        const int64_t next = (split + 1) * kMaxChunks, end = min64((newest + kSubBlock - 1) / kSubBlock, item.split_end * kMaxChunks);
        list_chunks(base / kSubBlock + first_chunk, count, next, end - next, chunks);
    }

    int64_t panel() const { return tiles == 1 ? kMaxChunks : kPanel; }

    void compute_scores() {
        for (int64_t c = 0; c < count; c += panel()) {
            const int64_t end = min64(c + panel(), count);
            for (int64_t i = 0; i < tiles; ++i) {  // those that some row of the tile sees
                const int64_t oldest_chunk = max64(seen[tile[i]].begin - base, 0) / kSubBlock - first_chunk;
                const int64_t newest_chunk = (seen[tile[i + 1] - 1].end - base + kSubBlock - 1) / kSubBlock - first_chunk;
                const int64_t from = max64(oldest_chunk, c), to = min64(newest_chunk, end);
                if (from < to)
                    score_rows<T>(tile_rows(i), q + tile[i] * head_dim, chunks + from, to - from, head_dim, a.scale,
                                  scores + tile[i] * kScoreStride + (first_chunk + from) * kSubBlock);
            }
        }
    }

    void compute_weights() {
        for (int64_t r = 0; r < rows; ++r) {
            inside[r] = {max64(seen[r].begin - base, 0), min64(seen[r].end - base, kAttentionSplit)};
            if (inside[r].begin >= inside[r].end) continue;
            float* row = scores + r * kScoreStride;
            if (tree_count > 0) visit_path(r, [&](int64_t column, int64_t node) { row[column] = row[kAttentionSplit + node]; });
            softmax_split(row, inside[r].begin, inside[r].end, &splits[r].maximum, &splits[r].weight);
            if constexpr (sizeof(T) == 1) scale_weights(r, row);
        }
    }

    // The scales of int8 values go to the weights, after their sum is taken.
    void scale_weights(int64_t r, float* row) const {
        const int64_t end = min64(inside[r].end, committed - base);
        for (int64_t t = inside[r].begin / kSubBlock * kSubBlock; t < end; t += kSubBlock)
            scale_by(row + t, chunk_scales(chunks[count + t / kSubBlock - first_chunk], head_dim), min64(end - t, kSubBlock));
        if (tree_count > 0)
            visit_path(r, [&](int64_t column, int64_t node) {
                row[column] *= chunk_scales(tree_chunks[tree_count + node / kSubBlock], head_dim)[node % kSubBlock];
            });
    }

    // Add tokens [from, to) of the split, which rows [r0, r1) all see; values[0] are those of the sub-block at `begin`.
    void add_values(int64_t r0, int64_t r1, int64_t from, int64_t to, int64_t begin, const T* const* values) {
        if (from < to)
            value_rows<T>(static_cast<int>(r1 - r0), scores + r0 * kScoreStride + begin, values, from - begin, to - begin, head_dim,
                          split_sums + r0 * head_dim);
    }

    void compute_sums() {
        memset(split_sums, 0, static_cast<size_t>(rows * head_dim) * sizeof(float));
        for (int64_t c = 0; c < count; c += panel()) {
            const T* const* values = chunks + count + c;
            const int64_t begin = (first_chunk + c) * kSubBlock;
            const int64_t end = min64((first_chunk + min64(c + panel(), count)) * kSubBlock, committed - base);
            for (int64_t i = 0; i < tiles; ++i) {
                const int64_t r0 = tile[i], r1 = tile[i + 1];
                const int64_t from = max64(inside[r1 - 1].begin, begin), to = max64(min64(inside[r0].end, end), from);
                // Tokens that only some rows of the tile see are added row by row, before and after the common ones.
                if (inside[r0].begin < from)
                    for (int64_t r = r0; r < r1; ++r)
                        add_values(r, r + 1, max64(inside[r].begin, begin), min64(min64(inside[r].end, end), from), begin, values);
                add_values(r0, r1, from, to, begin, values);
                if (min64(inside[r1 - 1].end, end) > to)
                    for (int64_t r = r0; r < r1; ++r)
                        add_values(r, r + 1, max64(max64(inside[r].begin, begin), to), min64(inside[r].end, end), begin, values);
            }
        }
        if (tree_count > 0) add_paths();
    }

    void add_paths() {
        for (int64_t r0 = 0, r1; r0 < rows; r0 = r1) {  // rows of one query: they have the same path
            r1 = min64(min64(r0 + group - (item.row_begin + r0) % group, r0 + kTileRows), rows);
            visit_path(r0, [&](int64_t column, int64_t node) {
                const int64_t offset = node % kSubBlock;  // of the node in its sub-block
                add_values(r0, r1, column, column + 1, column - offset, tree_chunks + tree_count + node / kSubBlock);
            });
        }
    }

    void keep(int64_t split) {
        for (int64_t r = 0; r < rows; ++r) {
            if (inside[r].begin >= inside[r].end) continue;
            float* sum = split_sums + r * head_dim;
            unpair_row(static_cast<const T*>(nullptr), sum, head_dim);
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

    void run() {
        prepare();
        for (int64_t split = item.split_begin; split < item.split_end; ++split) {
            enter_split(split);
            compute_scores();
            compute_weights();
            compute_sums();
            keep(split);
        }
        if (item.partial_offset >= 0) return;
        for (int64_t r = 0; r < rows; ++r) finish(row_of(a.out, r), states[r], sums + r * head_dim, head_dim);
    }

    // Instead of run(), when all splits of the rows lie in `partials`.
    void merge() {
        float* sum = static_cast<float*>(scratch(kThreadScratch, head_dim * int64_t{sizeof(float)}));
        for (int64_t r = 0; r < rows; ++r) {
            const AttentionRange range = attention_range(item, group, a.window, item.row_begin + r);
            const int64_t first = range.begin / kAttentionSplit, last = (range.end - 1) / kAttentionSplit;
            Softmax state;
            for (int64_t split = first; split <= last; ++split) {
                const float* partial = a.partials + item.partial_offset + ((split - item.partial_split) * rows + r) * (head_dim + 2);
                fold(split == first, &state, sum, {partial[head_dim], partial[head_dim + 1]}, partial, head_dim);
            }
            finish(row_of(a.out, r), state, sum, head_dim);
        }
    }
};

}  // namespace

void attention_item(const AttentionArgs& args, const AttentionItem& item) {
    if (args.dtype == kF32) {
        Work<float>(args, item).run();
    } else if (args.dtype == kBF16) {
        Work<BF16>(args, item).run();
    } else {
        Work<int8_t>(args, item).run();
    }
}

void attention_merge(const AttentionArgs& args, const AttentionItem& item) { Work<float>(args, item).merge(); }

}  // namespace ENGINE_ISA
}  // namespace engine
