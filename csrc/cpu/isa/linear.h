// What the products have in common, whatever the format of their weights.
#pragma once

#include "../kernels.h"
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

// The panel that is number `index` of all segments' end to end.
inline Panel locate_panel(const LinearArgs& args, int64_t index) {
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

}  // namespace ENGINE_ISA
}  // namespace engine
