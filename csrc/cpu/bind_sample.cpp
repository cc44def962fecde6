#include "bind_lists.h"

namespace engine {
namespace {

void check_values(const SampleArgs& a) {
    const auto is_fraction = [](float x) { return x >= 0 && x <= 1; };
    check("temperature", a.temperature, 0, a.rows, "finite and >= 0", [](float x) { return x >= 0 && std::isfinite(x); });
    check("top_p", a.top_p, 0, a.rows, "in [0, 1]", is_fraction);
    check("min_p", a.min_p, 0, a.rows, "in [0, 1]", is_fraction);
    check_lists(a.lists, a.rows, a.vocab);
}

// Addresses of tensors, in the order of kernels/api.py; those of seed and stream may be zeros.
SampleArgs arguments(uintptr_t logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab, const std::array<uintptr_t, 7>& row,
                     const ListAddresses& lists) {
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
    a.lists = token_lists(lists);
    check_values(a);
    return a;
}

void sample(uintptr_t logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab, const std::array<uintptr_t, 7>& row,
            const ListAddresses& lists, int64_t top, const std::array<uintptr_t, 8>& results) {
    SampleArgs a = arguments(logits, dtype, row_stride, rows, vocab, row, lists);
    a.tokens = as<int64_t>(results[0]);
    a.status = as<int32_t>(results[1]);
    a.logprobs = as<float>(results[2]);
    a.processed_logprobs = as<float>(results[3]);
    a.top = top;
    a.top_tokens = as<int64_t>(results[4]);
    a.top_logprobs = as<float>(results[5]);
    a.processed_top_tokens = as<int64_t>(results[6]);
    a.processed_top_logprobs = as<float>(results[7]);
    const Computing computing;
    active().sample(a);
}

void masses(uintptr_t logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab, const std::array<uintptr_t, 7>& row,
            const ListAddresses& lists, uintptr_t masses, uintptr_t status) {
    SampleArgs a = arguments(logits, dtype, row_stride, rows, vocab, row, lists);
    a.status = as<int32_t>(status);
    const Computing computing;
    active().masses(a, as<int64_t>(masses));
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
    m.def("masses", &masses);
    m.def("noise_of_row", &noise_of_row);
    m.def("noise_of_words", &noise_of_words);
    m.def("weights_of_values", &weights_of_values);
}

}  // namespace engine
