// One token per row of logits by the token law (kernels/noise.py, contract in kernels/api.py), with about one read of the row:
//
// 1. scan: the maximum of each block of 128 logits and, while a chunk of 4,096 is in the first-level cache, the sum of exponentials for the
//    logprob (its NaN tells of a NaN in the row).
// 2. threshold (top-k): the k-th largest block maximum is a lower bound of the k-th largest logit (Dr. Top-k, Gaihre et al., SC 2021), so
//    only blocks that reach it hold candidates, and of those the k-th largest is found exactly.
// 3. race: the noise of the blocks that hold kept tokens. Nearly all tokens are ruled out by one integer comparison of their word (see
//    word_limit); only the others get their logarithms.
//
// Chunks are at fixed places and merged in order, so results do not depend on which threads did what.
#include <cmath>

#include "../../common/fixed_math.h"
#include "../kernels.h"
#include "../thread_pool.h"
#include "exp.h"
#include "noise.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kChunk = 4096;              // a multiple of kBlock
constexpr int64_t kSplitAbove = 1 << 16;      // vocabularies above this are split over threads when there are few rows
constexpr int64_t kFewCandidates = 1024;      // up to here their words are made one by one
constexpr float kGreedyBelow = 1e-5f;         // temperatures below this are greedy
constexpr int kNan = 1, kNothingAllowed = 2;  // STATUS_* of api.py
constexpr float kInf = __builtin_inff();

struct ChunkStats {
    float max;  // of the raw logits
    float sum;  // of exp(logit - max); where max is +inf, the number of +inf; NaN if the chunk holds a NaN
};

struct Best {
    float score;
    int64_t token;
};

struct Row {
    const float* raw;     // as given
    const float* logits;  // after the penalty; may be `raw`
    int64_t vocab;
    float temperature;  // 1 where greedy
    bool greedy;
    int64_t k;  // 0: no top-k
    NoiseKey key;
    // scratch
    float* block_z;     // [blocks] largest z of each block
    float* candidates;  // [blocks * kBlock] z of the tokens that may pass top-k, and which they are
    int32_t* tokens;    // [blocks * kBlock]
    float* penalised;   // [vocab]
    ChunkStats* stats;  // [chunks]
    Best* best;         // [chunks]

    int64_t blocks() const { return (vocab + kBlock - 1) / kBlock; }
    int64_t chunks() const { return (vocab + kChunk - 1) / kChunk; }
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Scratch of one row: `memory` null gives the bytes needed.
int64_t lay_out(Row* row, char* memory) {
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
        char* p = memory == nullptr ? nullptr : memory + used;
        used += (bytes + 63) / 64 * 64;
        return p;
    };
    row->block_z = reinterpret_cast<float*>(take(row->blocks() * 4));
    row->candidates = reinterpret_cast<float*>(take(row->blocks() * kBlock * 4));
    row->tokens = reinterpret_cast<int32_t*>(take(row->blocks() * kBlock * 4));
    row->penalised = reinterpret_cast<float*>(take(row->vocab * 4));
    row->stats = reinterpret_cast<ChunkStats*>(take(row->chunks() * static_cast<int64_t>(sizeof(ChunkStats))));
    row->best = reinterpret_cast<Best*>(take(row->chunks() * static_cast<int64_t>(sizeof(Best))));
    return used;
}

// ---- 1. scan ----

// Maximum of each block of p[0..n) into out; returns the largest. NaN is passed over.
float block_maxima(const float* p, int64_t n, float* out) {
    float largest = -kInf;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t end = smaller(n, begin + kBlock);
        VecF top[2] = {set1(-kInf), set1(-kInf)};
        int64_t i = begin;
        for (; i + 2 * kLanes <= end; i += 2 * kLanes)
            for (int j = 0; j < 2; ++j) top[j] = max(load(p + i + j * kLanes), top[j]);
        float m = reduce_max(max(top[0], top[1]));
        for (; i < end; ++i) m = p[i] > m ? p[i] : m;
        out[begin / kBlock] = m;
        largest = m > largest ? m : largest;
    }
    return largest;
}

// sum + exp(x) for x <= 0 with a relative error of about 2e-7 of the term (1e-38 for exp of anything below -87). A NaN stays.
// exp(x) = 2^k * 2^r with |r| <= 1/2; the polynomial is an own minimax fit of (2^r - 1) / r in relative error of 2^r (1.1e-7).
ENGINE_INLINE VecF add_exp(VecF sum, VecF x) {
    const VecF t = mul(max(set1(-87.0f), x), set1(1.44269504f));
    const VecF shift = set1(12583039.0f);  // 1.5 * 2^23 + 127: adding it rounds to an integer
    const VecF shifted = add(t, shift);
    const VecF r = sub(t, sub(shifted, shift));
    VecF p = set1(0x1.5bba14p-10f);
    p = fma(p, r, set1(0x1.3cea88p-7f));
    p = fma(p, r, set1(0x1.c6b752p-5f));
    p = fma(p, r, set1(0x1.ebf9bcp-3f));
    p = fma(p, r, set1(0x1.62e42ap-1f));
    p = fma(p, r, set1(1.0f));
    return fma(p, pow2_of_shifted(shifted), sum);
}

// Sum of exp(p - top) where top is the maximum of p[0..n).
float exp_sum(const float* p, int64_t n, float top) {
    if (top == kInf) {
        int64_t infinite = 0;
        bool nan = false;
        for (int64_t i = 0; i < n; ++i) {
            infinite += p[i] == kInf;
            nan |= p[i] != p[i];
        }
        return nan ? __builtin_nanf("") : static_cast<float>(infinite);
    }
    const VecF reference = set1(top == -kInf ? 0.0f : top);
    VecF sum[2] = {zero(), zero()};
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        __builtin_prefetch(p + i + kChunk, 0, 2);  // the next chunk, while this one keeps the arithmetic busy
        for (int j = 0; j < 2; ++j) sum[j] = add_exp(sum[j], sub(load(p + i + j * kLanes), reference));
    }
    for (; i < n; i += kLanes) {
        float padded[kLanes];
        for (int j = 0; j < kLanes; ++j) padded[j] = i + j < n ? p[i + j] : -kInf;
        sum[0] = add_exp(sum[0], sub(load(padded), reference));
    }
    return reduce_add(add(sum[0], sum[1]));
}

void scan(const Row& row, int64_t chunk) {
    const int64_t begin = chunk * kChunk, n = smaller(kChunk, row.vocab - begin);
    float* z = row.block_z + begin / kBlock;
    const float top = block_maxima(row.raw + begin, n, z);
    row.stats[chunk] = {top, exp_sum(row.raw + begin, n, top)};
    if (row.logits != row.raw) block_maxima(row.logits + begin, n, z);
    for (int64_t b = 0; b * kBlock < n; ++b) z[b] /= row.temperature;  // rounds monotonically: still the largest of the block
}

// ---- 2. threshold ----

// Order-preserving map between floats and integers; -0 and 0 are one.
ENGINE_INLINE int64_t rank_of(float value) {
    const uint32_t bits = bits_of_float(value);
    const int64_t magnitude = bits & 0x7fffffffu;
    return bits >> 31 ? -magnitude : magnitude;
}
ENGINE_INLINE float value_of(int64_t rank) {
    return rank < 0 ? -float_of_bits(static_cast<uint32_t>(-rank)) : float_of_bits(static_cast<uint32_t>(rank));
}

// The k-th largest of n values without NaN, 1 <= k <= n, by bisection over all floats between the smallest and the largest.
float kth_largest(const float* values, int64_t n, int64_t k) {
    float least = values[0], most = values[0];
    for (int64_t i = 1; i < n; ++i) {
        least = values[i] < least ? values[i] : least;
        most = values[i] > most ? values[i] : most;
    }
    int64_t low = rank_of(least), high = rank_of(most) + 1;  // at least k values are >= low, fewer than k are >= high
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        const float pivot = value_of(middle);
        int32_t count = 0;
        for (int64_t i = 0; i < n; ++i) count += values[i] >= pivot;
        (count >= k ? low : high) = middle;
    }
    return value_of(low);
}

// z of the tokens of block b; -inf past the end of the row.
ENGINE_INLINE void block_of_z(const Row& row, int64_t b, float* z) {
    const int64_t begin = b * kBlock, n = smaller(kBlock, row.vocab - begin);
    for (int64_t i = 0; i < n; ++i) z[i] = row.logits[begin + i] / row.temperature;
    for (int64_t i = n; i < kBlock; ++i) z[i] = -kInf;
}

// A lower bound of the k-th largest z: the k-th largest of the maxima of at least k groups of tokens. The groups are the blocks or, where
// those are too few, the tokens of a block that share a remainder modulo kGroups.
float threshold_bound(const Row& row) {
    constexpr int kGroups = 16;
    const int64_t blocks = row.blocks();
    if (row.k <= blocks) return kth_largest(row.block_z, blocks, row.k);
    if (row.k > kGroups * blocks / 2) return -kInf;
    for (int64_t b = 0; b < blocks; ++b) {
        float z[kBlock];
        block_of_z(row, b, z);
        for (int half = 0; half < kGroups; half += kLanes) {
            VecF top = load(z + half);
            for (int i = kGroups; i < kBlock; i += kGroups) top = max(load(z + half + i), top);
            store(row.candidates + b * kGroups + half, top);
        }
    }
    return kth_largest(row.candidates, blocks * kGroups, row.k);
}

struct Filter {
    float tau;      // tokens with z >= tau are kept
    int64_t count;  // of candidates, ascending by token, which hold all that are kept
};

// tau is the k-th largest z of the row; -inf if it has fewer than k tokens above -inf.
Filter top_k_filter(const Row& row) {
    const float bound = threshold_bound(row);
    const float lowest = bound == -kInf ? -__FLT_MAX__ : bound;  // -inf itself is never drawn
    int64_t count = 0;
    for (int64_t b = 0; b < row.blocks(); ++b) {
        if (row.block_z[b] < lowest) continue;
        float z[kBlock];
        block_of_z(row, b, z);
        for (int i = 0; i < kBlock; i += kMaskLanes)
            for (uint32_t bits = at_least(z + i, lowest); bits != 0; bits &= bits - 1) {
                const int at = i + __builtin_ctz(bits);
                row.candidates[count] = z[at];
                row.tokens[count++] = static_cast<int32_t>(b * kBlock + at);
            }
    }
    return {count >= row.k ? kth_largest(row.candidates, count, row.k) : -kInf, count};
}

// ---- 3. race ----

ENGINE_INLINE bool better(Best a, Best b) { return a.score > b.score || (a.score == b.score && a.token < b.token); }

// Let a token with its z and word compete with `best`; true if it is the new best.
ENGINE_INLINE bool compete(const Row& row, int64_t token, float z, uint32_t word, Best* best) {
    const uint32_t tail = word < kTailWords ? noise_words(row.key, static_cast<uint32_t>(token / 4), kDomainTail).word[token & 3] : 0;
    const Best mine = {z - fixed_log(noise_exponential(word, tail)), token};
    if (!better(mine, *best)) return false;
    *best = mine;
    return true;
}

// The winner among few candidates, one by one.
int64_t race_candidates(const Row& row, Filter filter) {
    Best best = {-kInf, row.vocab};
    for (int64_t i = 0; i < filter.count; ++i) {
        const float z = row.candidates[i];
        uint32_t limit;
        if (z < filter.tau || !word_limit(z, best.score, &limit)) continue;
        const int32_t token = row.tokens[i];
        const uint32_t word = noise_words(row.key, static_cast<uint32_t>(token / 4), kDomainSample).word[token & 3];
        if (word <= limit) compete(row, token, z, word, &best);
    }
    return best.token;
}

// Let the tokens of block b with z >= tau compete with `best`.
void race_block(const Row& row, const BlockNoise& noise, int64_t b, float tau, Best* best) {
    const float top = row.block_z[b];
    uint32_t limit;
    if (top < tau || top == -kInf || !word_limit(top, best->score, &limit)) return;
    uint32_t words[kBlock];
    block_words(noise, static_cast<uint32_t>(b * kBlock), words);
    if (!any_at_most(words, limit)) return;
    for (int i = 0; i < kBlock; i += kMaskLanes)
        for (uint32_t bits = at_most(words + i, limit); bits != 0; bits &= bits - 1) {
            const int at = i + __builtin_ctz(bits);
            const int64_t token = b * kBlock + at;
            if (token >= row.vocab) break;
            const float z = row.logits[token] / row.temperature;
            uint32_t own_limit;
            if (z < tau || z == -kInf || !word_limit(z, best->score, &own_limit) || words[at] > own_limit) continue;
            if (compete(row, token, z, words[at], best)) word_limit(top, best->score, &limit);
        }
}

// The winner among tokens with z >= tau; the block of the largest z first, so that nearly all others are ruled out at once.
int64_t race(const Row& row, float tau, int64_t first_block, bool split) {
    const BlockNoise noise = block_noise(row.key);
    Best best = {-kInf, row.vocab};
    race_block(row, noise, first_block, tau, &best);
    const auto chunk_of_blocks = [&](int64_t chunk, Best* mine) {
        const int64_t end = smaller(row.blocks(), (chunk + 1) * (kChunk / kBlock));
        for (int64_t b = chunk * (kChunk / kBlock); b < end; ++b)
            if (b != first_block) race_block(row, noise, b, tau, mine);
    };
    if (!split) {
        for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) chunk_of_blocks(chunk, &best);
        return best.token;
    }
    parallel_for(row.chunks(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            row.best[chunk] = best;
            chunk_of_blocks(chunk, &row.best[chunk]);
        }
    });
    for (int64_t chunk = 0; chunk < row.chunks(); ++chunk)
        if (better(row.best[chunk], best)) best = row.best[chunk];
    return best.token;
}

// ---- a row ----

float logprob(const Row& row, int64_t token, float top) {
    const float chosen = row.raw[token];
    double sum = 0;
    for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) {
        const ChunkStats& s = row.stats[chunk];
        if (s.max == top)
            sum += s.sum;
        else if (s.max > -kInf && top < kInf)
            sum += s.sum * std::exp(static_cast<double>(s.max) - top);
    }
    if (top == kInf) return chosen == kInf ? static_cast<float>(-std::log(sum)) : -kInf;
    return static_cast<float>(static_cast<double>(chosen) - top - std::log(sum));
}

// After the scan: the status, or 0 and the token.
int choose(const Row& row, bool split, int64_t* token, float* log_probability) {
    float top_raw = -kInf;
    for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) {
        if (row.stats[chunk].sum != row.stats[chunk].sum) return kNan;
        top_raw = row.stats[chunk].max > top_raw ? row.stats[chunk].max : top_raw;
    }
    int64_t first_block = 0;
    for (int64_t b = 1; b < row.blocks(); ++b)
        if (row.block_z[b] > row.block_z[first_block]) first_block = b;
    const float top = row.block_z[first_block];
    if (top == -kInf) return kNothingAllowed;
    if (row.greedy || top == kInf) {
        *token = first_block * kBlock;
        while (row.logits[*token] / row.temperature != top) ++*token;
    } else {
        const Filter filter = row.k > 0 ? top_k_filter(row) : Filter{-kInf, row.vocab};
        const bool few = row.k > 0 && filter.count <= kFewCandidates;
        *token = few ? race_candidates(row, filter) : race(row, filter.tau, first_block, split);
    }
    *log_probability = logprob(row, *token, top_raw);
    return 0;
}

void sample_row(const SampleArgs& a, int64_t r, ScratchSlot slot, bool split) {
    Row row{};
    row.raw = row.logits = a.logits + r * a.row_stride;
    row.vocab = a.vocab;
    row.greedy = a.temperature[r] < kGreedyBelow;
    row.temperature = row.greedy ? 1.0f : a.temperature[r];
    row.k = a.top_k[r] > 0 && a.top_k[r] < a.vocab ? a.top_k[r] : 0;
    row.key = {static_cast<uint64_t>(a.seed[r]), static_cast<uint32_t>(a.position[r]), static_cast<uint32_t>(a.stream[r])};
    lay_out(&row, static_cast<char*>(scratch(slot, lay_out(&row, nullptr))));

    if (a.penalty != nullptr && a.penalty[r] != 1.0f && a.history_start[r] < a.history_start[r + 1]) {
        memcpy(row.penalised, row.raw, static_cast<size_t>(row.vocab) * 4);
        for (int64_t i = a.history_start[r]; i < a.history_start[r + 1]; ++i) {
            const int32_t id = a.history[i];
            const float value = row.raw[id];  // from the raw row, so that a repeated id is penalised once
            row.penalised[id] = value > 0 ? value / a.penalty[r] : value * a.penalty[r];
        }
        row.logits = row.penalised;
    }

    if (split)
        parallel_for(row.chunks(), 1, [&](int64_t begin, int64_t end) {
            for (int64_t chunk = begin; chunk < end; ++chunk) scan(row, chunk);
        });
    else
        for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) scan(row, chunk);

    a.tokens[r] = -1;
    a.logprobs[r] = __builtin_nanf("");
    a.status[r] = choose(row, split, &a.tokens[r], &a.logprobs[r]);
}

}  // namespace

void sample(const SampleArgs& a) {
    if (a.rows < num_threads() && a.vocab > kSplitAbove) {
        for (int64_t r = 0; r < a.rows; ++r) sample_row(a, r, kCallScratch, true);
        return;
    }
    const int64_t grain = 1 + kChunk / a.vocab;  // short rows are not worth waking a thread for
    parallel_for(a.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) sample_row(a, r, kThreadScratch, false);
    });
}

}  // namespace ENGINE_ISA
}  // namespace engine
