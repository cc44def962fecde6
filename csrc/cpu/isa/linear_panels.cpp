// out = concat_i(x @ weights[i].T + biases[i]) + residual, over float weights packed in panels of 32 outputs (kernels/packed.py).
//
// Bounds, for M rows of x: bytes = N * K * sizeof(weight), flops = 2 * M * N * K; time >= max(bytes / bandwidth, flops / FMA peak). Below
// the row where the two meet (13 for fp32, 6.5 for bf16 on Zen 3 with AVX2; 14 for both on Zen 5 with AVX-512 and BF16) rows beyond the
// first are nearly free.
//
// A panel is one stream: each vector of weights is loaded once and meets all rows of a tile, one broadcast each. With more rows than a tile
// has, K is cut into chunks that stay in the first-level cache while the tiles pass over them (sums wait in memory; an order of operations
// does not change), and the tiles fetch the next chunk evenly, so that neither memory nor the FMA units wait for the other (measured on
// Zen 5 where the two are equally fast, 32 and 16 rows: 1.1 to 1.3 times as fast as when the last tiles alone fetch). x is packed once per
// call: per tile, element by element of K, so that broadcasts walk memory in order.
//
// Threads share out panels (times groups of rows), neighbours in memory to one thread.
#include "../kernels.h"
#include "../thread_pool.h"
#include "linear.h"
#include "linear_panels_pack.h"
#include "linear_panels_tile.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kChunk = 128;                  // elements of K per chunk: 16 KB of float32 weights, beside which the next fit the cache
constexpr int64_t kAhead = 16 << 10;             // bytes that a single tile fetches ahead
constexpr int64_t kMaxRows = 8 * kNarrowRows;    // of an item: its sums and a chunk of x stay in the second-level cache
constexpr int64_t kPassRows = 4 * kMaxRows * 4;  // rows of x packed at once, which bounds the scratch of a long prompt

struct Plan {
    const LinearArgs* args;
    int64_t columns, panels;  // of out; of all segments
    int64_t steps;            // along K
    int64_t m0, m;            // rows of x in this pass
    int64_t group, groups;    // rows of x per item
    void* x;                  // packed: tiles of [steps][kWords][rows]
};

// Rows [i0, i0 + m) cut evenly into tiles.
struct Tiles {
    int64_t m, count;
    explicit Tiles(int64_t rows) : m(rows), count(ceil_div(rows, rows <= kWideRows ? kWideRows : kNarrowRows)) {}
    int64_t begin(int64_t t) const { return t * m / count; }
};

// The sums of one panel and the rows of one group, [m][kPanel].
template <class T>
void multiply_panel(const T* weight, const typename Walk<T>::X* x, int64_t steps, int64_t m, float* sums) {
    constexpr int kDepth = Walk<T>::kDepth, kLines = Walk<T>::kLines, kWords = Walk<T>::kWords;
    if (m <= kWideRows) {
        const Tile<T> run = tile_of<T, kPanelVectors, kLines, kWideRows>(m);
        return run(weight, x, steps, sums, true, reinterpret_cast<const char*>(weight) + kAhead, steps);
    }
    const Tiles tiles(m);
    constexpr int kParts = kPanelVectors / kNarrowVectors;  // of a panel's outputs
    constexpr int64_t kChunkSteps = kChunk / kDepth;
    for (int64_t s = 0; s < steps; s += kChunkSteps) {
        const int64_t count = smaller(kChunkSteps, steps - s);
        const T* w = weight + s * kDepth * kPanel;
        const char* next = reinterpret_cast<const char*>(w + count * kDepth * kPanel);
        // The passes over the chunk share out the lines of the next one, of which a step has no more than there are passes.
        const int64_t passes = tiles.count * kParts, lines = count * kLines;
        int64_t pass = 0;
        for (int64_t t = 0; t < tiles.count; ++t) {
            const int64_t i = tiles.begin(t), rows = tiles.begin(t + 1) - i;
            const Tile<T> run = tile_of<T, kNarrowVectors, 1, kNarrowRows>(rows);
            for (int part = 0; part < kParts; ++part, ++pass) {
                const int64_t lane = part * kNarrowVectors * kLanes;
                const int64_t fetched = pass * lines / passes, fetching = (pass + 1) * lines / passes - fetched;
                run(w + lane * kDepth, x + (i * steps + s * rows) * kWords, count, sums + i * kPanel + lane, s == 0, next + fetched * 64,
                    fetching);
            }
        }
    }
}

// Items: every panel (with SwiGLU every two that belong together) with every group of rows of x, groups of one panel next to each other.
template <class T>
void run_items(const Plan& plan, int64_t begin, int64_t end) {
    const LinearArgs& args = *plan.args;
    const int halves = args.swiglu ? 2 : 1;
    alignas(64) float sums[2][kMaxRows * kPanel];
    for (int64_t item = begin; item < end; ++item) {
        const int64_t i0 = item % plan.groups * plan.group, m = smaller(plan.group, plan.m - i0);
        const auto* x = static_cast<const typename Walk<T>::X*>(plan.x) + i0 * plan.steps * Walk<T>::kWords;
        for (int half = 0; half < halves; ++half) {
            const Panel panel = locate_panel(args, item / plan.groups * halves + half);
            const T* weight = static_cast<const T*>(panel.segment->weight) + panel.row * plan.steps * Walk<T>::kDepth;
            multiply_panel(weight, x, plan.steps, m, sums[half]);
            finish_panel(args, plan.columns, panel, plan.m0 + i0, m, sums[half], half == 0 ? nullptr : sums[0]);
        }
    }
}

template <class T>
void pack_groups(const Plan& plan, int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
        const int64_t i0 = g * plan.group;
        const Tiles tiles(smaller(plan.group, plan.m - i0));
        for (int64_t t = 0; t < tiles.count; ++t) {
            const int64_t i = i0 + tiles.begin(t), rows = tiles.begin(t + 1) - tiles.begin(t);
            const LinearArgs& args = *plan.args;
            pack_tile<T>(args.x + (plan.m0 + i) * args.x_stride, args.x_stride, rows, args.k, plan.steps,
                         static_cast<typename Walk<T>::X*>(plan.x) + i * plan.steps * Walk<T>::kWords);
        }
    }
}

template <class T>
void run(const LinearArgs& args) {
    Plan plan = {};
    plan.args = &args;
    plan.columns = num_columns(args);
    for (int s = 0; s < args.num_segments; ++s) plan.panels += ceil_div(args.segments[s].n, kPanel);
    if (plan.columns == 0) return;
    plan.steps = ceil_div(args.k, Walk<T>::kDepth);
    const int64_t threads = num_threads();
    for (plan.m0 = 0; plan.m0 < args.m; plan.m0 += kPassRows) {
        plan.m = smaller(kPassRows, args.m - plan.m0);
        plan.groups = ceil_div(plan.m, kMaxRows);
        plan.group = ceil_div(ceil_div(plan.m, plan.groups), kNarrowRows) * kNarrowRows;
        plan.groups = ceil_div(plan.m, plan.group);
        plan.x = scratch(kCallScratch, plan.steps * Walk<T>::kWords * plan.m * static_cast<int64_t>(sizeof(typename Walk<T>::X)));
        parallel_for(plan.groups, 1, [&](int64_t begin, int64_t end) { pack_groups<T>(plan, begin, end); });
        // Long enough runs of items that memory is read in order, short enough that a thread that lost its CPU for a while delays nothing.
        const int64_t items = (args.swiglu ? plan.panels / 2 : plan.panels) * plan.groups;
        const bool small = plan.m * args.k * plan.panels * kPanel < kSmallWork;
        parallel_for(items, small ? items : ceil_div(items, 8 * threads),
                     [&](int64_t begin, int64_t end) { run_items<T>(plan, begin, end); });
    }
}

}  // namespace

void linear_panels(const LinearArgs& args) {
    if (args.format == kPanelsF32) return run<float>(args);
    if (args.format == kPanelsBF16) return run<BF16>(args);
    run<F16>(args);
}

}  // namespace ENGINE_ISA
}  // namespace engine
