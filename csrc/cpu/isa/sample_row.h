// A row of logits on its way through the sampler: what is known of it, its scratch memory, and the first pass over it.
#pragma once

#include "../kernels.h"
#include "exp.h"
#include "noise.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {

constexpr int64_t kChunk = 4096;  // a multiple of kBlock
constexpr float kInf = __builtin_inff();
constexpr float kLowest = -__FLT_MAX__;  // everything but -inf

ENGINE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr float kGreedyBelow = 1e-5f;         // temperatures below this are greedy
constexpr float kSmallestNormal = 0x1p-126f;  // fixed_log takes no smaller number: such a min_p is off

struct ChunkStats {
    float sum;  // of exp(logit - max), if asked for; where max is +inf, the number of +inf
    float max;  // of the raw logits
    bool nan;
};

struct Best {
    float score;
    int64_t token;
};
ENGINE_INLINE bool better(Best a, Best b) { return a.score > b.score || (a.score == b.score && a.token < b.token); }

struct Row {
    int64_t vocab;
    float temperature;  // 1 where greedy
    bool greedy, logprobs;
    int64_t top_k;  // 0: off
    float top_p;    // 1: off
    float min_p;    // 0: off
    NoiseKey key;
    // scratch
    float* adjusted;      // [blocks * kBlock] the row after penalties, bias and masks, where there are any
    float* raw_max;       // [blocks] largest raw logit of each block
    float* block_z;       // [blocks] largest z of each block
    float* values;        // [blocks * kBlock] for searches, which spoil them
    float* weights;       // [blocks * kBlock]
    float* candidates;    // [blocks * kBlock + kLanes] z of tokens that may be kept, and which they are
    int32_t* tokens;      // [blocks * kBlock + kLanes]
    uint8_t* is_touched;  // [blocks] whether the adjusted block differs from the raw one
    ChunkStats* stats;    // [chunks]
    Best* best;           // [chunks]

    ENGINE_METHOD int64_t blocks() const { return (vocab + kBlock - 1) / kBlock; }
    ENGINE_METHOD int64_t chunks() const { return (vocab + kChunk - 1) / kChunk; }
    ENGINE_METHOD bool filtered() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

// Row r of a call, without scratch and key.
ENGINE_INLINE Row row_of(const SampleArgs& a, int64_t r) {
    Row row{};
    row.vocab = a.vocab;
    row.greedy = a.temperature[r] < kGreedyBelow;
    row.temperature = row.greedy ? 1.0f : a.temperature[r];
    row.logprobs = a.logprobs != nullptr;
    row.top_k = a.top_k[r] > 0 && a.top_k[r] < a.vocab ? a.top_k[r] : 0;
    row.top_p = a.top_p[r];
    row.min_p = a.min_p[r] >= kSmallestNormal ? a.min_p[r] : 0;
    return row;
}

// Scratch of one row: `memory` null gives the bytes needed.
ENGINE_INLINE int64_t lay_out(Row* row, char* memory) {
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
        char* p = memory == nullptr ? nullptr : memory + used;
        used += (bytes + 63) / 64 * 64;
        return p;
    };
    const int64_t tokens = row->blocks() * kBlock;
    row->adjusted = reinterpret_cast<float*>(take(tokens * 4));
    row->raw_max = reinterpret_cast<float*>(take(row->blocks() * 4));
    row->block_z = reinterpret_cast<float*>(take(row->blocks() * 4));
    row->values = reinterpret_cast<float*>(take(tokens * 4));
    row->weights = reinterpret_cast<float*>(take(tokens * 4));
    row->candidates = reinterpret_cast<float*>(take((tokens + kLanes) * 4));
    row->tokens = reinterpret_cast<int32_t*>(take((tokens + kLanes) * 4));
    row->is_touched = reinterpret_cast<uint8_t*>(take(row->blocks()));
    row->stats = reinterpret_cast<ChunkStats*>(take(row->chunks() * static_cast<int64_t>(sizeof(ChunkStats))));
    row->best = reinterpret_cast<Best*>(take(row->chunks() * static_cast<int64_t>(sizeof(Best))));
    return used;
}

// The row's logits, raw or adjusted, of element type T, and what they are divided by.
template <class T>
struct Logits {
    const T* data;
    int64_t vocab;
    float divisor;

    ENGINE_METHOD float at(int64_t token) const { return as_float(data[token]) / divisor; }

    // The values of block b into z; -inf past the end of the row.
    ENGINE_METHOD void block(int64_t b, float* z) const {
        const int64_t begin = b * kBlock;
        if (begin + kBlock > vocab) {
            for (int i = 0; i < kBlock; ++i) z[i] = begin + i < vocab ? at(begin + i) : -kInf;
        } else if (divisor == 1.0f) {
            for (int i = 0; i < kBlock; i += kLanes) store(z + i, load_as_float(data + begin + i));
        } else {
            const VecF by = set1(divisor);
            for (int i = 0; i < kBlock; i += kLanes) store(z + i, div(load_as_float(data + begin + i), by));
        }
    }
};

// ---- the first pass ----

// Maximum of p[0..kBlock), NaN passed over but noted.
template <class T>
ENGINE_INLINE float block_max(const T* p, NanSeen* nan) {
    VecF top[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
    for (int i = 0; i < kBlock; i += 4 * kLanes) {
        VecF x[4];
        for (int j = 0; j < 4; ++j) x[j] = load_as_float(p + i + j * kLanes);
        for (int j = 0; j < 4; ++j) top[j] = max(x[j], top[j]);
        nan->note(x[0], x[1]);
        nan->note(x[2], x[3]);
    }
    return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

// sum + exp(x) for x <= 0 with a relative error of the term below 3.5e-7 for x >= -28 (1e-38 for exp of anything below -87).
// x = k ln 2 + r with |r| <= ln(2) / 2; the polynomial is an own minimax fit of (exp(r) - 1 - r) / r^2 in relative error of exp(r)
// (1.1e-7).
ENGINE_INLINE VecF add_exp(VecF sum, VecF x) {
    const VecF shift = set1(12583039.0f);  // 1.5 * 2^23 + 127: adding it rounds to an integer
    x = max(set1(-87.0f), x);
    const VecF shifted = fma(x, set1(1.44269504f), shift);
    const VecF r = fma(sub(shifted, shift), set1(-0.69314718f), x);
    VecF p = set1(0x1.10627ap-7f);
    p = fma(p, r, set1(0x1.572a06p-5f));
    p = fma(p, r, set1(0x1.5557aep-3f));
    p = fma(p, r, set1(0x1.fffdfcp-2f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return fma(p, pow2_of_shifted(shifted), sum);
}

// Sum of exp(p - top) where top is the maximum of p[0..n) and none is NaN.
template <class T>
ENGINE_INLINE float exp_sum(const T* p, int64_t n, float top) {
    if (top == kInf) {
        int64_t infinite = 0;
        for (int64_t i = 0; i < n; ++i) infinite += as_float(p[i]) == kInf;
        return static_cast<float>(infinite);
    }
    const VecF reference = set1(top == -kInf ? 0.0f : top);
    VecF sum[2] = {zero(), zero()};
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        __builtin_prefetch(p + i + kChunk, 0, 2);  // the next chunk, while this one keeps the arithmetic busy
        for (int j = 0; j < 2; ++j) sum[j] = add_exp(sum[j], sub(load_as_float(p + i + j * kLanes), reference));
    }
    for (; i < n; i += kLanes) {
        float padded[kLanes];
        for (int j = 0; j < kLanes; ++j) padded[j] = i + j < n ? as_float(p[i + j]) : -kInf;
        sum[0] = add_exp(sum[0], sub(load(padded), reference));
    }
    return reduce_add(add(sum[0], sum[1]));
}

// Maxima, raw and of z, and statistics of one chunk of the raw row.
template <class T>
ENGINE_INLINE void scan(const Row& row, const T* raw, int64_t chunk) {
    const int64_t begin = chunk * kChunk, n = smaller(kChunk, row.vocab - begin);
    NanSeen nan;
    float largest = -kInf;
    for (int64_t b = 0; b * kBlock < n; ++b) {
        const T* p = raw + begin + b * kBlock;
        float m = -kInf;
        if (n - b * kBlock >= kBlock) {
            m = block_max(p, &nan);
        } else {
            for (int64_t i = 0; i < n - b * kBlock; ++i) {
                const float x = as_float(p[i]);
                m = x > m ? x : m;
                nan.note(set1(x), set1(x));
            }
        }
        row.raw_max[begin / kBlock + b] = m;
        largest = m > largest ? m : largest;
    }
    for (int64_t b = begin / kBlock; b * kBlock < begin + n; ++b)
        row.block_z[b] = row.raw_max[b] / row.temperature;  // still the largest: rounding is monotonic
    row.stats[chunk] = {0, largest, nan.any()};
    if (row.logprobs && !nan.any()) row.stats[chunk].sum = exp_sum(raw + begin, n, largest);
}

// ---- penalties, bias and masks ----

struct Adjustments {
    const int32_t *penalised, *count, *biased, *ends;  // of this row
    int64_t num_penalised, num_biased, num_ends;
    float repetition, presence, frequency;
    const float* bias;
    const uint32_t* allowed;  // null: all

    ENGINE_METHOD bool any() const { return num_penalised + num_biased + num_ends > 0 || allowed != nullptr; }
};

ENGINE_INLINE Adjustments adjustments_of(const TokenLists& a, int64_t r, int32_t position, int64_t vocab) {
    Adjustments mine{};
    if (a.penalised.start != nullptr) {
        const int64_t begin = a.penalised.start[r];
        mine.repetition = a.repetition[r];
        mine.presence = a.presence[r];
        mine.frequency = a.frequency[r];
        mine.penalised = a.penalised.token + begin;
        mine.count = a.count + begin;
        mine.num_penalised = a.penalised.start[r + 1] - begin;
    }
    if (a.biased.start != nullptr) {
        const int64_t begin = a.biased.start[r];
        mine.biased = a.biased.token + begin;
        mine.bias = a.bias + begin;
        mine.num_biased = a.biased.start[r + 1] - begin;
    }
    if (a.ends.start != nullptr && position < a.min_position[r]) {
        mine.ends = a.ends.token + a.ends.start[r];
        mine.num_ends = a.ends.start[r + 1] - a.ends.start[r];
    }
    if (a.allowed != nullptr) mine.allowed = a.allowed + r * ((vocab + 31) / 32);
    return mine;
}

// Set to -inf what the mask forbids of block b.
ENGINE_INLINE void mask_block(const Row& row, const uint32_t* allowed, int64_t b) {
    const int64_t words = smaller(kBlock / 32, (row.vocab + 31) / 32 - b * (kBlock / 32));
    for (int64_t w = 0; w < words; ++w) {
        const uint32_t bits = allowed[b * (kBlock / 32) + w];
        if (bits == ~0u) continue;
        row.is_touched[b] = 1;
        float* p = row.adjusted + b * kBlock + w * 32;
        if (bits == 0) {
            for (int i = 0; i < 32; i += kLanes) store(p + i, set1(-kInf));
        } else {
            for (int i = 0; i < 32; ++i) p[i] = bits >> i & 1 ? p[i] : -kInf;
        }
    }
}

// Adjust row.adjusted, which holds the values of the row, and correct block_z, which holds the maxima of its blocks over `divisor`. False
// if nothing was changed (a mask that allows all).
ENGINE_INLINE bool adjust(const Row& row, const Adjustments& by, float divisor) {
    float* x = row.adjusted;
    memset(row.is_touched, 0, static_cast<size_t>(row.blocks()));
    for (int64_t i = 0; i < by.num_penalised; ++i) {
        const int32_t id = by.penalised[i];
        float value = x[id] > 0 ? x[id] / by.repetition : x[id] * by.repetition;
        if (by.count[i] > 0) {
            value = value - by.frequency * static_cast<float>(by.count[i]);
            value = value - by.presence;
        }
        x[id] = value;
        row.is_touched[id / kBlock] = 1;
    }
    for (int64_t i = 0; i < by.num_biased; ++i) {
        const int32_t id = by.biased[i];
        x[id] = by.bias[i] == -kInf ? -kInf : x[id] + by.bias[i];
        row.is_touched[id / kBlock] = 1;
    }
    for (int64_t i = 0; i < by.num_ends; ++i) {
        x[by.ends[i]] = -kInf;
        row.is_touched[by.ends[i] / kBlock] = 1;
    }
    bool changed = false;
    for (int64_t b = 0; b < row.blocks(); ++b) {
        if (by.allowed != nullptr) mask_block(row, by.allowed, b);
        if (!row.is_touched[b]) continue;
        NanSeen nan;
        row.block_z[b] = block_max(x + b * kBlock, &nan) / divisor;
        changed = true;
    }
    return changed;
}

// The same for a row as given, which is copied first if there is anything to change.
template <class T>
ENGINE_INLINE bool adjust_copy(const Row& row, const T* raw, const Adjustments& by) {
    if (!by.any()) return false;
    for (int64_t b = 0; b < row.blocks(); ++b) Logits<T>{raw, row.vocab, 1.0f}.block(b, row.adjusted + b * kBlock);
    return adjust(row, by, row.temperature);
}

}  // namespace ENGINE_ISA
}  // namespace engine
