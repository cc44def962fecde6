// One token per row of logits by the token law (contract in kernels/api.py), with about one read of the row from memory:
//
// 1. scan (sample_row.h): the maximum of each block of 128 logits and, while a chunk of 4,096 is in the first-level cache, the sum of
//    exponentials for the raw log-probability; penalties, bias and masks go into a copy of the row.
// 2. filter (sample_filter.h): the threshold of top-k, top-p and min-p, and where cheap the list of what is kept.
// 3. race (sample_race.h): the noise of what is kept, and the winner.
// 4. log-probabilities (sample_logprobs.h), if asked for.
//
// Rows run in parallel; few rows of a large vocabulary are cut into chunks instead. Chunks lie at fixed places and are merged in order, so
// that results do not depend on which threads did what. Ties go to the lowest id everywhere. Called by bind_sample.cpp.
#include "../kernels.h"
#include "../thread_pool.h"
#include "sample_logprobs.h"
#include "sample_race.h"
#include "sample_row.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kSplitAbove = 1 << 16;  // vocabularies above this are split over threads when there are few rows

struct Choice {
    int status;
    int64_t token;
    float top, tau;  // largest z, and the smallest that is kept
};

// From the block maxima to the token; `drawn`: the winner of the race over the whole row if that has been run, else -1.
template <class T>
Choice choose(const Row& row, const Logits<T>& logits, bool split, int64_t drawn) {
    for (int64_t chunk = 0; chunk < row.chunks(); ++chunk)
        if (row.stats[chunk].nan) return {kNan, -1, 0, 0};
    const int64_t first_block = first_largest(row.block_z, row.blocks());
    const float top = row.block_z[first_block];
    if (top == -kInf) return {kNothingAllowed, -1, 0, 0};
    if (row.greedy || top == kInf) {
        int64_t token = first_block * kBlock;
        while (logits.at(token) != top) ++token;
        return {kOk, token, top, -kInf};
    }
    if (drawn >= 0) return {kOk, drawn, top, -kInf};
    const Kept kept = filter(row, logits, top);
    return {kOk, race(row, logits, kept, first_block, split), top, kept.tau};
}

// After the scan: everything else, and the results.
template <class Raw, class T>
void finish(const SampleArgs& a, int64_t r, const Row& row, const Raw* raw, const T* values, bool split, int64_t drawn) {
    const Logits<T> logits = {values, row.vocab, row.temperature};
    const Choice choice = choose(row, logits, split, drawn);
    a.tokens[r] = choice.token;
    a.status[r] = choice.status;
    if (a.logprobs == nullptr) return;
    if (choice.status != kOk) {
        a.logprobs[r] = a.processed_logprobs[r] = __builtin_nanf("");
        for (int64_t i = r * a.top; i < (r + 1) * a.top; ++i) {
            a.top_tokens[i] = a.processed_top_tokens[i] = -1;
            a.top_logprobs[i] = a.processed_top_logprobs[i] = -kInf;
        }
        return;
    }
    const Logits<Raw> plain = {raw, row.vocab, 1.0f};
    const Distribution of_raw = raw_distribution(row);
    const bool is_raw = static_cast<const void*>(raw) == values && row.temperature == 1 && (row.greedy || !row.filtered());
    const Distribution processed = is_raw ? of_raw : processed_distribution(row, logits, choice.top, choice.tau);
    a.logprobs[r] = of_raw.log_probability(plain.at(choice.token));
    a.processed_logprobs[r] = processed.log_probability(logits.at(choice.token));
    if (a.top == 0) return;
    const int64_t at = r * a.top;
    most_likely(plain, of_raw, -kInf, a.top, row.raw_max, row.blocks(), a.top_tokens + at, a.top_logprobs + at);
    const float tau = choice.top == kInf ? kInf : choice.tau;
    most_likely(logits, processed, tau, a.top, row.block_z, row.blocks(), a.processed_top_tokens + at, a.processed_top_logprobs + at);
}

template <class T>
void sample_row(const SampleArgs& a, int64_t r, ScratchSlot slot, bool split) {
    const T* raw = static_cast<const T*>(a.logits) + r * a.row_stride;
    Row row = row_of(a, r);
    row.key = {static_cast<uint64_t>(a.seed[r]), static_cast<uint32_t>(a.position[r]), static_cast<uint32_t>(a.stream[r])};
    lay_out(&row, static_cast<char*>(scratch(slot, lay_out(&row, nullptr))));

    const Adjustments adjustments = adjustments_of(a.lists, r, a.position[r], a.vocab);
    // A row that is neither adjusted nor filtered runs its race chunk by chunk behind the scan: one read of it, the noise in its shadow.
    const bool in_one_pass = !adjustments.any() && !row.greedy && !row.filtered();
    const Race<T> race = {row, {raw, row.vocab, row.temperature}, -kInf, row_noise(row.key)};
    const auto run_chunk = [&](int64_t chunk, Best* best) {
        scan(row, raw, chunk);
        if (in_one_pass) race.run_chunk(chunk, best);
    };
    Best best = {-kInf, row.vocab};
    if (split) {
        parallel_for(row.chunks(), 1, [&](int64_t begin, int64_t end) {
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                row.best[chunk] = {-kInf, row.vocab};
                run_chunk(chunk, &row.best[chunk]);
            }
        });
        for (int64_t chunk = 0; chunk < row.chunks(); ++chunk)
            if (better(row.best[chunk], best)) best = row.best[chunk];
    } else {
        for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) run_chunk(chunk, &best);
    }

    const int64_t drawn = in_one_pass ? best.token : -1;
    if (adjust_copy(row, raw, adjustments))
        finish(a, r, row, raw, row.adjusted, split, drawn);
    else
        finish(a, r, row, raw, raw, split, drawn);
}

template <class T>
void sample_rows(const SampleArgs& a) {
    if (a.rows < num_threads() && a.vocab > kSplitAbove) {
        for (int64_t r = 0; r < a.rows; ++r) sample_row<T>(a, r, kCallScratch, true);
        return;
    }
    const int64_t grain = 1 + kChunk / a.vocab;  // short rows are not worth waking a thread for
    parallel_for(a.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) sample_row<T>(a, r, kThreadScratch, false);
    });
}

}  // namespace

void sample(const SampleArgs& a) {
    if (a.dtype == kBF16)
        sample_rows<BF16>(a);
    else if (a.dtype == kF16)
        sample_rows<F16>(a);
    else
        sample_rows<float>(a);
}

}  // namespace ENGINE_ISA
}  // namespace engine
