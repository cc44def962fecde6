// engine.kernels._cpu: the CPU kernels behind kernels/cpu.py.
#include <pybind11/stl.h>

#include <stdexcept>

#include "bind.h"
#include "thread_pool.h"

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels over raw pointers; engine.kernels.cpu checks the arguments.";
    engine::active();  // an ENGINE_CPU_ISA that cannot be met fails the import, with its reason
    m.def("isa", [] { return engine::active_isa(); }, "Instruction set in use.");
    m.def("supported_isas", &engine::supported_isas, "Instruction sets compiled in and runnable here.");
    m.def("num_threads", &engine::num_threads, py::call_guard<py::gil_scoped_release>(), "Threads that compute, the caller included.");
    m.def(
        "set_num_threads",
        [](int n) {
            if (n < 1 || n > 4096) throw py::value_error("set_num_threads: n is " + std::to_string(n) + ", expected 1..4096");
            py::gil_scoped_release release;
            engine::set_num_threads(n);
        },
        py::arg("n"));
    engine::bind_linear(m);
    engine::bind_attention(m);
    engine::bind_beam(m);
    engine::bind_elementwise(m);
    engine::bind_limits(m);
    engine::bind_sample(m);
    engine::bind_verify(m);
}
