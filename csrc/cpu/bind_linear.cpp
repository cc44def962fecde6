#include "bind.h"

namespace engine {
namespace {

constexpr int kMaxSegments = 16;

// segments: flat tuple (weight address, n, bias address or 0, bias dtype) per weight.
void linear(uintptr_t x, int64_t x_stride, int64_t m, int64_t k, py::tuple segments, int dtype, uintptr_t residual, uintptr_t out) {
    LinearSegment parsed[kMaxSegments];
    const size_t count = segments.size() / 4;
    if (count > kMaxSegments) throw py::value_error("linear: more than 16 weights in one call");
    for (size_t i = 0; i < count; ++i) {
        parsed[i].weight = as<const void>(segments[4 * i].cast<uintptr_t>());
        parsed[i].n = segments[4 * i + 1].cast<int64_t>();
        parsed[i].bias = as<const void>(segments[4 * i + 2].cast<uintptr_t>());
        parsed[i].bias_dtype = static_cast<DType>(segments[4 * i + 3].cast<int>());
    }
    const LinearArgs args = {as<const float>(x),        x_stride,      m, k, parsed, static_cast<int>(count), static_cast<DType>(dtype),
                             as<const float>(residual), as<float>(out)};
    py::gil_scoped_release release;
    active().linear(args);
}

}  // namespace

void bind_linear(py::module_& m) { m.def("linear", &linear); }

}  // namespace engine
