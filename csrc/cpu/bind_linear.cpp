// linear(x, x_stride, m, k, segments, dtype, residual, out): see LinearArgs; segments is a flat tuple.
#include <string>

#include "bind.h"

namespace engine {
namespace {

constexpr size_t kMaxWeights = 16;
constexpr size_t kFields = 4;  // of a weight in `segments`: its address, n, the bias's address or 0, the bias's dtype

void linear(uintptr_t x, int64_t x_stride, int64_t m, int64_t k, const py::tuple& segments, int dtype, uintptr_t residual, uintptr_t out) {
    const size_t count = segments.size() / kFields;
    if (count > kMaxWeights) {
        throw py::value_error("weights must hold at most " + std::to_string(kMaxWeights) + " matrices, got " + std::to_string(count));
    }
    LinearSegment parsed[kMaxWeights];
    for (size_t i = 0; i < count; ++i) {
        const auto field = [&](size_t f) { return segments[kFields * i + f]; };
        parsed[i].weight = as<const void>(field(0).cast<uintptr_t>());
        parsed[i].n = field(1).cast<int64_t>();
        parsed[i].bias = as<const void>(field(2).cast<uintptr_t>());
        parsed[i].bias_dtype = static_cast<DType>(field(3).cast<int>());
    }
    LinearArgs args = {};
    args.x = as<const float>(x);
    args.x_stride = x_stride;
    args.m = m;
    args.k = k;
    args.segments = parsed;
    args.num_segments = static_cast<int>(count);
    args.dtype = static_cast<DType>(dtype);
    args.residual = as<const float>(residual);
    args.out = as<float>(out);
    const Computing computing;
    active().linear(args);
}

}  // namespace

void bind_linear(py::module_& m) { m.def("linear", &linear); }

}  // namespace engine
