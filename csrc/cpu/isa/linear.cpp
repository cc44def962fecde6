#include "../kernels.h"
#include "../thread_pool.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

float element(const void* p, DType dtype, int64_t i) {
    if (dtype == kF32) return static_cast<const float*>(p)[i];
    const uint16_t bits = static_cast<const uint16_t*>(p)[i];
    return dtype == kBF16 ? from_bf16(bits) : from_f16(bits);
}

}  // namespace

void linear(const LinearArgs& a) {
    int64_t total = 0;
    for (int s = 0; s < a.num_segments; ++s) total += a.segments[s].n;
    int64_t column = 0;
    for (int s = 0; s < a.num_segments; ++s) {
        const LinearSegment& segment = a.segments[s];
        parallel_for(segment.n, 16, [&](int64_t begin, int64_t end) {
            for (int64_t m = 0; m < a.m; ++m)
                for (int64_t n = begin; n < end; ++n) {
                    float sum = 0;
                    for (int64_t k = 0; k < a.k; ++k) sum += a.x[m * a.x_stride + k] * element(segment.weight, a.dtype, n * a.k + k);
                    if (segment.bias != nullptr) sum += element(segment.bias, segment.bias_dtype, n);
                    const int64_t at = m * total + column + n;
                    a.out[at] = a.residual != nullptr ? sum + a.residual[at] : sum;
                }
        });
        column += segment.n;
    }
}

}  // namespace ENGINE_ISA
}  // namespace engine
