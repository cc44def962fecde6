// engine.kernels._cuda: the CUDA kernels over raw device pointers. Importing it needs no GPU and no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>

#include "cuda/launch.h"

namespace py = pybind11;

namespace {

py::object unavailable() {
    const std::string reason = engine::cuda::unavailable();
    if (reason.empty()) return py::none();
    return py::str(reason);
}

py::dict device_info(int device) {
    const engine::cuda::DeviceInfo info = engine::cuda::device_info(device);
    py::dict result;
    result["name"] = info.name;
    result["compute_capability"] = py::make_tuple(info.compute_major, info.compute_minor);
    result["num_sms"] = info.num_sms;
    result["memory_bytes"] = info.memory_bytes;
    return result;
}

void noise(uintptr_t out, uintptr_t seeds, uintptr_t positions, uintptr_t streams, int64_t num_rows, int64_t vocab_size, int device,
           uintptr_t stream) {
    engine::cuda::noise(reinterpret_cast<float*>(out), reinterpret_cast<const int64_t*>(seeds), reinterpret_cast<const int32_t*>(positions),
                        reinterpret_cast<const int32_t*>(streams), num_rows, vocab_size, device, stream);
}

template <engine::cuda::SamplePlan (*plan_of)(int64_t, int64_t, int)>
py::object plan(int64_t rows, int64_t vocab, int device) {
    const engine::cuda::SamplePlan plan = plan_of(rows, vocab, device);
    if (plan.members == 0) return py::none();
    return py::make_tuple(plan.members, plan.chunk, plan.num_groups);
}

template <class Args, void (*launch)(const Args&, int, uintptr_t)>
void call(const std::array<int64_t, sizeof(Args) / 8>& words, int device, uintptr_t stream) {
    Args args;
    std::memcpy(&args, words.data(), sizeof args);
    launch(args, device, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels over raw device pointers; the Python binding checks the arguments.";
    m.def("unavailable", &unavailable, "None if a CUDA device can be used, else the reason why not.");
    m.def("device_info", &device_info, py::arg("device"), "Name, compute capability, number of SMs and bytes of memory of a device.");
    m.def("noise", &noise, py::arg("out"), py::arg("seeds"), py::arg("positions"), py::arg("streams"), py::arg("num_rows"),
          py::arg("vocab_size"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
          "log(E) of every token into out, float32 [num_rows, vocab_size]; all other arguments as in csrc/cuda/launch.h.");
    m.def("sample_plan", &plan<engine::cuda::sample_plan>, py::arg("rows"), py::arg("vocab"), py::arg("device"),
          "(members, chunk, num_groups) of sample (csrc/cuda/launch.h); None where no row of so many tokens fits the device.");
    m.def("beam_plan", &plan<engine::cuda::beam_plan>, py::arg("rows"), py::arg("vocab"), py::arg("device"), "Likewise of beam_select.");
    m.def("sample", &call<engine::cuda::SampleArgs, engine::cuda::sample>, py::arg("words"), py::arg("device"), py::arg("stream"),
          "One call; `words` are the fields of SampleArgs (csrc/cuda/sample.h).");
    m.def("beam_select", &call<engine::cuda::BeamArgs, engine::cuda::beam_select>, py::arg("words"), py::arg("device"), py::arg("stream"),
          "One call; `words` are the fields of BeamArgs (csrc/cuda/beam.h).");
}
