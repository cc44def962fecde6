// What the last block of a row does when all are done with it: top-p among few candidates, the token, its log-probabilities, the most
// likely tokens; and it leaves the row's memory as it found it.
#pragma once

#include "cuda/sample_load.h"
#include "cuda/sample_race.h"

namespace engine::cuda {

constexpr int kStatusOk = 0, kStatusNan = 1, kStatusNothingAllowed = 2, kStatusBadParameter = 3;  // STATUS_* of kernels/api.py

// The lists of all blocks merged: the row's most likely tokens with z at or above `threshold`, and their log-probabilities.
ENGINE_DEVICE void merge_most_likely(Shared& s, const uint64_t* lists, int members, int length, int64_t count, bool ok, uint32_t threshold,
                                     float largest, float log_mass, int64_t* tokens, float* log_probabilities) {
    int taken = 0;  // of the list of this thread
    uint64_t last = 1;
    for (int64_t n = 0; n < count; ++n) {
        uint64_t head = 0;
        if (last != 0 && thread_index() < members && taken < length)
            head = load_shared_by_blocks(lists + int64_t{thread_index()} * length + taken);
        last = ok ? block_largest(s, head) : 0;
        if (key_value(last) < threshold) last = 0;
        taken += last != 0 && head == last;
        if (thread_index() == 0) {
            tokens[n] = last != 0 ? int64_t{key_token(last)} : -1;
            log_probabilities[n] = last != 0 ? below(unordered(key_value(last)), largest) - log_mass : -kInf;
        }
    }
}

// Top-p, min-p and the draw among the row's candidates, one of each thread: a token stays while the mass of those with larger z is below
// what top-p needs. The key of the best score; what is kept has `mass` and
// begins at the outcome's threshold.
ENGINE_DEVICE uint64_t settle_candidates(Shared& s, RowGroup& g, const Row& row, uint64_t* mass) {
    const float largest = unordered(s.outcome.largest);
    const int count = static_cast<int>(load_shared_by_blocks(&g.candidates)), me = thread_index();
    uint32_t o = 0, token = 0;
    uint64_t weight = 0;
    if (me < count) {
        const uint64_t candidate = load_shared_by_blocks(&g.candidate[me]);
        o = key_value(candidate);
        token = key_token(candidate);
        weight = weight_of(o, largest);
        s.counts[me] = o;
        s.candidate_weight[me] = weight;
    }
    const uint64_t needed = static_cast<uint64_t>(mass_needed(static_cast<int64_t>(block_sum(s, weight)), row.top_p));
    uint64_t above = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) above += s.counts[i] > o ? s.candidate_weight[i] : 0;
    bool kept = me < count && above < needed;
    if (row.has_min_p()) kept = kept && o >= ordered(largest + fixed_log(row.min_p));
    *mass = block_sum(s, kept ? weight : 0);
    // The smallest of what is kept is the largest of what is kept, upside down.
    const uint32_t threshold = ~static_cast<uint32_t>(block_largest(s, kept ? uint64_t{~o} : 0));
    if (me == 0) s.outcome.threshold = threshold;
    uint64_t key = 0;
    if (kept) {
        const uint32_t word = word_of(noise_words(row.noise, token / 4, kDomainSample), token % 4);
        key = make_key(ordered(unordered(o) - log_exponential(row.noise, token / 4, token % 4, word)), token);
    }
    const uint64_t best = block_largest(s, key);
    if (key == best && best != 0) s.chosen = o;
    block_barrier();
    return best;
}

// The best of what the blocks have found.
ENGINE_DEVICE uint64_t best_of_members(Shared& s, const RowGroup& g, int members) {
    const int me = thread_index();
    const uint64_t key = me < members ? load_shared_by_blocks(&g.best[me].key) : 0, best = block_largest(s, key);
    if (key == best && best != 0) s.chosen = load_shared_by_blocks(&g.best[me].z);
    block_barrier();
    return best;
}

template <class T>
ENGINE_DEVICE void finish(const SampleArgs& a, const Row& row, Shared& s, RowGroup& g, const uint64_t* lists) {
    const int members = static_cast<int>(a.members);
    uint64_t mass = load_shared_by_blocks(&g.mass);
    const uint32_t flags = load_shared_by_blocks(&g.flags), largest = load_shared_by_blocks(&g.largest);
    const uint64_t best = s.outcome.gathered ? settle_candidates(s, g, row, &mass) : best_of_members(s, g, members);

    int status = largest <= kOrderedNegInf ? kStatusNothingAllowed : kStatusOk;
    if ((flags & kFlagNan) != 0) status = kStatusNan;
    if ((flags & kFlagBad) != 0) status = kStatusBadParameter;
    const bool ok = status == kStatusOk && best != 0;
    if (thread_index() == 0) {
        a.tokens[row.index] = ok ? int64_t{key_token(best)} : -1;
        a.status[row.index] = status;
    }
    if (a.logprobs >= 0) {
        // A mass is at least 2^40 where there is one: that of the largest token.
        const float raw_largest = unordered(load_shared_by_blocks(&g.raw_largest)), z_largest = unordered(largest);
        const float raw_log = ok ? fixed_log(static_cast<float>(load_shared_by_blocks(&g.raw_mass)) * 0x1p-40f) : 0.0f;
        const float log_mass = ok ? fixed_log(static_cast<float>(mass) * 0x1p-40f) : 0.0f;
        if (thread_index() == 0) {
            const float nan = __builtin_nanf("");
            const float raw = ok ? to_float(static_cast<const T*>(a.logits)[row.index * a.row_stride + key_token(best)]) : 0.0f;
            a.logprob_raw[row.index] = ok ? below(raw, raw_largest) - raw_log : nan;
            a.logprob[row.index] = ok ? below(unordered(s.chosen), z_largest) - log_mass : nan;
        }
        if (a.logprobs > 0) {
            const int64_t n = a.logprobs;
            const int length = static_cast<int>(n < a.chunk ? n : a.chunk);
            merge_most_likely(s, lists, members, length, n, ok, kOrderedLowest, raw_largest, raw_log, a.top_raw_tokens + row.index * n,
                              a.top_raw + row.index * n);
            merge_most_likely(s, lists + int64_t{members} * length, members, length, n, ok, s.outcome.threshold, z_largest, log_mass,
                              a.top_tokens + row.index * n, a.top + row.index * n);
        }
    }

    clear(s, g);
}

}  // namespace engine::cuda
