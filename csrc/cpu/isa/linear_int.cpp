// out = concat_i(x @ weights[i].T + biases[i]) + residual, over int8 and int4 weights in panels (kernels/packed.py): x is quantised too,
// and an output is a float32 sum, in order, of exact integer sums over groups of K (kernels/reference_linear.py is the same to the bit).
//
// Bounds, for M rows of x: bytes = N * K (int4: N * K * 0.5625), products = M * N * K, of which a core with VNNI and 512-bit vectors does
// 128 per cycle. On 2 Zen 5 cores (75 GB/s) the two meet at M = 14 for int8, 8 for int4.
//
// Work items are a panel and some rows of x, first all panels with the first rows. An item walks its panel in chunks along K that stay in
// the first-level cache while all its rows pass, a tile at a time; the last two tiles fetch the next chunk meanwhile. x is quantised once
// per call, in the order in which tiles read it. (Measured, 32 rows, K = 768: 0.70 of the products a core can do, without fetching ahead
// 0.45; tiles alone do 0.91, int4 0.8, where unpacking and two scales per group cost; the rest waits for out to be written.) Compiled once
// more than the rest of isa/, with VNNI (setup.py); dispatch.cpp picks.
#include "../kernels.h"
#include "../thread_pool.h"
#include "linear.h"
#include "linear_int_tile.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kMaxRows = 96;             // of an item: their sums (12 KB) share the first-level cache with the weights
constexpr int64_t kPassRows = 8 * kMaxRows;  // rows of x quantised at once, which bounds the scratch of a long prompt
constexpr int64_t kChunk = 2 * kGroup;       // elements of K
constexpr float kTiny = 1e-30f;              // a group of x whose largest magnitude is below this counts as zeros

struct Plan {
    const LinearArgs* args;
    int64_t columns, panels;  // of out; of all segments
    int64_t groups;           // of x along K
    int64_t m0, m;            // rows of x in this pass
    int64_t item_rows;        // rows of x per item, at most
    int32_t* x;               // quantised: [tile][groups][Format::kXWords][rows of the tile]
};

// The first row of tile t of `tiles` that share m rows as evenly as can be.
int64_t first_row(int64_t m, int64_t tiles, int64_t t) { return m * t / tiles; }

// ---- x ----

// One group of a row to its places in a tile of `rows` rows.
template <WeightFormat kFormat>
void quantise_group(const float* x, int64_t rows, int32_t* to) {
    constexpr int64_t kPiece = kGroup / Format<kFormat>::kStarts;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: of a sum with it, the last bit is worth 1 and the low byte is the rounded value
    int32_t largest = 0;                   // magnitudes' bits are in the order of the numbers; infinity comes next and NaN last
    for (int64_t i = 0; i < kGroup; ++i) {
        const int32_t bits = static_cast<int32_t>(bits_of_float(x[i]) & 0x7fffffffu);
        largest = bits > largest ? bits : largest;
    }
    const float magnitude = float_of_bits(static_cast<uint32_t>(largest));
    const bool finite = largest < 0x7f800000, used = finite && magnitude >= kTiny;
    int8_t q[kGroup] = {};
    if (used) {
        const float factor = 127 / magnitude;
        for (int64_t i = 0; i < kGroup; ++i) q[i] = static_cast<int8_t>(bits_of_float(x[i] * factor + kRound));
    }
    const float scale = used ? magnitude / 127 : finite ? 0.0f : float_of_bits(0x7fc00000u);
    *to = static_cast<int32_t>(bits_of_float(scale));
    for (int64_t p = 0; p < kGroup; p += kPiece) {
        int32_t sum = 0;
        for (int64_t i = p; i < p + kPiece; ++i) sum += q[i];
        *(to += rows) = -Format<kFormat>::kZero * sum;
    }
    for (int64_t i = 0; i < kGroup; i += kWord) memcpy(to += rows, q + i, kWord);
}

// Row `row` of this pass.
template <WeightFormat kFormat>
void quantise_row(const Plan& plan, int64_t row) {
    const int64_t i = row % plan.item_rows, m = smaller(plan.item_rows, plan.m - row + i), tiles = ceil_div(m, Format<kFormat>::kRows);
    const int64_t t = ((i + 1) * tiles - 1) / m, first = first_row(m, tiles, t), rows = first_row(m, tiles, t + 1) - first;
    int32_t* to = plan.x + (row - i + first) * plan.groups * Format<kFormat>::kXWords + i - first;
    const float* x = plan.args->x + (plan.m0 + row) * plan.args->x_stride;
    for (int64_t k0 = 0; k0 < plan.args->k; k0 += kGroup, to += Format<kFormat>::kXWords * rows) {
        if (k0 + kGroup <= plan.args->k) {
            quantise_group<kFormat>(x + k0, rows, to);
        } else {
            float padded[kGroup] = {};
            memcpy(padded, x + k0, static_cast<size_t>(plan.args->k - k0) * sizeof(float));
            quantise_group<kFormat>(padded, rows, to);
        }
    }
}

// ---- products ----

template <WeightFormat kFormat, int kFetch, int MR = Format<kFormat>::kRows>
void tile_rows(int64_t rows, const uint8_t* w, int64_t k, const int32_t* x, float* sums, const uint8_t* ahead) {
    if constexpr (MR > 1) {
        if (rows < MR) return tile_rows<kFormat, kFetch, MR - 1>(rows, w, k, x, sums, ahead);
    }
    tile<kFormat, MR, kFetch>(w, k, x, Format<kFormat>::kXWords * MR, sums, ahead);
}

// m rows against k elements of a panel; x: the item's rows, from group g on. Of the next chunk, at `ahead`, an only tile fetches all, else
// the last two tiles fetch a half each.
template <WeightFormat kFormat>
void chunk(const Plan& plan, const uint8_t* w, int64_t g, int64_t k, int64_t m, const int32_t* x, float* sums, const uint8_t* ahead) {
    const int64_t tiles = ceil_div(m, Format<kFormat>::kRows);
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = first_row(m, tiles, t), rows = first_row(m, tiles, t + 1) - first;
        const int32_t* from = x + (first * plan.groups + g * rows) * Format<kFormat>::kXWords;
        float* to = sums + first * kPanel;
        if (tiles == 1)
            tile_rows<kFormat, 2>(rows, w, k, from, to, ahead);
        else if (t + 2 < tiles)
            tile_rows<kFormat, 0>(rows, w, k, from, to, ahead);
        else
            tile_rows<kFormat, 1>(rows, w, k, from, to, ahead + (t + 1 < tiles ? 0 : Format<kFormat>::kHalfBytes));
    }
}

template <WeightFormat kFormat>
void run_items(const Plan& plan, int64_t begin, int64_t end) {
    using F = Format<kFormat>;
    const LinearArgs& args = *plan.args;
    const int64_t panel_bytes =
        kFormat == kPanelsInt8 ? ceil_div(args.k, kWord) * kPanel * kWord : ceil_div(args.k, kInt4Group) * kInt4GroupBytes;
    const auto weights = [&](const Panel& panel) {
        return static_cast<const uint8_t*>(panel.segment->weight) + panel.row / kPanel * panel_bytes;
    };
    float both[2][kMaxRows * kPanel];
    Panel panel = locate_panel(args, begin % plan.panels);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t i0 = item / plan.panels * plan.item_rows, m = smaller(plan.item_rows, plan.m - i0);
        const Panel following = item + 1 < end ? locate_panel(args, (item + 1) % plan.panels) : panel;
        const bool gated = args.swiglu && item % 2 == 1;  // by the item before, which is in the same run
        float* sums = both[gated];
        memset(sums, 0, static_cast<size_t>(m * kPanel) * sizeof(float));
        for (int64_t k0 = 0; k0 < args.k; k0 += kChunk) {
            const uint8_t* w = weights(panel) + k0 / kGroup * F::kGroupBytes;
            const uint8_t* next = k0 + kChunk < args.k ? w + kChunk / kGroup * F::kGroupBytes : weights(following);
            chunk<kFormat>(plan, w, k0 / kGroup, smaller(kChunk, args.k - k0), m, plan.x + i0 * plan.groups * Format<kFormat>::kXWords,
                           sums, next);
        }
        finish_panel(args, plan.columns, panel, plan.m0 + i0, m, sums, gated ? both[0] : nullptr);
        panel = following;
    }
}

template <WeightFormat kFormat>
void run(const LinearArgs& args) {
    Plan plan = {};
    plan.args = &args;
    plan.columns = num_columns(args);
    for (int s = 0; s < args.num_segments; ++s) plan.panels += ceil_div(args.segments[s].n, kPanel);
    if (plan.columns == 0) return;
    plan.groups = ceil_div(args.k, kGroup);
    for (plan.m0 = 0; plan.m0 < args.m; plan.m0 += kPassRows) {
        plan.m = smaller(kPassRows, args.m - plan.m0);
        plan.item_rows = ceil_div(plan.m, ceil_div(plan.m, kMaxRows));
        plan.x = static_cast<int32_t*>(
            scratch(kCallScratch, plan.m * plan.groups * Format<kFormat>::kXWords * static_cast<int64_t>(sizeof(int32_t))));
        parallel_for(plan.m, ceil_div(2 * kSmallWork, args.k + 1), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) quantise_row<kFormat>(plan, row);
        });
        const int64_t items = plan.panels * ceil_div(plan.m, plan.item_rows);
        // Long enough runs of items that fetching ahead pays, short enough that a thread that lost its CPU for a while delays nothing.
        const bool small = plan.m * args.k * plan.panels * kPanel < kSmallWork;
        const int64_t run = ceil_div(items, 16 * num_threads()) * 2;  // even: a panel and the one that it gates stay together
        parallel_for(items, small ? items : run, [&](int64_t begin, int64_t end) { run_items<kFormat>(plan, begin, end); });
    }
}

}  // namespace

void linear_int(const LinearArgs& args) { args.format == kPanelsInt8 ? run<kPanelsInt8>(args) : run<kPanelsInt4>(args); }

}  // namespace ENGINE_ISA
}  // namespace engine
