// engine.kernels._cpu: the CPU kernels behind kernels/cpu.py.
#include <pybind11/stl.h>

#include <optional>

#include "bind.h"
#include "thread_pool.h"

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels over raw pointers; engine.kernels.cpu checks the arguments.";
    engine::active();  // an ENGINE_CPU_ISA that cannot be met fails the import, with its reason
    m.def("isa", [] { return engine::active_isa(); }, "Instruction set in use.");
    m.def("supported_isas", &engine::supported_isas, "Instruction sets compiled in and runnable here.");
    m.attr("MAX_THREADS") = engine::kMaxThreads;
    m.def("num_threads", &engine::num_threads, py::call_guard<py::gil_scoped_release>(), "Threads that compute, the caller included.");
    m.def("threads_pinned", &engine::threads_pinned, "Whether all but the caller stay on one CPU each.");
    m.def(
        "set_num_threads", [](int n, std::optional<bool> pin) { engine::set_num_threads(n, pin.value_or(engine::threads_pinned())); },
        py::arg("n"), py::arg("pin") = py::none(), py::call_guard<py::gil_scoped_release>());
    engine::bind_linear(m);
    engine::bind_attention(m);
    engine::bind_beam(m);
    engine::bind_elementwise(m);
    engine::bind_forward(m);
    engine::bind_limits(m);
    engine::bind_sample(m);
    engine::bind_verify(m);
}
