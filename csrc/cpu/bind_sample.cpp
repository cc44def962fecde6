#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "bind.h"

namespace engine {
namespace {

std::string at(int64_t i) { return " at " + std::to_string(i); }

std::string text(float value) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%.9g", static_cast<double>(value));
    return buffer;
}

// Raise unless good(values[i]) for i in [begin, end).
template <class T, class Good>
void check(const char* name, const T* values, int64_t begin, int64_t end, const char* meaning, Good good) {
    for (int64_t i = begin; i < end; ++i)
        if (!good(values[i])) {
            std::string got;
            if constexpr (std::is_same_v<T, float>)
                got = text(values[i]);
            else
                got = std::to_string(values[i]);
            throw py::value_error(std::string(name) + " must be " + meaning + ", got " + got + at(i));
        }
}

// `start` rises within the tokens, whose ids lie in the vocabulary, distinct in each row where `distinct`.
void check_ragged(const std::string& name, const RaggedTokens& list, int64_t rows, int64_t vocab, bool distinct) {
    for (int64_t r = 0; r <= rows; ++r)
        if (list.start[r] < (r > 0 ? list.start[r - 1] : 0) || list.start[r] > list.size)
            throw py::value_error(name + ".start must rise from >= 0 to <= " + std::to_string(list.size) + ", the length of " + name +
                                  ".token, got " + std::to_string(list.start[r]) + at(r));
    const std::string meaning = "in [0, " + std::to_string(vocab) + ")";
    check((name + ".token").c_str(), list.token, list.start[0], list.start[rows], meaning.c_str(),
          [&](int32_t id) { return id >= 0 && id < vocab; });
    if (!distinct) return;
    static thread_local std::vector<bool> seen;
    if (static_cast<int64_t>(seen.size()) < vocab) seen.resize(static_cast<size_t>(vocab));
    for (int64_t r = 0; r < rows; ++r) {
        int64_t i = list.start[r];
        while (i < list.start[r + 1] && !seen[static_cast<size_t>(list.token[i])]) seen[static_cast<size_t>(list.token[i++])] = true;
        const int64_t end = i;
        while (i > list.start[r]) seen[static_cast<size_t>(list.token[--i])] = false;
        if (end < list.start[r + 1])
            throw py::value_error(name + ".token must be distinct in each row, got " + std::to_string(list.token[end]) +
                                  " more than once in row " + std::to_string(r));
    }
}

// The values inside the tensors, as checks_sample.values does it; shapes and dtypes were checked in Python.
void check_values(const SampleArgs& a) {
    constexpr float kLargest = 1e30f;
    const auto is_positive = [](float x) { return x > 0 && std::isfinite(x); };
    const auto is_bounded = [](float x) { return std::fabs(x) <= kLargest; };
    const auto is_fraction = [](float x) { return x >= 0 && x <= 1; };
    check("temperature", a.temperature, 0, a.rows, "finite and >= 0", [](float x) { return x >= 0 && std::isfinite(x); });
    check("top_p", a.top_p, 0, a.rows, "in [0, 1]", is_fraction);
    check("min_p", a.min_p, 0, a.rows, "in [0, 1]", is_fraction);
    if (a.penalised.token != nullptr) {
        check("penalties.repetition", a.repetition, 0, a.rows, "finite and > 0", is_positive);
        check("penalties.presence", a.presence, 0, a.rows, "within -1e30 and 1e30", is_bounded);
        check("penalties.frequency", a.frequency, 0, a.rows, "within -1e30 and 1e30", is_bounded);
        check_ragged("penalties", a.penalised, a.rows, a.vocab, true);
        check("penalties.count", a.count, a.penalised.start[0], a.penalised.start[a.rows], "from 0 to 2^24",
              [](int32_t n) { return n >= 0 && n <= 1 << 24; });
    }
    if (a.biased.token != nullptr) {
        check_ragged("bias", a.biased, a.rows, a.vocab, true);
        check("bias.bias", a.bias, a.biased.start[0], a.biased.start[a.rows], "within -1e30 and 1e30, or -inf",
              [&](float x) { return is_bounded(x) || x == -INFINITY; });
    }
    if (a.ends.token != nullptr) check_ragged("end_tokens", a.ends, a.rows, a.vocab, false);
}

// Addresses of tensors, in the order of kernels/api.py; an empty list is given as zeros.
void sample(uintptr_t logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab, const std::array<uintptr_t, 7>& row,
            const std::array<uintptr_t, 6>& penalties, int64_t num_penalised, const std::array<uintptr_t, 3>& bias, int64_t num_biased,
            const std::array<uintptr_t, 3>& end_tokens, int64_t num_ends, uintptr_t allowed, int64_t top,
            const std::array<uintptr_t, 8>& results) {
    SampleArgs a{};
    a.logits = as<const void>(logits);
    a.dtype = static_cast<DType>(dtype);
    a.row_stride = row_stride;
    a.rows = rows;
    a.vocab = vocab;
    a.temperature = as<const float>(row[0]);
    a.top_k = as<const int32_t>(row[1]);
    a.top_p = as<const float>(row[2]);
    a.min_p = as<const float>(row[3]);
    a.seed = as<const int64_t>(row[4]);
    a.position = as<const int32_t>(row[5]);
    a.stream = as<const int32_t>(row[6]);
    a.repetition = as<const float>(penalties[0]);
    a.presence = as<const float>(penalties[1]);
    a.frequency = as<const float>(penalties[2]);
    a.penalised = {as<const int32_t>(penalties[3]), as<const int32_t>(penalties[5]), num_penalised};
    a.count = as<const int32_t>(penalties[4]);
    a.biased = {as<const int32_t>(bias[0]), as<const int32_t>(bias[2]), num_biased};
    a.bias = as<const float>(bias[1]);
    a.ends = {as<const int32_t>(end_tokens[0]), as<const int32_t>(end_tokens[2]), num_ends};
    a.min_position = as<const int32_t>(end_tokens[1]);
    a.allowed = as<const uint32_t>(allowed);
    a.tokens = as<int64_t>(results[0]);
    a.status = as<int32_t>(results[1]);
    a.logprobs = as<float>(results[2]);
    a.processed_logprobs = as<float>(results[3]);
    a.top = top;
    a.top_tokens = as<int64_t>(results[4]);
    a.top_logprobs = as<float>(results[5]);
    a.processed_top_tokens = as<int64_t>(results[6]);
    a.processed_top_logprobs = as<float>(results[7]);
    check_values(a);
    py::gil_scoped_release release;
    active().sample(a);
}

// For tests: the intermediates of the noise and of the masses.
void noise_of_row(int64_t seed, int32_t position, int32_t stream, int64_t vocab, uintptr_t words, uintptr_t lows) {
    active().noise_of_row(seed, position, stream, vocab, as<uint32_t>(words), as<uint32_t>(lows));
}
void noise_of_words(uintptr_t words, uintptr_t lows, int64_t n, uintptr_t exponential, uintptr_t log_exponential) {
    active().noise_of_words(as<const uint32_t>(words), as<const uint32_t>(lows), n, as<float>(exponential), as<float>(log_exponential));
}
void weights_of_values(uintptr_t values, int64_t n, uintptr_t weights) {
    active().weights_of_values(as<const float>(values), n, as<int64_t>(weights));
}

}  // namespace

void bind_sample(py::module_& m) {
    m.def("sample", &sample);
    m.def("noise_of_row", &noise_of_row);
    m.def("noise_of_words", &noise_of_words);
    m.def("weights_of_values", &weights_of_values);
}

}  // namespace engine
