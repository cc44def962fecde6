#include "bind_lists.h"

namespace engine {
namespace {

void check_values(const BeamArgs& a) {
    check("scores", a.scores, 0, a.rows, "within -1e30 and 1e30, or -inf", [](float x) { return is_bounded(x) || x == -INFINITY; });
    check("temperature", a.temperature, 0, a.rows, "finite and > 0", [](float x) { return x > 0 && std::isfinite(x); });
    bool rises = a.group_start[0] == 0 && a.group_start[a.groups] == a.rows;
    for (int64_t g = 0; g < a.groups; ++g) rises = rises && a.group_start[g] <= a.group_start[g + 1];
    if (!rises) {
        std::string got;
        for (int64_t g = 0; g <= a.groups; ++g) got += (g > 0 ? ", " : "") + std::to_string(a.group_start[g]);
        throw py::value_error("group_start must rise from 0 to " + std::to_string(a.rows) + ", the number of rows, got [" + got + "]");
    }
    check_lists(a.lists, a.rows, a.vocab);
}

// Addresses of tensors, in the order of kernels/api.py; seed and stream may be zeros.
void beam_select(uintptr_t logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab, int64_t groups, int64_t candidates,
                 const std::array<uintptr_t, 7>& row, const ListAddresses& lists, const std::array<uintptr_t, 5>& results) {
    BeamArgs a{};
    a.logits = as<const void>(logits);
    a.dtype = static_cast<DType>(dtype);
    a.row_stride = row_stride;
    a.rows = rows;
    a.vocab = vocab;
    a.groups = groups;
    a.candidates = candidates;
    a.scores = as<const float>(row[0]);
    a.group_start = as<const int32_t>(row[1]);
    a.temperature = as<const float>(row[2]);
    a.top_k = as<const int32_t>(row[3]);
    a.position = as<const int32_t>(row[4]);
    a.seed = as<const int64_t>(row[5]);
    a.stream = as<const int32_t>(row[6]);
    a.lists = token_lists(lists);
    a.best = as<float>(results[0]);
    a.tokens = as<int64_t>(results[1]);
    a.parents = as<int32_t>(results[2]);
    a.logprobs = as<float>(results[3]);
    a.status = as<int32_t>(results[4]);
    check_values(a);
    const Computing computing;
    active().beam_select(a);
}

}  // namespace

void bind_beam(py::module_& m) { m.def("beam_select", &beam_select); }

}  // namespace engine
