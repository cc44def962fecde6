// What top-k, top-p and min-p keep of a row: the tokens with z >= tau, and where cheap to have, the list of them.
//
// All thresholds are found by value, exactly, without sorting. Blocks of 128 tokens whose largest z is below a bound are never looked into:
// the k-th largest block maximum is a lower bound of the k-th largest z (Dr. Top-k, Gaihre et al., SC 2021); for a large k and for top-p a
// sample of the row says where the threshold should lie. A wrong guess costs time, never the result: counts and masses are integers, and a
// threshold is accepted only where their exact sums, or bounds of them that leave no choice, prove it.
#pragma once

#include "sample_row.h"
#include "weight.h"

namespace engine {
namespace ENGINE_ISA {

// Order-preserving map between floats and integers; -0 and 0 are one.
ENGINE_INLINE int64_t rank_of(float value) {
    const uint32_t bits = bits_of_float(value);
    const int64_t magnitude = bits & 0x7fffffffu;
    return bits >> 31 ? -magnitude : magnitude;
}
ENGINE_INLINE float value_of(int64_t rank) {
    return rank < 0 ? -float_of_bits(static_cast<uint32_t>(-rank)) : float_of_bits(static_cast<uint32_t>(rank));
}

struct Extremes {
    float least, most;
};
ENGINE_INLINE Extremes extremes(const float* values, int64_t n) {
    VecF least = set1(kInf), most = set1(-kInf);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        least = min(load(values + i), least);
        most = max(load(values + i), most);
    }
    Extremes found = {-reduce_max(sub(zero(), least)), reduce_max(most)};
    for (; i < n; ++i) {
        found.least = values[i] < found.least ? values[i] : found.least;
        found.most = values[i] > found.most ? values[i] : found.most;
    }
    return found;
}

// Where the largest of values[0..n) is first.
ENGINE_INLINE int64_t first_largest(const float* values, int64_t n) {
    const float most = extremes(values, n).most;
    int64_t i = 0;
    while (i + kLanes <= n && at_least(values + i, most) == 0) i += kLanes;
    while (values[i] != most) ++i;
    return i;
}

ENGINE_INLINE int64_t count_at_least(const float* values, int64_t n, float limit) {
    int64_t count = 0, i = 0;
    for (; i + kLanes <= n; i += kLanes) count += __builtin_popcount(at_least(values + i, limit));
    for (; i < n; ++i) count += values[i] >= limit;
    return count;
}

struct Selected {
    float value;
    int64_t above, reached;  // measure of what is > value, and of what is >= value
};

// The largest value v among values[0..n) such that the measure of those >= v reaches `target` (which the measure of all does). The measure
// is the count or, with weights, the sum of their integer parts. Spoils both arrays: a pivot parts them, and the part without v is dropped.
ENGINE_INLINE Selected select(float* values, float* weights, int64_t n, int64_t target) {
    const auto measure_at_least = [&](float limit) {
        return weights == nullptr ? count_at_least(values, n, limit) : sum_of_weights(values, weights, n, limit);
    };
    int64_t above = 0;  // measure of what was dropped at the top
    for (int level = 0;; ++level) {
        const Extremes range = extremes(values, n);
        const int64_t low = rank_of(range.least), high = rank_of(range.most);
        if (low == high) return {range.most, above, above + measure_at_least(range.least)};
        // In (least, most], so that neither side is empty. Halving the range is quick on ordinary rows, halving the ranks bounds the
        // levels.
        const float middle = range.least * 0.5f + range.most * 0.5f;
        float pivot = middle > range.least ? middle : range.most;
        if (level % 2 == 1) pivot = value_of(low + (high - low + 1) / 2);
        const int64_t measure = above + measure_at_least(pivot);
        const bool upper = measure >= target;  // v is >= pivot
        if (!upper) above = measure;
        int64_t kept = 0, i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            const uint32_t larger = at_least(values + i, pivot), bits = upper ? larger : ~larger & ((1u << kLanes) - 1);
            if (weights != nullptr) compress(weights + i, bits, weights + kept);
            kept += compress(values + i, bits, values + kept);
        }
        for (; i < n; ++i) {
            const float value = values[i];
            values[kept] = value;
            if (weights != nullptr) weights[kept] = weights[i];
            kept += (value >= pivot) == upper;
        }
        n = kept;
    }
}

// ---- passes over the row, which leave out blocks whose largest z is below a bound ----

// List the tokens with low <= z < high (all from low on if high is +inf) in row.candidates and row.tokens, ascending by token.
template <class T>
ENGINE_INLINE int64_t list_between(const Row& row, const Logits<T>& logits, float low, float high) {
    int64_t count = 0;
    for (int64_t b = 0; b < row.blocks(); ++b) {
        if (row.block_z[b] < low) continue;
        alignas(64) float z[kBlock];
        logits.block(b, z);
        const bool whole = row.block_z[b] < high;
        for (int i = 0; i < kBlock; i += kLanes) {
            const uint32_t bits = at_least(z + i, low) & (whole ? ~0u : ~at_least(z + i, high));
            if (bits == 0) continue;
            compress_indices(static_cast<int32_t>(b * kBlock + i), bits, row.tokens + count);
            count += compress(z + i, bits, row.candidates + count);
        }
    }
    return count;
}

template <class T>
ENGINE_INLINE int64_t row_count_at_least(const Row& row, const Logits<T>& logits, float limit) {
    int64_t count = 0;
    for (int64_t b = 0; b < row.blocks(); ++b) {
        if (row.block_z[b] < limit) continue;
        alignas(64) float z[kBlock];
        logits.block(b, z);
        count += count_at_least(z, kBlock, limit);
    }
    return count;
}

struct Masses {
    int64_t whole, above;  // of the tokens with z >= floor, and of those with z >= high
};

// Exact. `high` of +inf: nothing is above.
template <class T>
ENGINE_INLINE Masses row_masses(const Row& row, const Logits<T>& logits, float top, float floor, float high) {
    Masses masses = {0, 0};
    for (int64_t b = 0; b < row.blocks(); ++b) {
        if (row.block_z[b] < floor || row.block_z[b] - top < kWeightFloor) continue;
        alignas(64) float z[kBlock];
        logits.block(b, z);
        WeightSum whole, above;
        for (int i = 0; i < kBlock; i += kLanes) {
            const VecF value = load(z + i), w = zero_where_less(scaled_exp(sub(value, set1(top))), value, set1(floor));
            whole.add(w);
            if (row.block_z[b] >= high) above.add(zero_where_less(w, value, set1(high)));
        }
        masses.whole += whole.total();
        masses.above += above.total();
    }
    return masses;
}

// The sum of exp(z - top) over the tokens with z >= floor, from ordinary exponentials: those of add_exp are at most 3.5e-7 off, the
// roundings of 128 additions in a tree of 9 levels or less 5.4e-7. A quarter of the time of row_masses.
template <class T>
ENGINE_INLINE double row_exp_sum(const Row& row, const Logits<T>& logits, float top, float floor) {
    double total = 0;
    for (int64_t b = 0; b < row.blocks(); ++b) {
        if (row.block_z[b] < floor || row.block_z[b] - top < kWeightFloor) continue;
        alignas(64) float z[kBlock];
        logits.block(b, z);
        VecF sum[4] = {zero(), zero(), zero(), zero()};
        for (int i = 0; i < kBlock; i += 4 * kLanes)
            for (int j = 0; j < 4; ++j) {
                const VecF value = load(z + i + j * kLanes);
                sum[j] = add(sum[j], zero_where_less(add_exp(zero(), sub(value, set1(top))), value, set1(floor)));
            }
        total += static_cast<double>(reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3]))));
    }
    return total;
}

// Bounds of the mass of the whole row: of its exponentials' sum, the exact weights' error of 0.8e-7, and the cut of each to an integer.
struct MassRange {
    int64_t low, high;
};
template <class T>
ENGINE_INLINE MassRange row_mass_range(const Row& row, const Logits<T>& logits, float top) {
    constexpr double kError = 1e-6;
    const double mass = row_exp_sum(row, logits, top, -kInf) * static_cast<double>(int64_t{1} << kWeightBits);
    const double error = mass * kError + static_cast<double>(row.vocab);
    return {mass > error ? static_cast<int64_t>(mass - error) : 0, static_cast<int64_t>(mass + error) + 1};
}

// ---- a guess of where a threshold lies ----

struct Bracket {
    float low, high;  // the threshold is believed to lie in [low, high)
};

constexpr int kBins = 1024;

// What a sixteenth of the row (a thirty-second of a large one), and the block maxima, which stand for the few largest, say about how many
// tokens lie in each bin of top - z: bins of equal width from 0 to `span`.
template <class T>
ENGINE_INLINE void histogram(const Row& row, const Logits<T>& logits, float top, float span, float* number) {
    constexpr int kLooked = 8;  // tokens of a block
    const int every = row.blocks() > 512 ? 2 : 1;
    const float scale = kBins / span, represented = static_cast<float>(kBlock / kLooked * every);
    int32_t sampled[kBins + 1] = {}, maxima[kBins + 1] = {};
    const auto count = [&](const float* z, int32_t* bins) {  // of kLooked values
        float at[kLooked];
        for (int i = 0; i < kLooked; ++i) at[i] = (top - z[i]) * scale;
        for (int i = 0; i < kLooked; ++i) at[i] = at[i] < kBins ? at[i] : kBins;  // NaN too: a span of 0 or infinity
        for (int i = 0; i < kLooked; ++i) ++bins[static_cast<int>(at[i])];
    };
    for (int64_t b = 0; b < row.blocks(); ++b) {
        const int64_t begin = b * kBlock + b / every % (kBlock / kLooked) * kLooked;
        if (b % every != 0 || begin + kLooked > row.vocab) continue;
        float z[kLooked];
        for (int i = 0; i < kLooked; ++i) z[i] = logits.at(begin + i);
        count(z, sampled);
    }
    int64_t b = 0;
    for (; b + kLooked <= row.blocks(); b += kLooked) count(row.block_z + b, maxima);
    for (; b < row.blocks(); ++b) {
        const float at = (top - row.block_z[b]) * scale;
        ++maxima[at < kBins ? static_cast<int>(at) : kBins];
    }
    for (int bin = 0; bin < kBins; ++bin) {
        const float from_sample = static_cast<float>(sampled[bin]) * represented, from_maxima = static_cast<float>(maxima[bin]);
        number[bin] = from_sample > from_maxima ? from_sample : from_maxima;
    }
}

// Walk down the bins, `weight` of each token falling by `ratio` from bin to bin, until `wanted` is surely passed. Where more than kListed
// tokens lie above, the bracket also has an upper end.
ENGINE_INLINE Bracket bracket_of(const float* number, float top, float span, float ratio, float wanted, float margin_low,
                                 float margin_high) {
    constexpr float kListed = 16384;
    const auto edge = [&](int bin) { return top - static_cast<float>(bin) * (span / kBins); };
    Bracket bracket = {kLowest, kInf};
    float sum = 0, count = 0, weight = 1;
    for (int bin = 0; bin < kBins - 2; ++bin, weight *= ratio) {
        if (count > kListed && sum < wanted - margin_high) bracket.high = edge(bin - 1);
        sum += number[bin] * weight;
        count += number[bin];
        if (sum < wanted + margin_low) continue;
        bracket.low = edge(bin + 2);
        break;
    }
    return bracket;
}

// ---- top-k ----

struct Kept {
    float tau;      // tokens with z >= tau are kept (never -inf itself)
    int64_t count;  // of row.candidates, ascending by token, which hold all that are kept and maybe more; -1: no list was made
};

ENGINE_INLINE Selected select_candidates(const Row& row, int64_t count, int64_t target) {
    memcpy(row.values, row.candidates, static_cast<size_t>(count) * 4);
    return select(row.values, nullptr, count, target);
}

// A bracket of the k-th largest z. The k-th largest block maximum is a lower bound of it; where there are too few blocks, a guess.
template <class T>
ENGINE_INLINE Bracket top_k_bracket(const Row& row, const Logits<T>& logits, float top) {
    if (row.top_k <= row.blocks() / 2) {
        memcpy(row.values, row.block_z, static_cast<size_t>(row.blocks()) * 4);
        const float bound = select(row.values, nullptr, row.blocks(), row.top_k).value;
        return {bound == -kInf ? kLowest : bound, kInf};
    }
    float least = top;
    for (int64_t i = 0; i < row.vocab; i += 61) {  // any sparse walk
        const float z = logits.at(i);
        least = z < least && z > -kInf ? z : least;
    }
    float number[kBins];
    histogram(row, logits, top, top - least, number);
    const float k = static_cast<float>(row.top_k), margin = 32 + 24 * __builtin_sqrtf(k);  // four deviations of a thirty-second's count
    return bracket_of(number, top, top - least, 1.0f, k, margin, margin);
}

// tau is the k-th largest z of the row; -inf if it has fewer than k tokens above -inf.
template <class T>
ENGINE_INLINE Kept keep_top_k(const Row& row, const Logits<T>& logits, float top) {
    Bracket bracket = top_k_bracket(row, logits, top);
    while (true) {
        const int64_t above = bracket.high == kInf ? 0 : row_count_at_least(row, logits, bracket.high);
        if (above >= row.top_k) {
            bracket = {bracket.high, kInf};
            continue;
        }
        const int64_t count = list_between(row, logits, bracket.low, bracket.high);
        const int64_t complete = bracket.high == kInf ? count : -1;
        if (above + count >= row.top_k) return {select_candidates(row, count, row.top_k - above).value, complete};
        if (bracket.low == kLowest) return {-kInf, complete};
        bracket = {kLowest, bracket.low};
    }
}

// ---- top-p ----

// tau of the tokens with z >= floor.
template <class T>
ENGINE_INLINE Kept keep_top_p(const Row& row, const Logits<T>& logits, float top, float floor) {
    constexpr float kSpan = -kWeightFloor, kRatio = 0.973026f, kMargin = 0.04f;  // e^(-kSpan / kBins)
    float number[kBins], whole = 0, weight = 1;
    histogram(row, logits, top, kSpan, number);
    for (int bin = 0; bin < kBins && top - static_cast<float>(bin) * (kSpan / kBins) >= floor; ++bin, weight *= kRatio)
        whole += number[bin] * weight;
    const float rest = (1 - row.top_p) / 2;
    const float margin = (kMargin < rest ? kMargin : rest) * whole;
    Bracket bracket = bracket_of(number, top, kSpan, kRatio, row.top_p * whole, margin, kMargin * whole);
    // Bounds of the mass decide nearly always, at a quarter of its price; where it must be known in part, it is soon known as a whole.
    bool exact = bracket.high < kInf || floor > -kInf;
    MassRange all = exact ? MassRange{0, 0} : row_mass_range(row, logits, top);
    while (true) {
        if (bracket.low < floor) bracket.low = floor;
        int64_t above = 0;
        if (exact) {
            const Masses masses = row_masses(row, logits, top, floor, bracket.high);
            all = {masses.whole, masses.whole};
            above = masses.above;
        }
        const int64_t least = mass_needed(all.low, row.top_p), most = mass_needed(all.high, row.top_p);
        if (above >= most) {
            bracket = {bracket.high, kInf};
            continue;
        }
        const int64_t count = list_between(row, logits, bracket.low, bracket.high);
        memcpy(row.values, row.candidates, static_cast<size_t>(count) * 4);
        weights_of(row.values, count, top, row.weights);
        if (above + sum_of_weights(row.values, row.weights, count, -kInf) >= most) {
            const Selected found = select(row.values, row.weights, count, least - above);
            if (above + found.reached >= most) return {found.value, bracket.high == kInf ? count : -1};
            exact = true;  // the bounds lie on either side of a token's end
        } else {
            bracket = {kLowest, bracket.low};
            exact = true;  // what is above must be known
        }
    }
}

// Among the candidates with z >= kept.tau, which are all there are.
ENGINE_INLINE float top_p_of_candidates(const Row& row, Kept kept, float top) {
    int64_t n = 0;
    for (int64_t i = 0; i < kept.count; ++i) {
        row.values[n] = row.candidates[i];
        n += row.candidates[i] >= kept.tau;
    }
    weights_of(row.values, n, top, row.weights);
    const int64_t mass = sum_of_weights(row.values, row.weights, n, -kInf);
    return select(row.values, row.weights, n, mass_needed(mass, row.top_p)).value;
}

// ---- all three ----

template <class T>
ENGINE_INLINE Kept filter(const Row& row, const Logits<T>& logits, float top) {
    Kept kept = {-kInf, -1};
    if (row.top_k > 0) kept = keep_top_k(row, logits, top);
    if (row.top_p < 1) {
        if (kept.count >= 0)
            kept.tau = top_p_of_candidates(row, kept, top);
        else
            kept = keep_top_p(row, logits, top, kept.tau);
    }
    if (row.min_p > 0) {
        const float tau = top + fixed_log(row.min_p);
        kept.tau = tau > kept.tau ? tau : kept.tau;
    }
    return kept;
}

}  // namespace ENGINE_ISA
}  // namespace engine
