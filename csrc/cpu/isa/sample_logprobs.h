// Log-probabilities of a row: of the chosen token and of the most likely ones, raw (the row as given) and processed (what was drawn from).
#pragma once

#include <cmath>

#include "sample_filter.h"

namespace engine {
namespace ENGINE_ISA {

// A distribution: log p = x - top - log_sum, or, where the largest x is +inf, equal shares of those.
struct Distribution {
    float top;
    double log_sum;

    ENGINE_METHOD float log_probability(float x) const {
        if (top == kInf) return x == kInf ? static_cast<float>(-log_sum) : -kInf;
        return static_cast<float>(static_cast<double>(x) - top - log_sum);
    }
};

// From the statistics of the first pass, merged in order.
ENGINE_INLINE Distribution raw_distribution(const Row& row) {
    float top = -kInf;
    for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) top = row.stats[chunk].max > top ? row.stats[chunk].max : top;
    double sum = 0;
    for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) {
        const ChunkStats& s = row.stats[chunk];
        if (s.max == top)
            sum += s.sum;
        else if (s.max > -kInf && top < kInf)
            sum += s.sum * std::exp(static_cast<double>(s.max) - top);
    }
    return {top, std::log(sum)};
}

// Over the tokens with z >= tau.
template <class T>
ENGINE_INLINE Distribution processed_distribution(const Row& row, const Logits<T>& logits, float top, float tau) {
    if (top == kInf) {
        int64_t infinite = 0;
        for (int64_t i = 0; i < row.vocab; ++i) infinite += logits.at(i) == kInf;
        return {top, std::log(static_cast<double>(infinite))};
    }
    return {top, std::log(row_exp_sum(row, logits, top, tau))};
}

// The n largest values at or above `tau` with their log-probabilities, lowest id first on ties; -1 and -inf where there are no more.
// The block with the largest maximum yields its largest value, again and again; `maxima` (of the blocks) are spoilt.
template <class T>
ENGINE_INLINE void most_likely(const Logits<T>& logits, const Distribution& distribution, float tau, int64_t n, float* maxima,
                               int64_t blocks, int64_t* tokens, float* log_probabilities) {
    Best last = {kInf, -1};  // the one taken before
    const auto comes_after = [&](float value, int64_t token) { return value < last.score || (value == last.score && token > last.token); };
    for (int64_t taken = 0; taken < n; ++taken) {
        tokens[taken] = -1;
        log_probabilities[taken] = -kInf;
        const int64_t best_block = first_largest(maxima, blocks);
        if (maxima[best_block] == -kInf || maxima[best_block] < tau) continue;
        alignas(64) float z[kBlock];
        logits.block(best_block, z);
        Best first = {-kInf, -1}, second = {-kInf, -1};  // of the block, among what comes after `last`
        for (int i = 0; i < kBlock; ++i) {
            const int64_t token = best_block * kBlock + i;
            if (z[i] == -kInf || !comes_after(z[i], token)) continue;
            if (z[i] > first.score) {
                second = first;
                first = {z[i], token};
            } else if (z[i] > second.score) {
                second = {z[i], token};
            }
        }
        tokens[taken] = first.token;
        log_probabilities[taken] = distribution.log_probability(first.score);
        last = first;
        maxima[best_block] = second.score;
    }
}

}  // namespace ENGINE_ISA
}  // namespace engine
