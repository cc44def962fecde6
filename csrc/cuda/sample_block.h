// What the parts of the sampler's kernel share: shared memory, order in integers, reductions over a block, the barrier of a row's blocks.
#pragma once

#include "common/fixed_math.h"
#include "cuda/grid.h"
#include "cuda/sample.h"

namespace engine::cuda {

constexpr int kWarps = kSampleThreads / kWarp;

// Floats are ordered as unsigned integers: a < b if and only if ordered(a) < ordered(b), with -0.0 taken as 0.0. 0 is below everything.
constexpr uint32_t kOrderedNegInf = 0x007FFFFFu, kOrderedLowest = 0x00800000u, kOrderedInf = 0xFF800000u;

ENGINE_DEVICE uint32_t ordered(float x) {
    const uint32_t bits = float_to_bits(x + 0.0f);  // the sum makes +0.0 of -0.0
    return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFu : 0x80000000u);
}
ENGINE_DEVICE float unordered(uint32_t o) { return bits_to_float(o ^ ((o >> 31) != 0 ? 0x80000000u : 0xFFFFFFFFu)); }

// A key is an ordered value and a token: larger for a larger value, then for a lower token, so that a maximum has the tie rule of the law
// whatever the order of the reduction. 0 is no key.
ENGINE_DEVICE uint64_t make_key(uint32_t o, uint32_t token) { return uint64_t{o} << 32 | (token ^ 0xFFFFFFFFu); }
ENGINE_DEVICE uint32_t key_value(uint64_t key) { return static_cast<uint32_t>(key >> 32); }
ENGINE_DEVICE uint32_t key_token(uint64_t key) { return static_cast<uint32_t>(key) ^ 0xFFFFFFFFu; }

ENGINE_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
ENGINE_DEVICE uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

// z - largest for z <= largest, 0 where they are equal (also where both are +inf).
ENGINE_DEVICE float below(float z, float largest) { return z == largest ? 0.0f : z - largest; }
ENGINE_DEVICE uint64_t weight_of(uint32_t o, float largest) { return static_cast<uint64_t>(fixed_weight(below(unordered(o), largest))); }

constexpr float kInf = __builtin_huge_valf();
constexpr float kGreedyBelow = 1e-5f;
constexpr float kSmallestNormal = 0x1p-126f;  // fixed_log takes no smaller number: such a min_p is off

// A row, and the part of it that is this block's.
struct Row {
    int64_t index;
    int32_t vocab;
    int32_t first, tokens;  // of this block
    int32_t chunk;          // tokens that its shared memory holds: those, then -inf
    float divisor;          // the temperature, or 1
    bool greedy;
    float top_p, min_p;
    int32_t top_k;
    NoiseKey noise;

    ENGINE_DEVICE_METHOD bool has_top_k() const { return top_k > 0 && top_k < vocab && !greedy; }
    ENGINE_DEVICE_METHOD bool has_top_p() const { return top_p < 1.0f && !greedy; }
    ENGINE_DEVICE_METHOD bool has_min_p() const { return min_p >= kSmallestNormal && !greedy; }
    ENGINE_DEVICE_METHOD bool is_filtered() const { return has_top_k() || has_top_p() || has_min_p(); }
};

// Where the measure that is needed is reached (sample_select.h).
struct Found {
    uint32_t bin, count;
    uint64_t above, measure;  // of what is above the bin, and in it
};

// What the row's blocks have found out together.
struct Outcome {
    uint32_t largest;     // ordered; of z
    uint32_t threshold;   // ordered: the tokens at or above it are kept
    uint64_t kept;        // how many those are (after top-k), or what mass they have (after top-p)
    uint32_t histograms;  // used, a bit each
    bool gathered;        // those tokens become candidates of the row: top-p and min-p have yet to be applied
};

// Shared memory of a block, before the z of its tokens.
struct alignas(16) Shared {
    uint32_t counts[kBins];                      // a histogram's; or a bit for each token (sample_load.h)
    uint32_t mass_low[kBins], mass_high[kBins];  // its masses, as two words: there is no atomic on 64 bits of shared memory that is fast
    uint64_t candidate_weight[kCandidates];
    uint64_t warp[kWarps];
    Row row;
    Found found;
    Outcome outcome;
    uint32_t flags, largest, raw_largest;
    uint32_t chosen;  // z of the chosen token, ordered
    uint32_t is_last;
    int64_t group;  // of beams, that the row belongs to
};

ENGINE_DEVICE uint32_t warp_largest(uint32_t x) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = larger(x, shuffle_xor(x, lanes));
    return x;
}

// The largest x of all threads, to all of them. Begins and ends with no need of a barrier around it.
ENGINE_DEVICE uint64_t block_largest(Shared& s, uint64_t x) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = larger(x, shuffle_xor(x, lanes));
    if (thread_index() % kWarp == 0) s.warp[thread_index() / kWarp] = x;
    block_barrier();
    x = 0;
#pragma unroll 2
    for (int w = 0; w < kWarps; ++w) x = larger(x, s.warp[w]);
    block_barrier();
    return x;
}

// The sum, likewise.
ENGINE_DEVICE uint64_t block_sum(Shared& s, uint64_t x) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
    if (thread_index() % kWarp == 0) s.warp[thread_index() / kWarp] = x;
    block_barrier();
    x = 0;
#pragma unroll 2
    for (int w = 0; w < kWarps; ++w) x += s.warp[w];
    block_barrier();
    return x;
}

// The sum of the x of the threads before this one, and the sum of all, likewise.
ENGINE_DEVICE uint64_t block_scan(Shared& s, uint64_t x, uint64_t* total) {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    uint64_t sum = x;
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
        const uint64_t other = shuffle_up(sum, lanes);
        sum += lane >= lanes ? other : 0;
    }
    if (lane == kWarp - 1) s.warp[warp] = sum;
    block_barrier();
    uint64_t before = sum - x;
    *total = 0;
#pragma unroll 2
    for (int w = 0; w < kWarps; ++w) {
        before += w < warp ? s.warp[w] : 0;
        *total += s.warp[w];
    }
    block_barrier();
    return before;
}

// The largest keys of a block's tokens, downwards: `count` of them, or up to a 0. key(i) is that of token i. A thread holds the largest of
// its own, and looks for another when that is taken.
template <class Key, class Take>
ENGINE_DEVICE void for_each_largest(Shared& s, int tokens, int count, Key key, Take take) {
    uint64_t mine = 0, last = ~uint64_t{0};
    for (int n = 0; n < count && last != 0; ++n) {
        if (mine == last || n == 0) {
            mine = 0;
#pragma unroll 1
            for (int i = thread_index(); i < tokens; i += kSampleThreads) {
                const uint64_t other = key(i);
                if (other < last) mine = larger(mine, other);
            }
        }
        last = block_largest(s, mine);
        if (thread_index() == 0) take(n, last);
    }
}

// All blocks of the row have come here, and see what the others wrote to global memory. They all run at the same time (the launch is
// cooperative), and leave the barrier ready for the next time.
ENGINE_DEVICE void row_barrier(RowGroup& g, uint32_t members) {
    block_barrier();
    if (thread_index() == 0) {
        const uint32_t generation = load_volatile(&g.generation);
        fence();
        if (atomic_add(&g.arrived, 1u) == members - 1) {
            g.arrived = 0;
            fence();
            atomic_add(&g.generation, 1u);
        } else {
            wait_while(&g.generation, generation);
        }
        fence();
    }
    block_barrier();
}

// Whether all other blocks of the row are done with it; if so, this one sees what they wrote to global memory.
ENGINE_DEVICE bool is_last_block(Shared& s, RowGroup& g, uint32_t members) {
    block_barrier();
    if (thread_index() == 0) {
        fence();
        s.is_last = atomic_add(&g.finished, 1u) == members - 1 ? 1 : 0;
        fence();
    }
    block_barrier();
    return s.is_last != 0;
}

// Leave the row's memory as it was found: the last block's part.
ENGINE_DEVICE void clear(const Shared& s, RowGroup& g) {
    block_barrier();  // all threads have read what is cleared now
#pragma unroll 1
    for (int h = 0; h < 2 * kSelectPasses; ++h) {
        if ((s.outcome.histograms >> h & 1) == 0) continue;
#pragma unroll 1
        for (int b = thread_index(); b < kBins; b += kSampleThreads) {
            g.counts[h][b] = 0;
            if (h >= kSelectPasses) g.masses[h - kSelectPasses][b] = 0;
        }
    }
    if (thread_index() == 0) {
        g.finished = g.flags = g.largest = g.raw_largest = g.candidates = 0;
        g.mass = g.raw_mass = 0;
    }
}

// One thread's part of a row's beginning: what is common to the ops.
ENGINE_DEVICE void begin_row(const SampleArgs& a, Shared& s, int64_t r, int member) {
    Row& row = s.row;
    row.index = r;
    row.vocab = static_cast<int32_t>(a.vocab);
    row.chunk = static_cast<int32_t>(a.chunk);
    row.first = member * row.chunk;
    row.tokens = row.vocab - row.first < row.chunk ? row.vocab - row.first : row.chunk;
    row.greedy = false;
    row.divisor = a.temperature[r];
    row.top_k = a.top_k[r];
    row.top_p = 1.0f;
    row.min_p = 0.0f;
    row.noise = {a.seed == nullptr ? 0 : static_cast<uint64_t>(a.seed[r]), static_cast<uint32_t>(a.position[r]),
                 a.seed == nullptr ? 0 : static_cast<uint32_t>(a.stream[r])};
    s.flags = s.largest = s.raw_largest = 0;
    s.outcome = {0, kOrderedLowest, 0, 0, false};
}

}  // namespace engine::cuda
