// verify_block, and verify_drafts, which is here as a whole: a walk over a few numbers needs no vectors.
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bind.h"

namespace engine {
namespace {

constexpr int64_t kMaxNodes = 64;  // rows of a sequence

// Each sequence has 1 to 64 of the rows, one after the other.
void check_start(const int32_t* start, int64_t sequences, int64_t rows) {
    if (start[0] != 0 || start[sequences] != rows)
        throw py::value_error("start must run from 0 to " + std::to_string(rows) + ", the number of rows, got " + std::to_string(start[0]) +
                              " to " + std::to_string(start[sequences]));
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t n = int64_t{start[s + 1]} - start[s];
        if (n < 1 || n > kMaxNodes)
            throw py::value_error("start must give each sequence 1 to " + std::to_string(kMaxNodes) + " rows, got " + std::to_string(n) +
                                  " at " + std::to_string(s));
    }
}

void check_parent(const int32_t* parent, const int32_t* start, int64_t sequences) {
    for (int64_t s = 0; s < sequences; ++s)
        for (int64_t r = start[s] + 1; r < start[s + 1]; ++r)
            if (parent[r] < 0 || parent[r] >= r - start[s])
                throw py::value_error("parent must be a node before its own, here in [0, " + std::to_string(r - start[s]) + "), got " +
                                      std::to_string(parent[r]) + " at " + std::to_string(r));
}

// Addresses of tensors, in the order of kernels/api.py.
void verify_drafts(const std::array<uintptr_t, 5>& arguments, int64_t rows, int64_t sequences, const std::array<uintptr_t, 2>& results) {
    const auto* tokens = as<const int64_t>(arguments[0]);
    const auto* status = as<const int32_t>(arguments[1]);
    const auto* draft = as<const int32_t>(arguments[2]);
    const auto* parent = as<const int32_t>(arguments[3]);
    const auto* start = as<const int32_t>(arguments[4]);
    auto* num_accepted = as<int32_t>(results[0]);
    auto* path = as<int32_t>(results[1]);
    check_start(start, sequences, rows);
    check_parent(parent, start, sequences);
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t first = start[s], last = start[s + 1];
        int64_t node = first;
        int32_t depth = 0;
        path[first] = 0;
        // Children come after their parent, so that one pass meets those of each node of the path, the first of them first.
        for (int64_t r = first + 1; r < last; ++r) {
            if (first + parent[r] != node || status[node] != kOk || draft[r] != tokens[node]) continue;
            node = r;
            path[first + ++depth] = static_cast<int32_t>(r - first);
        }
        for (int64_t r = first + depth + 1; r < last; ++r) path[r] = -1;
        num_accepted[s] = depth;
    }
}

// The tokens of each chain, up to the first row that failed, are of the vocabulary.
void check_draft(const VerifyBlockArgs& a) {
    for (int64_t s = 0; s < a.sequences; ++s) {
        for (int64_t r = a.start[s] + 1; r < a.start[s + 1] && a.status[r - 1] == kOk; ++r)
            if (a.draft[r] < 0 || a.draft[r] >= a.vocab)
                throw py::value_error("draft must be in [0, " + std::to_string(a.vocab) + "), got " + std::to_string(a.draft[r]) + " at " +
                                      std::to_string(r));
    }
}

// Likewise.
void verify_block(const std::array<uintptr_t, 8>& arguments, int64_t rows, int64_t vocab, int64_t sequences,
                  const std::array<uintptr_t, 4>& results) {
    VerifyBlockArgs a{};
    a.target = as<const int64_t>(arguments[0]);
    a.status = as<const int32_t>(arguments[1]);
    a.proposal = as<const int64_t>(arguments[2]);
    a.draft = as<const int32_t>(arguments[3]);
    a.start = as<const int32_t>(arguments[4]);
    a.rows = rows;
    a.sequences = sequences;
    a.vocab = vocab;
    a.seed = as<const int64_t>(arguments[5]);
    a.position = as<const int32_t>(arguments[6]);
    a.stream = as<const int32_t>(arguments[7]);
    a.num_accepted = as<int32_t>(results[0]);
    a.path = as<int32_t>(results[1]);
    a.tokens = as<int64_t>(results[2]);
    a.outcome = as<int32_t>(results[3]);
    check_start(a.start, sequences, rows);
    check_draft(a);
    const Computing computing;
    active().verify_block(a);
}

}  // namespace

void bind_verify(py::module_& m) {
    m.def("verify_drafts", &verify_drafts);
    m.def("verify_block", &verify_block);
}

}  // namespace engine
