// What top-k, top-p and min-p keep of a row: the tokens with z >= tau, and where cheap to have, the list of them.
//
// All thresholds are found by value, exactly, without sorting. Blocks of 128 tokens whose largest z is below a bound are never looked into:
// the k-th largest block maximum is a lower bound of the k-th largest z (Dr. Top-k, Gaihre et al., SC 2021), and for top-p a sample of the
// row says from where on the nucleus surely lies. A guess costs time where it is wrong, never the result: masses are integers, and the
// threshold is accepted only where their exact sums prove it.
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

// The largest value v among values[0..n) such that the measure of those >= v reaches `target` (which the measure of all does). The measure
// is the count or, with weights, the sum of their integer parts. Spoils both arrays: halves the range of floats, and drops what falls out.
ENGINE_INLINE float select(float* values, float* weights, int64_t n, int64_t target) {
    int64_t above = 0;  // measure of what was dropped at the top
    while (true) {
        const Extremes range = extremes(values, n);
        const int64_t low = rank_of(range.least), high = rank_of(range.most);
        if (low == high) return range.most;
        const float pivot = value_of(low + (high - low + 1) / 2);  // in (low, high], so that neither side is empty
        int64_t measure = above;
        if (weights == nullptr) {
            int32_t count = 0;
            for (int64_t i = 0; i < n; ++i) count += values[i] >= pivot;
            measure += count;
        } else {
            for (int64_t i = 0; i < n; ++i) measure += values[i] >= pivot ? static_cast<int64_t>(weights[i]) : 0;
        }
        const bool upper = measure >= target;  // the answer is >= pivot
        if (!upper) above = measure;
        int64_t kept = 0;
        for (int64_t i = 0; i < n; ++i) {
            const float value = values[i];
            values[kept] = value;
            if (weights != nullptr) weights[kept] = weights[i];
            kept += (value >= pivot) == upper;
        }
        n = kept;
    }
}

ENGINE_INLINE float kth_largest(const float* values, int64_t n, int64_t k, float* scratch) {
    memcpy(scratch, values, static_cast<size_t>(n) * 4);
    return select(scratch, nullptr, n, k);
}

struct Kept {
    float tau;      // tokens with z >= tau are kept (never -inf itself)
    int64_t count;  // of row.candidates, ascending by token, which hold all that are kept and maybe more; -1: no list was made
};

// List the tokens with z >= lowest.
template <class T>
ENGINE_INLINE int64_t gather(const Row& row, const Logits<T>& logits, float lowest) {
    int64_t count = 0;
    for (int64_t b = 0; b < row.blocks(); ++b) {
        if (row.block_z[b] < lowest) continue;
        alignas(64) float z[kBlock];
        logits.block(b, z);
        for (int i = 0; i < kBlock; i += kMaskLanes)
            for (uint32_t bits = at_least(z + i, lowest); bits != 0; bits &= bits - 1) {
                const int at = i + __builtin_ctz(bits);
                row.candidates[count] = z[at];
                row.tokens[count++] = static_cast<int32_t>(b * kBlock + at);
            }
    }
    return count;
}

// ---- top-k ----

// A lower bound of the k-th largest z: the k-th largest of the maxima of at least k groups of tokens. The groups are the blocks or, where
// those are too few, the tokens of a block that share a remainder modulo kGroups.
template <class T>
ENGINE_INLINE float top_k_bound(const Row& row, const Logits<T>& logits) {
    constexpr int kGroups = 16;
    const int64_t blocks = row.blocks();
    if (row.top_k <= blocks) return kth_largest(row.block_z, blocks, row.top_k, row.values);
    if (row.top_k > kGroups * blocks / 2) return -kInf;
    for (int64_t b = 0; b < blocks; ++b) {
        alignas(64) float z[kBlock];
        logits.block(b, z);
        for (int half = 0; half < kGroups; half += kLanes) {
            VecF top = load(z + half);
            for (int i = kGroups; i < kBlock; i += kGroups) top = max(load(z + half + i), top);
            store(row.values + b * kGroups + half, top);
        }
    }
    return select(row.values, nullptr, blocks * kGroups, row.top_k);
}

// tau is the k-th largest z of the row; -inf if it has fewer than k tokens above -inf.
template <class T>
ENGINE_INLINE Kept keep_top_k(const Row& row, const Logits<T>& logits) {
    const float bound = top_k_bound(row, logits);
    const int64_t count = gather(row, logits, bound == -kInf ? kLowest : bound);
    return {count >= row.top_k ? kth_largest(row.candidates, count, row.top_k, row.values) : -kInf, count};
}

// ---- top-p ----

ENGINE_INLINE int64_t sum_of_weights(const float* weights, int64_t n) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<int64_t>(weights[i]);
    return sum;
}

// Among the candidates with z >= tau.
ENGINE_INLINE float top_p_of_candidates(const Row& row, Kept kept, float top) {
    int64_t n = 0;
    for (int64_t i = 0; i < kept.count; ++i) {
        row.values[n] = row.candidates[i];
        n += row.candidates[i] >= kept.tau;
    }
    weights_of(row.values, n, top, row.weights);
    return select(row.values, row.weights, n, mass_needed(sum_of_weights(row.weights, n), row.top_p));
}

struct Bracket {
    float low, high;  // the threshold is believed to lie in [low, high)
};

// A guess from every sixteenth token, and from the block maxima, which stand for the few largest.
template <class T>
ENGINE_INLINE Bracket guess(const Row& row, const Logits<T>& logits, float top) {
    constexpr int kStep = 16, kBins = 1024;  // bins of top - z
    constexpr float kBinsPerUnit = kBins / -kWeightFloor, kMargin = 0.04f;
    constexpr float kBinRatio = 0.973026f;  // e^(-1 / kBinsPerUnit)
    constexpr float kListed = 16384;        // so many tokens above the threshold are still listed one by one
    int32_t sampled[kBins + 1] = {}, maxima[kBins + 1] = {};
    const auto bin_of = [&](float z) { return static_cast<int>(__builtin_fminf((top - z) * kBinsPerUnit, kBins)); };
    for (int64_t b = 0; b < row.blocks(); ++b) {
        ++maxima[bin_of(row.block_z[b])];
        const int64_t begin = b * kBlock + b % kStep * (kBlock / kStep);
        if (begin + kBlock / kStep > row.vocab) continue;
        float at[kBlock / kStep];
        for (int i = 0; i < kBlock / kStep; ++i) at[i] = __builtin_fminf((top - logits.at(begin + i)) * kBinsPerUnit, kBins);
        for (int i = 0; i < kBlock / kStep; ++i) ++sampled[static_cast<int>(at[i])];
    }
    float mass[kBins], number[kBins], whole = 0, weight = 1;
    for (int bin = 0; bin < kBins; ++bin, weight *= kBinRatio) {
        const float from_sample = static_cast<float>(sampled[bin] * kStep), from_maxima = static_cast<float>(maxima[bin]);
        number[bin] = from_sample > from_maxima ? from_sample : from_maxima;
        mass[bin] = number[bin] * weight;
        whole += mass[bin];
    }
    Bracket bracket = {kLowest, kInf};
    const float margin = kMargin < (1 - row.top_p) / 2 ? kMargin : (1 - row.top_p) / 2;
    float sum = 0, count = 0;
    for (int bin = 0; bin < kBins - 2; ++bin) {
        if (count > kListed && sum < (row.top_p - kMargin) * whole) bracket.high = top - static_cast<float>(bin - 1) / kBinsPerUnit;
        sum += mass[bin];
        count += number[bin];
        if (sum < (row.top_p + margin) * whole) continue;
        bracket.low = top - static_cast<float>(bin + 2) / kBinsPerUnit;
        break;
    }
    return bracket;
}

// Of the whole row: the masses of everything, of z >= high, and of the tokens in [low, high), which are listed with their weights.
struct Masses {
    int64_t whole, above, listed, count;
};

template <class T>
ENGINE_INLINE Masses weigh(const Row& row, const Logits<T>& logits, float top, Bracket bracket) {
    Masses m = {0, 0, 0, 0};
    const VecF everything = set1(-kInf), high = set1(bracket.high);
    for (int64_t b = 0; b < row.blocks(); ++b) {
        if (row.block_z[b] - top < kWeightFloor) continue;
        alignas(64) float z[kBlock];
        logits.block(b, z);
        WeightSum whole(top);
        for (int i = 0; i < kBlock; i += kLanes) whole.add_at_least(z + i, everything);
        m.whole += whole.total();
        if (row.block_z[b] < bracket.low) continue;
        if (row.block_z[b] >= bracket.high) {
            WeightSum above(top);
            for (int i = 0; i < kBlock; i += kLanes) above.add_at_least(z + i, high);
            m.above += above.total();
        }
        for (int i = 0; i < kBlock; i += kMaskLanes)
            for (uint32_t bits = at_least(z + i, bracket.low) & ~at_least(z + i, bracket.high); bits != 0; bits &= bits - 1) {
                const int at = i + __builtin_ctz(bits);
                row.candidates[m.count] = z[at];
                row.tokens[m.count++] = static_cast<int32_t>(b * kBlock + at);
            }
    }
    memcpy(row.values, row.candidates, static_cast<size_t>(m.count) * 4);
    weights_of(row.values, m.count, top, row.weights);
    m.listed = sum_of_weights(row.weights, m.count);
    return m;
}

template <class T>
ENGINE_INLINE Kept keep_top_p(const Row& row, const Logits<T>& logits, float top) {
    Bracket bracket = guess(row, logits, top);
    while (true) {
        const Masses m = weigh(row, logits, top, bracket);
        const int64_t needed = mass_needed(m.whole, row.top_p);
        if (m.above >= needed) {
            bracket = {bracket.high, kInf};
        } else if (m.above + m.listed < needed) {
            bracket = {kLowest, bracket.low};
        } else {
            const float tau = select(row.values, row.weights, m.count, needed - m.above);
            return {tau, bracket.high == kInf ? m.count : -1};
        }
    }
}

// ---- all three ----

template <class T>
ENGINE_INLINE Kept filter(const Row& row, const Logits<T>& logits, float top) {
    Kept kept = {-kInf, -1};
    if (row.top_k > 0) {
        kept = keep_top_k(row, logits);
        if (row.top_p < 1) {
            const float tau = top_p_of_candidates(row, kept, top);
            kept.tau = tau > kept.tau ? tau : kept.tau;
        }
    } else if (row.top_p < 1) {
        kept = keep_top_p(row, logits, top);
    }
    if (row.min_p > 0) {
        const float tau = top + fixed_log(row.min_p);
        kept.tau = tau > kept.tau ? tau : kept.tau;
    }
    return kept;
}

}  // namespace ENGINE_ISA
}  // namespace engine
