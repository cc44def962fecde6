// The thresholds of top-k and top-p, by histograms.
//
// The threshold is the largest x for which the tokens with z >= x still are `need` many (top-k) or have `need` mass (top-p): one target, an
// integer, so that no order of summation matters. z is an ordered integer of 32 bits, known from the top: a pass counts, and weighs, the
// tokens whose higher bits are known by their next 11 (11, then 10) bits. Each block does so for its tokens in shared memory and adds that
// to the row's histogram in global memory; after a barrier of the row's blocks each of them finds the bin in which the target lies. Three
// passes are enough for any row, ties and all; a bin that is kept as a whole ends the search sooner.
#pragma once

#include "cuda/sample_block.h"

namespace engine::cuda {

// A sum of 64 bits in two words of shared memory, whatever the order of the threads.
ENGINE_DEVICE void add_in_two_words(uint32_t* low, uint32_t* high, uint64_t x) {
    const uint32_t word = static_cast<uint32_t>(x), before = atomic_add(low, word);
    const uint32_t carry = before + word < before ? 1u : 0u, rest = static_cast<uint32_t>(x >> 32) + carry;
    if (rest != 0) atomic_add(high, rest);
}

// The block's share of a pass, added to the row's histogram.
template <bool kMass>
ENGINE_DEVICE void add_histogram(Shared& s, RowGroup& g, const uint32_t* z, int chunk, uint32_t floor, float largest, int pass,
                                 uint32_t known, int shift, int bins) {
#pragma unroll 1
    for (int b = thread_index(); b < bins; b += kSampleThreads) {
        s.counts[b] = 0;
        if constexpr (kMass) s.mass_low[b] = s.mass_high[b] = 0;
    }
    block_barrier();
#pragma unroll 1
    for (int i = 4 * thread_index(); i < chunk; i += 4 * kSampleThreads) {
        const Words four = *reinterpret_cast<const Words*>(z + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t o = four.word[j];
            if (o < floor || (pass > 0 && (o - known) >> shift >= static_cast<uint32_t>(bins))) continue;
            const uint32_t bin = (o - known) >> shift;
            atomic_add(&s.counts[bin], 1u);
            if constexpr (kMass) {
                const uint64_t weight = weight_of(o, largest);
                if (weight != 0) add_in_two_words(&s.mass_low[bin], &s.mass_high[bin], weight);
            }
        }
    }
    block_barrier();
    uint32_t* counts = g.counts[kMass ? kSelectPasses + pass : pass];
#pragma unroll 1
    for (int b = thread_index(); b < bins; b += kSampleThreads) {
        if (s.counts[b] == 0) continue;
        atomic_add(&counts[b], s.counts[b]);
        if constexpr (kMass) {
            const uint64_t mass = uint64_t{s.mass_high[b]} << 32 | s.mass_low[b];
            if (mass != 0) atomic_add(&g.masses[pass][b], mass);
        }
    }
}

// s.found: the bin of the row's histogram in which the measure from the top, `above` to begin with, reaches what is needed. `need` is set
// by the first pass. False where there is nothing at all.
template <bool kMass>
ENGINE_DEVICE bool find_bin(Shared& s, const RowGroup& g, int pass, int bins, uint64_t above, uint64_t* need) {
    constexpr int kMost = kBins / kSampleThreads;
    const uint32_t* counts = g.counts[kMass ? kSelectPasses + pass : pass];
    const int mine = bins / kSampleThreads, top = bins - 1 - mine * thread_index();  // this thread's bins, downwards
    uint64_t measure[kMost], sum = 0;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
        measure[i] = 0;
        if (i >= mine) continue;
        if constexpr (kMass)
            measure[i] = load_shared_by_blocks(&g.masses[pass][top - i]);
        else
            measure[i] = load_shared_by_blocks(&counts[top - i]);
        sum += measure[i];
    }
    uint64_t total, before = above + block_scan(s, sum, &total);
    if (pass == 0) {
        if (total == 0) return false;
        if constexpr (kMass)
            *need = static_cast<uint64_t>(mass_needed(static_cast<int64_t>(total), s.row.top_p));
        else
            *need = total < static_cast<uint64_t>(s.row.top_k) ? total : static_cast<uint64_t>(s.row.top_k);
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
        if (before < *need && before + measure[i] >= *need)  // of one bin of one thread
            s.found = {static_cast<uint32_t>(top - i), load_shared_by_blocks(&counts[top - i]), before, measure[i]};
        before += measure[i];
    }
    block_barrier();
    return true;
}

// The threshold among the tokens with z at or above the outcome's, all of them above -inf, becomes the outcome's. `largest` is that of the
// row (of no matter for top-k). All blocks of the row get the same; each has passed at least one barrier of the row.
template <bool kMass>
ENGINE_DEVICE void select(Shared& s, RowGroup& g, uint32_t members, const uint32_t* z, float largest) {
    const uint32_t floor = s.outcome.threshold;
    uint32_t known = 0;
    uint64_t need = 0, above = 0;
    bool found = true;
#pragma unroll 1
    for (int pass = 0; found; ++pass) {
        const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bins = pass == 2 ? kBins / 2 : kBins;
        add_histogram<kMass>(s, g, z, s.row.chunk, floor, largest, pass, known, shift, bins);
        row_barrier(g, members);
        found = find_bin<kMass>(s, g, pass, bins, above, &need);
        if (found) {
            known += s.found.bin << shift;
            above = s.found.above;
            found = pass < kSelectPasses - 1 && s.found.count > 1 && (kMass || above + s.found.measure != need);
        }
        if (thread_index() == 0) {
            s.outcome.histograms |= 1u << (kMass ? kSelectPasses + pass : pass);
            s.outcome.threshold = larger(floor, known);
            s.outcome.kept = above + s.found.measure;
        }
        block_barrier();
    }
}

}  // namespace engine::cuda
