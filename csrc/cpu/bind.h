// The bind_*.cpp files: one per op family, each adding its functions to the module. Bound functions take addresses and sizes as integers
// (checked in kernels/cpu.py) and release the GIL while they compute.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "dispatch.h"
#include "kernels.h"

namespace py = pybind11;

namespace engine {

template <class T>
inline T* as(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_linear(py::module_& m);
void bind_attention(py::module_& m);
void bind_beam(py::module_& m);
void bind_elementwise(py::module_& m);
void bind_limits(py::module_& m);
void bind_sample(py::module_& m);

}  // namespace engine
