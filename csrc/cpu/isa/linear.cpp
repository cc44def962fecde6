// linear for weights of every format, and embed: single rows of such a matrix. Each format's product has its own file.
#include "linear.h"

#include "../kernels.h"
#include "../thread_pool.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kTableGrain = 16 * 1024;  // elements worth handing to a thread

template <class T>
void row_of_rows(const LinearSegment& table, int64_t n, int64_t k, float* out) {
    const T* source = static_cast<const T*>(table.weight) + n * k;
    int64_t c = 0;
    for (; c + kLanes <= k; c += kLanes) store(out + c, load_as_float(source + c));
    for (; c < k; ++c) out[c] = as_float(source[c]);
}

// Elements along K that lie side by side: 1, or 2 for bf16.
template <class T, int64_t kDepth>
void row_of_panels(const LinearSegment& table, int64_t n, int64_t k, float* out) {
    const int64_t steps = ceil_div(k, kDepth);
    const T* source = static_cast<const T*>(table.weight) + (n / kPanel * steps * kPanel + n % kPanel) * kDepth;
    for (int64_t c = 0; c < k; ++c) out[c] = as_float(source[c / kDepth * kPanel * kDepth + c % kDepth]);
}

void row_of_int8(const LinearSegment& table, int64_t n, int64_t k, float* out) {
    const uint8_t* source = static_cast<const uint8_t*>(table.weight) + (n / kPanel * ceil_div(k, 4) * kPanel + n % kPanel) * 4;
    for (int64_t c = 0; c < k; ++c) out[c] = static_cast<float>(source[c / 4 * kPanel * 4 + c % 4] - 128) * table.scale[n];
}

void row_of_int4(const LinearSegment& table, int64_t n, int64_t k, float* out) {
    const int64_t groups = ceil_div(k, kInt4Group), i = n % kPanel;
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* group = static_cast<const uint8_t*>(table.weight) + (n / kPanel * groups + g) * kInt4GroupBytes;
        uint16_t bits;
        memcpy(&bits, group + kPanel * kInt4Group / 2 + 2 * i, sizeof(bits));
        const float scale = from_f16(bits);
        for (int64_t c = 0; c < kInt4Group && g * kInt4Group + c < k; ++c) {
            const uint8_t pair = group[i / 16 * 256 + c % 16 / 4 * 64 + i % 16 * 4 + c % 4];
            out[g * kInt4Group + c] = static_cast<float>((c < 16 ? pair & 15 : pair >> 4) - 8) * scale;
        }
    }
}

using RowOf = void (*)(const LinearSegment& table, int64_t n, int64_t k, float* out);

RowOf row_of(WeightFormat format) {
    switch (format) {
        case kRowsF32: return row_of_rows<float>;
        case kRowsBF16: return row_of_rows<BF16>;
        case kRowsF16: return row_of_rows<F16>;
        case kPanelsF32: return row_of_panels<float, 1>;
        case kPanelsBF16: return row_of_panels<BF16, 2>;
        case kPanelsF16: return row_of_panels<F16, 1>;
        case kPanelsInt8: return row_of_int8;
        default: return row_of_int4;
    }
}

}  // namespace

void linear(const LinearArgs& args) {
    if (args.format <= kRowsF16) return linear_rows(args);
    linear_panels(args);
}

void embed(const int32_t* tokens, int64_t count, const LinearSegment& table, WeightFormat format, int64_t k, float* out) {
    const RowOf row = row_of(format);
    parallel_for(count, ceil_div(kTableGrain, k + 1), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) row(table, tokens[t], k, out + t * k);
    });
}

}  // namespace ENGINE_ISA
}  // namespace engine
