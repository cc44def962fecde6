// out = concat_i(x @ weights[i].T + biases[i]) + residual, over weights that stay row-major [N, K] in their own storage.
//
// Bounds, for M rows of x: bytes = N * K * sizeof(weight) (weights dominate; x and out are M * (K + N) * 4), flops = 2 * M * N * K, so
//     time >= max(bytes / memory bandwidth, flops / FMA peak).
// On 2 Zen 3 cores (31 GB/s, 200 GFLOP/s) the two meet at M = 6.5 for bf16 and M = 13 for fp32: below, rows beyond the first should be
// nearly free; above, the FMA units are the limit. K = 2048, N = 8184: bf16 1.08 ms (bytes) and 0.17 ms per row (flops), fp32 2.16 ms.
//
// Both limits are served by one walk. Weight rows are taken four at a time, in chunks of K short enough that four chunks (16 KB) stay in
// the first-level cache while all rows of x pass over them, a few at a time; meanwhile the tiles fetch the next block's weights.
// Dot products run along K (vectors of K, not of N) because the weights are not transposed; the sum over lanes is paid once per chunk. x is
// packed once per call: chunk by chunk (so that tiles see no power-of-two strides), even and odd elements apart for bf16 weights.
//
// The cuts of K depend on K alone and the order inside a tile is fixed (linear_rows_tile.h): an output depends on its x row and weight row
// only.
#include "../kernels.h"
#include "../thread_pool.h"
#include "linear.h"
#include "linear_rows_tile.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kMaxChunk = 1024;  // elements of K
// Rows of x that share a sweep, in whole tiles: 72 chunks (288 KB) stay in the second-level cache.
constexpr int64_t kMaxRows = 72 / kTileRows * kTileRows;
constexpr int64_t kMaxSweep = 64;  // weight rows per sweep: with each chunk of x, all of them in blocks of four
constexpr int64_t kMinSweep = 8;
constexpr int64_t kPassRows = 4 * kMaxRows;  // rows of x packed at once, which bounds the scratch of a long prompt
constexpr int64_t kSmallInput = 1 << 15;     // elements of x: 128 KB

struct Plan {
    const LinearArgs* args;
    int64_t columns;        // of out
    int64_t chunk, chunks;  // cuts of K
    int64_t m0, m;          // rows of x in this pass
    int64_t group, groups;  // rows of x per item
    int64_t sweep;          // weight rows per item
    float* x;               // packed: [chunks][m][chunk]
};

struct Sweep {
    const LinearSegment* segment;
    int64_t row, rows, column;  // weight rows, and the column of out of the first
};

int64_t count_sweeps(const LinearArgs& args, int64_t sweep) {
    int64_t count = 0;
    for (int s = 0; s < args.num_segments; ++s) count += ceil_div(args.segments[s].n, sweep);
    return count;
}

Sweep locate(const Plan& plan, int64_t index) {
    int64_t column = 0;
    const LinearSegment* segment = plan.args->segments;
    for (int64_t n; index >= (n = ceil_div(segment->n, plan.sweep)); ++segment) {
        index -= n;
        column += segment->n;
    }
    const int64_t row = index * plan.sweep;
    return {segment, row, smaller(plan.sweep, segment->n - row), column + row};
}

// One chunk of up to four weight rows against m rows of x.
template <class T, int MR, int kFetch>
ENGINE_INLINE void tile_columns(const T* w, int64_t k, int64_t rows, const float* x, int64_t xs, int64_t len, float* sums, int64_t ld,
                                bool first, Ahead ahead) {
    if (rows == kTileColumns) return tile<T, MR, kTileColumns, kFetch>(w, k, x, xs, len, sums, ld, first, ahead);
    for (int64_t j = 0; j < rows; ++j) tile<T, MR, 1, 0>(w + j * k, k, x, xs, len, sums + j, ld, first, ahead);
}

template <class T, int kFetch, int MR = kTileRows>
ENGINE_INLINE void tile_rows(int64_t m, const T* w, int64_t k, int64_t rows, const float* x, int64_t xs, int64_t len, float* sums,
                             int64_t ld, bool first, Ahead ahead) {
    if constexpr (MR > 1) {
        if (m < MR) return tile_rows<T, kFetch, MR - 1>(m, w, k, rows, x, xs, len, sums, ld, first, ahead);
    }
    tile_columns<T, MR, kFetch>(w, k, rows, x, xs, len, sums, ld, first, ahead);
}

// The tiles share in fetching the next block's weights, the four rows at `next`. (Measured, with memory at 70 GB/s: the first tile's
// products hide behind that, those of further tiles hardly.)
template <class T>
void block(const T* w, int64_t k, int64_t rows, const float* x, int64_t xs, int64_t m, int64_t len, float* sums, int64_t ld, bool first,
           const T* next) {
    const int64_t row_bytes = k * static_cast<int64_t>(sizeof(T)), tiles = ceil_div(m, kTileRows);
    // Where the chunk is the whole row, the rows lie end to end: fetch them in the order of their addresses, which memory likes best.
    const bool whole = len == k;
    const char* p = reinterpret_cast<const char*>(next);
    for (int64_t t = 0, i = 0, fetched = 0; t < tiles; ++t) {
        const int64_t height = ceil_div(m - i, tiles - t), lines = ceil_div(4 - fetched, tiles - t);
        const Ahead ahead = {p, whole ? 64 : row_bytes, whole ? lines * 64 : 64};
        const float* xi = x + i * xs;
        float* to = sums + i * ld;
        if (lines == 4)
            tile_rows<T, 4>(height, w, k, rows, xi, xs, len, to, ld, first, ahead);
        else if (lines == 2)
            tile_rows<T, 2>(height, w, k, rows, xi, xs, len, to, ld, first, ahead);
        else if (lines == 1)
            tile_rows<T, 1>(height, w, k, rows, xi, xs, len, to, ld, first, ahead);
        else
            tile_rows<T, 0>(height, w, k, rows, xi, xs, len, to, ld, first, ahead);
        p += lines * row_bytes;
        fetched += lines;
        i += height;
    }
}

// One sweep and m rows from row i0 of out.
void finish(const Plan& plan, const Sweep& sweep, int64_t i0, int64_t m, const float* sums) {
    float bias[kMaxSweep];
    load_bias(*sweep.segment, sweep.row, sweep.rows, bias);
    for (int64_t i = 0; i < m; ++i)
        finish_outputs(*plan.args, (i0 + i) * plan.columns + sweep.column, sums + i * plan.sweep, bias, sweep.rows);
}

// Items: every sweep of weight rows with every group of rows of x, groups of one sweep next to each other.
template <class T>
void run_items(const Plan& plan, int64_t begin, int64_t end) {
    const int64_t k = plan.args->k, sweep_size = plan.sweep;
    float sums[kMaxRows * kMaxSweep];
    Sweep sweep = locate(plan, begin / plan.groups);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t i0 = item % plan.groups * plan.group, m = smaller(plan.group, plan.m - i0);
        const Sweep following = item + 1 < end ? locate(plan, (item + 1) / plan.groups) : sweep;
        const T* w = static_cast<const T*>(sweep.segment->weight) + sweep.row * k;
        const T* after = static_cast<const T*>(following.segment->weight) + following.row * k;
        if (plan.chunks == 0) memset(sums, 0, sizeof(sums));
        for (int64_t c = 0; c < plan.chunks; ++c) {
            const int64_t k0 = c * plan.chunk, len = smaller(plan.chunk, k - k0);
            const float* x = plan.x + k0 * plan.m + i0 * plan.chunk;
            for (int64_t r = 0; r < sweep.rows; r += kTileColumns) {
                const T* next = r + kTileColumns < sweep.rows ? w + (r + kTileColumns) * k + k0
                                : c + 1 < plan.chunks         ? w + k0 + plan.chunk
                                                              : after;
                block(w + r * k + k0, k, smaller(kTileColumns, sweep.rows - r), x, plan.chunk, m, len, sums + r, sweep_size, c == 0, next);
            }
        }
        finish(plan, sweep, plan.m0 + i0, m, sums);
        sweep = following;
    }
}

template <class T>
void pack_rows(const Plan& plan, int64_t begin, int64_t end) {
    const LinearArgs& args = *plan.args;
    for (int64_t c = 0; c < plan.chunks; ++c) {
        const int64_t k0 = c * plan.chunk, len = smaller(plan.chunk, args.k - k0);
        for (int64_t i = begin; i < end; ++i) {
            const float* from = args.x + (plan.m0 + i) * args.x_stride + k0;
            float* to = plan.x + k0 * plan.m + i * plan.chunk;
            int64_t k = 0;
            for (; k + kStep <= len; k += kStep) pack_step<T>(from + k, to + k);
            if (k < len) {
                float tail[kStep] = {};
                memcpy(tail, from + k, static_cast<size_t>(len - k) * sizeof(float));
                pack_step<T>(tail, to + k);
            }
        }
    }
}

template <class T>
void run(const LinearArgs& args) {
    Plan plan = {};
    plan.args = &args;
    for (int s = 0; s < args.num_segments; ++s) plan.columns += args.segments[s].n;
    if (plan.columns == 0) return;
    plan.chunks = ceil_div(args.k, kMaxChunk);
    plan.chunk = plan.chunks == 0 ? 0 : ceil_div(ceil_div(args.k, plan.chunks), kStep) * kStep;
    const int64_t threads = num_threads();
    for (plan.m0 = 0; plan.m0 < args.m; plan.m0 += kPassRows) {
        plan.m = smaller(kPassRows, args.m - plan.m0);
        plan.groups = ceil_div(plan.m, kMaxRows);
        plan.group = ceil_div(ceil_div(plan.m, plan.groups), kTileRows) * kTileRows;
        plan.groups = ceil_div(plan.m, plan.group);
        // While all of x stays in the second-level cache, rows of several chunks are best read through, as memory holds them.
        plan.sweep = plan.chunks > 1 && plan.m * args.k <= kSmallInput ? kTileColumns : kMaxSweep;
        while (plan.sweep > kMinSweep && count_sweeps(args, plan.sweep) * plan.groups < 8 * threads) plan.sweep /= 2;
        plan.x = static_cast<float*>(scratch(kCallScratch, plan.chunks * plan.chunk * plan.m * static_cast<int64_t>(sizeof(float))));
        parallel_for(plan.m, ceil_div(2 * kSmallWork, args.k + 1), [&](int64_t begin, int64_t end) { pack_rows<T>(plan, begin, end); });
        const int64_t items = count_sweeps(args, plan.sweep) * plan.groups;
        // Long enough runs of items that fetching ahead pays, short enough that a thread that lost its CPU for a while delays nothing.
        const bool small = plan.m * args.k * plan.columns < kSmallWork;
        parallel_for(items, small ? items : ceil_div(items, 8 * threads),
                     [&](int64_t begin, int64_t end) { run_items<T>(plan, begin, end); });
    }
}

}  // namespace

void linear_rows(const LinearArgs& args) {
    if (args.format == kRowsF32) return run<float>(args);
    if (args.format == kRowsBF16) return run<BF16>(args);
    run<F16>(args);
}

}  // namespace ENGINE_ISA
}  // namespace engine
