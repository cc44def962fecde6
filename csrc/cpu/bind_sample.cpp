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
SampleArgs arguments(int dtype, int64_t row_stride, int64_t rows, int64_t vocab, const std::array<uintptr_t, 7>& row,
                     const ListAddresses& lists) {
    SampleArgs a{};
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
    return a;
}

// A call of sample in all but its logits, to be made any number of times. What is in the tensors is read, and checked, at each.
class SampleCall {
  public:
    SampleCall(int dtype, int64_t row_stride, int64_t rows, int64_t vocab, const std::array<uintptr_t, 7>& row, const ListAddresses& lists,
               int64_t top, const std::array<uintptr_t, 8>& results)
        : args_(arguments(dtype, row_stride, rows, vocab, row, lists)) {
        args_.tokens = as<int64_t>(results[0]);
        args_.status = as<int32_t>(results[1]);
        args_.logprobs = as<float>(results[2]);
        args_.processed_logprobs = as<float>(results[3]);
        args_.top = top;
        args_.top_tokens = as<int64_t>(results[4]);
        args_.top_logprobs = as<float>(results[5]);
        args_.processed_top_tokens = as<int64_t>(results[6]);
        args_.processed_top_logprobs = as<float>(results[7]);
    }

    void operator()(uintptr_t logits) const {
        SampleArgs a = args_;
        a.logits = as<const void>(logits);
        check_values(a);
        const Computing computing;
        active().sample(a);
    }

  private:
    SampleArgs args_;
};

void masses(uintptr_t logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab, const std::array<uintptr_t, 7>& row,
            const ListAddresses& lists, uintptr_t masses, uintptr_t status) {
    SampleArgs a = arguments(dtype, row_stride, rows, vocab, row, lists);
    a.logits = as<const void>(logits);
    a.status = as<int32_t>(status);
    check_values(a);
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
    py::class_<SampleCall>(m, "SampleCall")
        .def(py::init<int, int64_t, int64_t, int64_t, const std::array<uintptr_t, 7>&, const ListAddresses&, int64_t,
                      const std::array<uintptr_t, 8>&>())
        .def("__call__", &SampleCall::operator());
    m.def("masses", &masses);
    m.def("noise_of_row", &noise_of_row);
    m.def("noise_of_words", &noise_of_words);
    m.def("weights_of_values", &weights_of_values);
}

}  // namespace engine
