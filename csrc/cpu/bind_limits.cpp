#include "bind.h"

namespace engine {

void bind_limits(py::module_& m) {
    m.def(
        "read_floats", [](uintptr_t data, int64_t count) { return active().read_floats(as<const float>(data), count); },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "multiply_adds", [](int64_t tasks, int64_t rounds) { return active().multiply_adds(tasks, rounds); },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace engine
