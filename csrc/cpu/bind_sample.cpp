#include <cmath>
#include <string>

#include "bind.h"

namespace engine {
namespace {

// The values inside the tensors; shapes and dtypes were checked in Python.
void check_values(const SampleArgs& a, int64_t history_size) {
    const auto at = [](int64_t i) { return " at " + std::to_string(i); };
    for (int64_t r = 0; r < a.rows; ++r)
        if (!(a.temperature[r] >= 0 && std::isfinite(a.temperature[r])))
            throw py::value_error("temperature must be finite and >= 0, got " + std::to_string(a.temperature[r]) + at(r));
    if (a.penalty == nullptr) return;
    for (int64_t r = 0; r < a.rows; ++r)
        if (!(a.penalty[r] > 0 && std::isfinite(a.penalty[r])))
            throw py::value_error("repetition_penalty must be finite and > 0, got " + std::to_string(a.penalty[r]) + at(r));
    for (int64_t r = 0; r <= a.rows; ++r)
        if (a.history_start[r] < (r > 0 ? a.history_start[r - 1] : 0) || a.history_start[r] > history_size)
            throw py::value_error("history_start must rise from >= 0 to <= " + std::to_string(history_size) +
                                  ", the length of history, got " + std::to_string(a.history_start[r]) + at(r));
    for (int64_t i = a.history_start[0]; i < a.history_start[a.rows]; ++i)
        if (a.history[i] < 0 || a.history[i] >= a.vocab)
            throw py::value_error("history must be in [0, " + std::to_string(a.vocab) + "), got " + std::to_string(a.history[i]) + at(i));
}

void sample(uintptr_t logits, int64_t row_stride, int64_t rows, int64_t vocab, uintptr_t temperature, uintptr_t top_k, uintptr_t seed,
            uintptr_t position, uintptr_t stream, uintptr_t penalty, uintptr_t history, int64_t history_size, uintptr_t history_start,
            uintptr_t tokens, uintptr_t logprobs, uintptr_t status) {
    const SampleArgs args = {as<const float>(logits),
                             row_stride,
                             rows,
                             vocab,
                             as<const float>(temperature),
                             as<const int32_t>(top_k),
                             as<const int64_t>(seed),
                             as<const int32_t>(position),
                             as<const int32_t>(stream),
                             as<const float>(penalty),
                             as<const int32_t>(history),
                             as<const int32_t>(history_start),
                             as<int64_t>(tokens),
                             as<float>(logprobs),
                             as<int32_t>(status)};
    check_values(args, history_size);
    py::gil_scoped_release release;
    active().sample(args);
}

// For tests: the intermediates of the noise.
void noise_of_row(int64_t seed, int32_t position, int32_t stream, int64_t vocab, uintptr_t words, uintptr_t lows) {
    active().noise_of_row(seed, position, stream, vocab, as<uint32_t>(words), as<uint32_t>(lows));
}
void noise_of_words(uintptr_t words, uintptr_t lows, int64_t n, uintptr_t exponential, uintptr_t log_exponential) {
    active().noise_of_words(as<const uint32_t>(words), as<const uint32_t>(lows), n, as<float>(exponential), as<float>(log_exponential));
}

}  // namespace

void bind_sample(py::module_& m) {
    m.def("sample", &sample);
    m.def("noise_of_row", &noise_of_row);
    m.def("noise_of_words", &noise_of_words);
}

}  // namespace engine
