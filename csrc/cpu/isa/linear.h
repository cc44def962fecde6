// What the products have in common, whatever the format of their weights.
#pragma once

#include "../kernels.h"
#include "exp.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kSmallWork = 1 << 15;  // products; below this (a few microseconds) waking helpers does not pay

// A panel of the matrices of a call: its first output in the segment, and in out.
struct Panel {
    const LinearSegment* segment;
    int64_t row, column;
};

// The panel that is number `index` of all segments' end to end; with SwiGLU each of the gate is followed by the one that it gates.
inline Panel locate_panel(const LinearArgs& args, int64_t index) {
    if (args.swiglu) {
        const int64_t half = index % 2, first = index / 2 * kPanel;
        if (args.num_segments == 2) return {args.segments + half, first, first};
        return {args.segments, half * args.segments->n / 2 + first, first};
    }
    int64_t column = 0;
    const LinearSegment* segment = args.segments;
    for (int64_t n; index >= (n = ceil_div(segment->n, kPanel)); ++segment) {
        index -= n;
        column += segment->n;
    }
    return {segment, index * kPanel, column + index * kPanel};
}

// The biases of outputs row .. row + count - 1 of a segment; zeros where it has none (which change no sum but -0, the same for all rows).
inline void load_bias(const LinearSegment& segment, int64_t row, int64_t count, float* bias) {
    for (int64_t i = 0; i < count; ++i) {
        if (segment.bias == nullptr) {
            bias[i] = 0;
        } else if (segment.bias_dtype == kF32) {
            bias[i] = static_cast<const float*>(segment.bias)[row + i];
        } else {
            const uint16_t bits = static_cast<const uint16_t*>(segment.bias)[row + i];
            bias[i] = segment.bias_dtype == kBF16 ? from_bf16(bits) : from_f16(bits);
        }
    }
}

// out[at + i] = (sums[i] + bias[i]) + residual[at + i] for i < count.
inline void finish_outputs(const LinearArgs& args, int64_t at, const float* sums, const float* bias, int64_t count) {
    float* out = args.out + at;
    if (args.residual != nullptr) {
        const float* residual = args.residual + at;
        for (int64_t i = 0; i < count; ++i) out[i] = (sums[i] + bias[i]) + residual[i];
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = sums[i] + bias[i];
    }
}

// How many columns out has.
inline int64_t num_columns(const LinearArgs& args) {
    int64_t columns = 0;
    for (int i = 0; i < args.num_segments; ++i) columns += args.segments[i].n;
    return args.swiglu ? columns / 2 : columns;
}

// The outputs of a panel in m rows, the first of them row i0 of out, from their sums [m][kPanel]. With SwiGLU: `gate` null for a panel of
// the gate, whose values then stand in `sums`, else those of that panel.
inline void finish_panel(const LinearArgs& args, int64_t columns, const Panel& panel, int64_t i0, int64_t m, float* sums,
                         const float* gate) {
    const int64_t outputs = smaller(kPanel, panel.segment->n - panel.row);
    float bias[kPanel] = {};
    load_bias(*panel.segment, panel.row, outputs, bias);
    for (int64_t i = 0; i < m; ++i, sums += kPanel) {
        if (args.format == kPanelsInt8)
            for (int64_t o = 0; o < outputs; ++o) sums[o] *= panel.segment->scale[panel.row + o];
        const int64_t at = (i0 + i) * columns + panel.column;
        if (!args.swiglu) {
            finish_outputs(args, at, sums, bias, outputs);
        } else if (gate == nullptr) {
            for (int64_t o = 0; o < outputs; ++o) sums[o] += bias[o];
        } else {
            for (int64_t o = 0; o < outputs; o += kLanes) {
                const VecF y = mul(silu(load(gate + i * kPanel + o)), add(load(sums + o), load(bias + o)));
                const int64_t n = outputs - o;
                n < kLanes ? store(args.out + at + o, y, static_cast<int>(n)) : store(args.out + at + o, y);
            }
        }
    }
}

}  // namespace ENGINE_ISA
}  // namespace engine
