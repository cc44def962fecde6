// `sample` in one launch. The blocks of a group share a row: each holds a part of it in shared memory, so that the logits are read from
// global memory once, whatever the filters, and what they have to tell each other goes through a few kilobytes of global memory (RowGroup)
// and a barrier of the group. They must all run at the same time: the launch is cooperative. Groups take the rows in turn.
//
// Grid: num_groups * members blocks of kSampleThreads. Barriers of a row:
//
//     greedy or unfiltered, without log-probabilities   none: the last block to finish takes the best of all
//     min-p; or log-probabilities                       1: the largest z
//     top-k                                             1 to 3, one for each histogram (sample_select.h)
//     top-p                                             1 to 3 more, and one before; after top-k with up to 512 tokens left, none: the
//                                                       last block works it out
//
// and one between two rows of a group. Bytes: the logits, a 32nd of the mask if any, the lists once per block; logits again, from L2, for
// raw log-probabilities. What a row is given depends on the row alone: sums are of integers, ties go to the lower token (keys), so neither
// the number of blocks nor the order of their atomics can show. Called by kernels/cuda.py.
#pragma once

#include "cuda/sample_finish.h"
#include "cuda/sample_select.h"

namespace engine::cuda {

// s.outcome: the row's largest z, and what is kept of it; the same in all its blocks. Where the row has no token it is of no matter.
ENGINE_DEVICE void filter(Shared& s, RowGroup& g, uint32_t members, const uint32_t* z) {
    const Row& row = s.row;
    if (row.has_top_k())
        select<false>(s, g, members, z, 0.0f);
    else
        row_barrier(g, members);
    const uint32_t top = load_shared_by_blocks(&g.largest);
    const float largest = unordered(top);
    const bool ordinary = top > kOrderedNegInf && top < kOrderedInf;
    const bool gathered = ordinary && row.has_top_p() && row.has_top_k() && s.outcome.kept <= kCandidates;
    if (ordinary && row.has_top_p() && !gathered) select<true>(s, g, members, z, largest);
    if (thread_index() == 0) {  // the others read no more of the outcome before the barrier
        s.outcome.largest = top;
        s.outcome.gathered = gathered;
        if (top == kOrderedInf)
            s.outcome.threshold = kOrderedInf;
        else if (ordinary && row.has_min_p() && !gathered)
            s.outcome.threshold = larger(s.outcome.threshold, ordered(largest + fixed_log(row.min_p)));
    }
    block_barrier();
}

// Add this block's part of the row's masses, raw and processed.
template <class T>
ENGINE_DEVICE void add_masses(const SampleArgs& a, const Row& row, Shared& s, RowGroup& g, const Outcome& outcome, const uint32_t* z) {
    const float raw_largest = unordered(load_shared_by_blocks(&g.raw_largest)), largest = unordered(outcome.largest);
    uint64_t raw_mass = 0, mass = 0;
    for_each_quad(tokens_of<T>(a, row), row, [&](int, const float (&x)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) raw_mass += x[j] == x[j] ? static_cast<uint64_t>(fixed_weight(below(x[j], raw_largest))) : 0;
    });
#pragma unroll 1
    for (int i = thread_index(); i < row.chunk; i += kSampleThreads)
        if (z[i] >= outcome.threshold) mass += weight_of(z[i], largest);
    raw_mass = block_sum(s, raw_mass);
    mass = block_sum(s, mass);
    if (thread_index() == 0) {
        atomic_add(&g.raw_mass, raw_mass);
        if (!outcome.gathered) atomic_add(&g.mass, mass);
    }
}

template <class T>
ENGINE_DEVICE void sample_row(const SampleArgs& a, Shared& s, RowGroup& g, int member, uint32_t* z, uint64_t* lists) {
    const Row& row = s.row;
    const uint32_t members = static_cast<uint32_t>(a.members);
    const int me = thread_index();
    load_raw<T>(a, row, s, z);
    block_barrier();
    const int length = static_cast<int>(a.logprobs < row.chunk ? a.logprobs : row.chunk);  // of this block's lists of the most likely
    if (length > 0)
        for_each_largest(
            s, row.tokens, length,
            [&](int i) {
                const float x = bits_to_float(z[i]);
                return x > -kInf ? make_key(ordered(x), static_cast<uint32_t>(row.first + i)) : 0;
            },
            [&](int n, uint64_t key) { lists[int64_t{member} * length + n] = key; });
    apply_lists(a, row, s, z);
    divide(mask_of(a, row), row, s, z);
    if (me == 0) {
        if (s.flags != 0) atomic_or(&g.flags, s.flags);
        atomic_max(&g.largest, s.largest);
        if (a.logprobs >= 0) atomic_max(&g.raw_largest, s.raw_largest);
    }

    if (row.is_filtered() || a.logprobs >= 0) filter(s, g, members, z);
    const Outcome& outcome = s.outcome;
    if (a.logprobs >= 0 && outcome.largest > kOrderedNegInf) add_masses<T>(a, row, s, g, outcome, z);
    if (length > 0)
        for_each_largest(
            s, row.tokens, length,
            [&](int i) { return z[i] >= outcome.threshold ? make_key(z[i], static_cast<uint32_t>(row.first + i)) : 0; },
            [&](int n, uint64_t key) { lists[(int64_t{a.members} + member) * length + n] = key; });

    if (outcome.gathered) {
#pragma unroll 1
        for (int i = me; i < row.chunk; i += kSampleThreads) {
            if (z[i] < outcome.threshold) continue;
            const uint32_t slot = atomic_add(&g.candidates, 1u);
            if (slot < kCandidates) g.candidate[slot] = make_key(z[i], static_cast<uint32_t>(row.first + i));
        }
    } else {
        const uint64_t best = row.greedy ? best_z(s, z, row.first, row.chunk, outcome.threshold)
                                         : race(s, z, row.first, row.chunk, row.noise, outcome.threshold);
        if (me == 0) g.best[member] = {best, best != 0 ? z[key_token(best) - static_cast<uint32_t>(row.first)] : 0, 0};
    }

    if (is_last_block(s, g, members)) finish<T>(a, row, s, g, lists);
}

// All rows of this block's group. `memory`: the block's shared memory, sizeof(Shared) + 4 * chunk bytes.
template <class T>
ENGINE_DEVICE void sample_rows(const SampleArgs& a, unsigned char* memory) {
    Shared& s = *reinterpret_cast<Shared*>(memory);
    uint32_t* z = reinterpret_cast<uint32_t*>(memory + sizeof(Shared));
    const int members = static_cast<int>(a.members), group = block_index() / members, member = block_index() % members;
    RowGroup& g = a.groups[group];
    const int64_t length = a.logprobs < a.chunk ? a.logprobs : a.chunk;
    uint64_t* lists = length > 0 ? a.top_keys + int64_t{group} * 2 * members * length : nullptr;
#pragma unroll 1
    for (int64_t r = group; r < a.rows; r = s.row.index + a.num_groups) {
        if (r != group) row_barrier(g, a.members);  // the last block of the row before has cleared the group's memory
        if (thread_index() == 0) {
            begin_row(a, s, r, member);
            Row& row = s.row;
            const float temperature = row.divisor;
            row.greedy = temperature < kGreedyBelow;
            if (!(temperature >= kGreedyBelow)) row.divisor = 1.0f;
            row.top_p = a.top_p[r];
            row.min_p = a.min_p[r];
            const bool good = temperature >= 0.0f && temperature < kInf && row.top_p >= 0.0f && row.top_p <= 1.0f && row.min_p >= 0.0f &&
                              row.min_p <= 1.0f;
            s.flags = good ? 0 : kFlagBad;
        }
        block_barrier();
        sample_row<T>(a, s, g, member, z, lists);
    }
}

}  // namespace engine::cuda
