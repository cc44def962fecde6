// The bind_*.cpp files: one per op family, each adding its functions to the module. Bound functions take addresses and sizes as integers
// (checked in kernels/cpu.py) and release the GIL while they compute.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "dispatch.h"
#include "kernels.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace engine {

// While a kernel computes: the GIL is free, and floats round as IEEE 754 has it, subnormal numbers included, whatever the calling thread
// has set (torch.set_flush_denormal); the pool's threads do so always. A row's bits may not depend on which thread computed it.
class Computing {
  public:
#if defined(__x86_64__)
    Computing() : control_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(kDefaultControl); }
    ~Computing() { __builtin_ia32_ldmxcsr(control_); }
#else
    Computing() {}  // not a default one: it stands for what the others do
#endif
    Computing(const Computing&) = delete;
    Computing& operator=(const Computing&) = delete;

  private:
    py::gil_scoped_release release_;
#if defined(__x86_64__)
    unsigned control_;
#endif
};

template <class T>
inline T* as(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Raises ValueError unless all of `values` lie in [low, high).
template <class Int>
inline void check_range(const char* name, const Int* values, int64_t count, int64_t low, int64_t high) {
    for (int64_t i = 0; i < count; ++i) {
        if (values[i] < low || values[i] >= high)
            throw py::value_error(std::string(name) + " must hold values in [" + std::to_string(low) + ", " + std::to_string(high) +
                                  "), got " + std::to_string(values[i]) + " at " + std::to_string(i));
    }
}

// Matrix i of a flat tuple of five numbers per matrix: its address, its scales' or 0, n, the bias's address or 0, the bias's dtype.
constexpr size_t kSegmentFields = 5;
inline LinearSegment segment_of(const py::tuple& segments, size_t i) {
    const auto field = [&](size_t f) { return segments[kSegmentFields * i + f]; };
    LinearSegment segment;
    segment.weight = as<const void>(field(0).cast<uintptr_t>());
    segment.scale = as<const float>(field(1).cast<uintptr_t>());
    segment.n = field(2).cast<int64_t>();
    segment.bias = as<const void>(field(3).cast<uintptr_t>());
    segment.bias_dtype = static_cast<DType>(field(4).cast<int>());
    return segment;
}

void bind_linear(py::module_& m);
void bind_attention(py::module_& m);
void bind_beam(py::module_& m);
void bind_elementwise(py::module_& m);
void bind_forward(py::module_& m);
void bind_limits(py::module_& m);
void bind_sample(py::module_& m);
void bind_verify(py::module_& m);

}  // namespace engine
