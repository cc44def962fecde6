// What the bindings of sample and beam_select share: the lists of tokens, and checks of the values inside tensors, as checks_sample.py does
// them (shapes and dtypes are checked in Python).
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "bind.h"

namespace engine {

constexpr float kLargestPenalty = 1e30f;
inline bool is_bounded(float x) { return std::fabs(x) <= kLargestPenalty; }

inline std::string at(int64_t i) { return " at " + std::to_string(i); }

inline std::string text(float value) {
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
inline void check_ragged(const std::string& name, const RaggedTokens& list, int64_t rows, int64_t vocab, bool distinct) {
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

inline void check_lists(const TokenLists& lists, int64_t rows, int64_t vocab) {
    if (lists.penalised.start != nullptr) {
        check("penalties.repetition", lists.repetition, 0, rows, "finite and > 0", [](float x) { return x > 0 && std::isfinite(x); });
        check("penalties.presence", lists.presence, 0, rows, "within -1e30 and 1e30", is_bounded);
        check("penalties.frequency", lists.frequency, 0, rows, "within -1e30 and 1e30", is_bounded);
        check_ragged("penalties", lists.penalised, rows, vocab, true);
        check("penalties.counts", lists.count, lists.penalised.start[0], lists.penalised.start[rows], "from 0 to 2^24",
              [](int32_t n) { return n >= 0 && n <= 1 << 24; });
    }
    if (lists.biased.start != nullptr) {
        check_ragged("bias", lists.biased, rows, vocab, true);
        check("bias.bias", lists.bias, lists.biased.start[0], lists.biased.start[rows], "within -1e30 and 1e30, or -inf",
              [](float x) { return is_bounded(x) || x == -INFINITY; });
    }
    if (lists.ends.start != nullptr) check_ragged("end_tokens", lists.ends, rows, vocab, false);
}

// Addresses of the tensors of Penalties, LogitBias and EndTokens in the order of kernels/api.py, each with the length of its list, and of
// the mask; a list that is not there is zeros.
using ListAddresses =
    std::tuple<std::array<uintptr_t, 6>, int64_t, std::array<uintptr_t, 3>, int64_t, std::array<uintptr_t, 3>, int64_t, uintptr_t>;

inline TokenLists token_lists(const ListAddresses& addresses) {
    const auto& [penalties, num_penalised, bias, num_biased, end_tokens, num_ends, allowed] = addresses;
    TokenLists lists{};
    lists.repetition = as<const float>(penalties[0]);
    lists.presence = as<const float>(penalties[1]);
    lists.frequency = as<const float>(penalties[2]);
    lists.penalised = {as<const int32_t>(penalties[3]), as<const int32_t>(penalties[5]), num_penalised};
    lists.count = as<const int32_t>(penalties[4]);
    lists.biased = {as<const int32_t>(bias[0]), as<const int32_t>(bias[2]), num_biased};
    lists.bias = as<const float>(bias[1]);
    lists.ends = {as<const int32_t>(end_tokens[0]), as<const int32_t>(end_tokens[2]), num_ends};
    lists.min_position = as<const int32_t>(end_tokens[1]);
    lists.allowed = as<const uint32_t>(allowed);
    return lists;
}

}  // namespace engine
