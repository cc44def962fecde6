// `beam_select` in one launch, for few rows: blocks share a row as in `sample` (sample_kernel.h), whose parts it is made of.
//
// Each block turns its part of the row into log-probabilities and scores, in shared memory, and lists its best C continuations; the last
// block of a row merges the lists of its blocks, the last row of a group of beams those of its rows. Keys order scores, then rows, then
// tokens, and all sums are of integers, so that neither the number of blocks nor the order of their atomics can show.
//
// Grid: num_groups * members blocks of kSampleThreads. Barriers of a row: 1 to 3 for top-k, else 1; 1 more for the mass. Bytes: the logits,
// a 32nd of the mask if any, the lists once per block. A pick costs a reduction over a block, three in all: for C of some hundreds, or more
// rows than make the device busy, the kernels in kernels/triton/beam.py do less. Called by kernels/cuda.py.
#pragma once

#include "cuda/beam.h"
#include "cuda/sample_kernel.h"

namespace engine::cuda {

constexpr uint32_t kFlagGroups = 4;  // group_start does not rise from 0 to the number of rows
constexpr int kTokenBits = 22;       // of a token beside a row of the group in a key

// To all threads.
ENGINE_DEVICE bool groups_are_bad(const BeamArgs& b, Shared& s) {
    bool bad = b.group_start[0] != 0 || b.group_start[b.num_beam_groups] != b.sample.rows;
    for (int64_t i = thread_index(); i < b.num_beam_groups; i += kSampleThreads) bad |= b.group_start[i] > b.group_start[i + 1];
    return block_largest(s, bad ? 1 : 0) != 0;
}

ENGINE_DEVICE void write_none(const BeamArgs& b, int64_t at) {
    b.best_scores[at] = b.best_logprobs[at] = -kInf;
    b.best_tokens[at] = -1;
    b.best_parents[at] = -1;
}

// The groups that no row belongs to, or all where they are out of range.
ENGINE_DEVICE void fill_empty_groups(const BeamArgs& b, Shared& s) {
    const bool bad = groups_are_bad(b, s);
    for (int64_t i = thread_index(); i < b.num_beam_groups * b.num_candidates; i += kSampleThreads) {
        const int64_t group = i / b.num_candidates;
        if (bad || b.group_start[group] == b.group_start[group + 1]) write_none(b, i);
    }
}

// The score of a continuation.
ENGINE_DEVICE float score_of(const BeamArgs& b, float logprob, int64_t row, uint32_t token) {
    const SampleArgs& a = b.sample;
    float score = logprob + b.scores[row];
    if (a.seed != nullptr) {
        const NoiseKey key = {static_cast<uint64_t>(a.seed[row]), static_cast<uint32_t>(a.position[row]),
                              static_cast<uint32_t>(a.stream[row])};
        const uint32_t word = word_of(noise_words(key, token / 4, kDomainSample), token % 4);
        score = score - log_exponential(key, token / 4, token % 4, word);
    }
    return score;
}

// The best continuations of a group of beams, whose rows are all done.
ENGINE_DEVICE void merge_group(const BeamArgs& b, Shared& s, int64_t group, int64_t length) {
    const int64_t first = b.group_start[group], mine = first + thread_index();
    const bool has_row = mine < b.group_start[group + 1];
    const int64_t out = group * b.num_candidates;
    int64_t taken = 0, n = 0;
    for (; n < b.num_candidates; ++n) {
        uint64_t key = 0;
        if (has_row && taken < length) {
            key = load_shared_by_blocks(b.row_keys + mine * length + taken);
            if (key != 0) key = make_key(key_value(key), static_cast<uint32_t>(thread_index()) << kTokenBits | key_token(key));
        }
        const uint64_t best = block_largest(s, key);
        if (best == 0) break;
        if (key != best) continue;
        b.best_tokens[out + n] = key_token(key) & ((1u << kTokenBits) - 1);
        b.best_parents[out + n] = static_cast<int32_t>(mine);
        b.best_logprobs[out + n] =
            bits_to_float(load_shared_by_blocks(reinterpret_cast<const uint32_t*>(b.row_logprobs + mine * length + taken)));
        ++taken;
    }
    block_barrier();
    for (int64_t i = thread_index(); i < b.num_candidates; i += kSampleThreads) {
        const int64_t at = out + i;
        if (i < n)
            b.best_scores[at] = score_of(b, b.best_logprobs[at], b.best_parents[at], static_cast<uint32_t>(b.best_tokens[at]));
        else
            write_none(b, at);
    }
    if (thread_index() == 0) b.rows_done[group] = 0;
}

// What the last block of a row does: the row's best continuations and its status; the group's, if the row is its last.
ENGINE_DEVICE void finish_beam(const BeamArgs& b, Shared& s, RowGroup& g, const uint64_t* keys, const float* key_logprobs, int length) {
    const SampleArgs& a = b.sample;
    const int64_t r = s.row.index, row_length = b.num_candidates < a.vocab ? b.num_candidates : a.vocab;
    const uint32_t flags = load_shared_by_blocks(&g.flags);
    uint64_t* row_keys = b.row_keys + r * row_length;
    int taken = 0;
    bool any = false;
    for (int64_t n = 0; n < row_length; ++n) {
        const int64_t at = int64_t{thread_index()} * length + taken;
        const uint64_t key = thread_index() < a.members && taken < length ? load_shared_by_blocks(keys + at) : 0;
        const uint64_t best = block_largest(s, key);
        if (best == 0 && thread_index() == 0) row_keys[n] = 0;
        if (best == 0) break;
        any = true;
        if (key != best) continue;
        row_keys[n] = key;
        b.row_logprobs[r * row_length + n] = bits_to_float(load_shared_by_blocks(reinterpret_cast<const uint32_t*>(key_logprobs + at)));
        ++taken;
    }
    int status = any ? kStatusOk : kStatusNothingAllowed;
    if ((flags & kFlagNan) != 0) status = kStatusNan;
    if (b.scores[r] == -kInf) status = kStatusNothingAllowed;
    if ((flags & kFlagBad) != 0) status = kStatusBadParameter;
    block_barrier();
    if (thread_index() == 0) {
        a.status[r] = status;
        if (status != kStatusOk) row_keys[0] = 0;
    }
    clear(s, g);

    if ((flags & kFlagGroups) != 0) return;
    for (int64_t i = thread_index(); i < b.num_beam_groups; i += kSampleThreads)
        if (b.group_start[i] <= r && r < b.group_start[i + 1]) s.group = i;  // one of them
    block_barrier();
    const int64_t group = s.group;
    if (thread_index() == 0) {
        fence();
        const uint32_t rows = static_cast<uint32_t>(b.group_start[group + 1] - b.group_start[group]);
        s.is_last = atomic_add(&b.rows_done[group], 1u) == rows - 1 ? 1 : 0;
        fence();
    }
    block_barrier();
    if (s.is_last != 0) merge_group(b, s, group, row_length);
}

template <class T>
ENGINE_DEVICE void beam_row(const BeamArgs& b, Shared& s, RowGroup& g, uint32_t* z) {
    const SampleArgs& a = b.sample;
    const Row& row = s.row;
    const uint32_t members = static_cast<uint32_t>(a.members);
    const int me = thread_index();
    load_raw<T>(a, row, s, z);
    block_barrier();
    divide(nullptr, row, s, z);
    if (me == 0) atomic_max(&g.largest, s.largest);
    filter(s, g, members, z);

    const bool any = s.outcome.largest > kOrderedNegInf;
    const float largest = unordered(s.outcome.largest);
    uint64_t mass = 0;
    if (any)
#pragma unroll 1
        for (int i = me; i < row.chunk; i += kSampleThreads)
            if (z[i] >= s.outcome.threshold) mass += weight_of(z[i], largest);
    mass = block_sum(s, mass);
    if (me == 0) atomic_add(&g.mass, mass);
    row_barrier(g, members);
    const float log_mass = any ? fixed_log(static_cast<float>(load_shared_by_blocks(&g.mass)) * 0x1p-40f) : 0.0f;
#pragma unroll 1
    for (int i = me; i < row.chunk; i += kSampleThreads) {
        float logprob = -kInf;
        // Where tokens of +inf share the probability it is minus the logarithm, -0.0 for a single one.
        if (any && z[i] >= s.outcome.threshold) logprob = largest == kInf ? -log_mass : below(unordered(z[i]), largest) - log_mass;
        z[i] = float_to_bits(logprob);
    }
    block_barrier();
    apply_lists(a, row, s, z);
    block_barrier();
    if (me == 0 && s.flags != 0) atomic_or(&g.flags, s.flags);

    const uint32_t* allowed = mask_of(a, row);
    uint32_t* scores = z + row.chunk;
#pragma unroll 1
    for (int i = me; i < row.chunk; i += kSampleThreads) {
        const int token = row.first + i;
        const bool out = i >= row.tokens || (allowed != nullptr && (allowed[token / 32] >> (token % 32) & 1) == 0);
        const float logprob = out ? -kInf : bits_to_float(z[i]);
        const float score = logprob > -kInf ? score_of(b, logprob, row.index, static_cast<uint32_t>(token)) : -kInf;
        scores[i] = ordered(score);
    }
    block_barrier();
    const int length = static_cast<int>(b.num_candidates < row.chunk ? b.num_candidates : row.chunk);
    const int64_t mine = int64_t{block_index()} * length, first = mine - int64_t{row.first / row.chunk} * length;
    for_each_largest(
        s, row.tokens, length,
        [&](int i) { return scores[i] > kOrderedNegInf ? make_key(scores[i], static_cast<uint32_t>(row.first + i)) : 0; },
        [&](int n, uint64_t key) {
            b.keys[mine + n] = key;
            if (key != 0) b.key_logprobs[mine + n] = bits_to_float(z[key_token(key) - static_cast<uint32_t>(row.first)]);
        });
    if (is_last_block(s, g, members)) finish_beam(b, s, g, b.keys + first, b.key_logprobs + first, length);
}

// All rows of this block's group of blocks. `memory`: the block's shared memory, sizeof(Shared) + 8 * chunk bytes.
template <class T>
ENGINE_DEVICE void beam_rows(const BeamArgs& b, unsigned char* memory) {
    const SampleArgs& a = b.sample;
    Shared& s = *reinterpret_cast<Shared*>(memory);
    uint32_t* z = reinterpret_cast<uint32_t*>(memory + sizeof(Shared));
    const int members = static_cast<int>(a.members), team = block_index() / members;
    RowGroup& g = a.groups[team];
    if (block_index() == 0) fill_empty_groups(b, s);
#pragma unroll 1
    for (int64_t r = team; r < a.rows; r = s.row.index + a.num_groups) {
        if (r != team) row_barrier(g, static_cast<uint32_t>(members));  // the last block of the row before has cleared the group's memory
        const bool bad = groups_are_bad(b, s);
        if (thread_index() == 0) {
            const float temperature = a.temperature[r], score = b.scores[r];
            begin_row(a, s, r, block_index() % members);
            const bool good = temperature > 0.0f && temperature < kInf && (fabsf(score) <= kLargestAddend || score == -kInf);
            s.flags = (good && !bad ? 0 : kFlagBad) | (bad ? kFlagGroups : 0);
        }
        block_barrier();
        beam_row<T>(b, s, g, z);
    }
}

}  // namespace engine::cuda
