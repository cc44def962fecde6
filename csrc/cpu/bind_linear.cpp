// linear(x, x_stride, m, k, segments, format, residual, out): see LinearArgs; segments is a flat tuple.
// embed(tokens, count, table, scale, format, vocabulary, k, out).
#include <string>

#include "bind.h"

namespace engine {
namespace {

constexpr size_t kMaxWeights = 16;
constexpr size_t kFields = 5;  // of a weight in `segments`: its address, its scales' or 0, n, the bias's address or 0, the bias's dtype

void linear(uintptr_t x, int64_t x_stride, int64_t m, int64_t k, const py::tuple& segments, int format, uintptr_t residual, uintptr_t out) {
    const size_t count = segments.size() / kFields;
    if (count > kMaxWeights) {
        throw py::value_error("weights must hold at most " + std::to_string(kMaxWeights) + " matrices, got " + std::to_string(count));
    }
    LinearSegment parsed[kMaxWeights];
    for (size_t i = 0; i < count; ++i) {
        const auto field = [&](size_t f) { return segments[kFields * i + f]; };
        parsed[i].weight = as<const void>(field(0).cast<uintptr_t>());
        parsed[i].scale = as<const float>(field(1).cast<uintptr_t>());
        parsed[i].n = field(2).cast<int64_t>();
        parsed[i].bias = as<const void>(field(3).cast<uintptr_t>());
        parsed[i].bias_dtype = static_cast<DType>(field(4).cast<int>());
    }
    LinearArgs args = {};
    args.x = as<const float>(x);
    args.x_stride = x_stride;
    args.m = m;
    args.k = k;
    args.segments = parsed;
    args.num_segments = static_cast<int>(count);
    args.format = static_cast<WeightFormat>(format);
    args.residual = as<const float>(residual);
    args.out = as<float>(out);
    const Computing computing;
    (args.format >= kPanelsInt8 ? active().linear_int : active().linear)(args);
}

void embed(uintptr_t tokens, int64_t count, uintptr_t table, uintptr_t scale, int format, int64_t vocabulary, int64_t k, uintptr_t out) {
    const Computing computing;
    check_range("tokens", as<const int32_t>(tokens), count, 0, vocabulary);
    LinearSegment segment = {};
    segment.weight = as<const void>(table);
    segment.scale = as<const float>(scale);
    segment.n = vocabulary;
    active().embed(as<const int32_t>(tokens), count, segment, static_cast<WeightFormat>(format), k, as<float>(out));
}

}  // namespace

void bind_linear(py::module_& m) {
    m.def("linear", &linear);
    m.def("embed", &embed);
}

}  // namespace engine
