// A call of `beam_select` (kernels/api.py), as the binding, the kernel and the emulated grid of the tests share it.
#pragma once

#include "cuda/sample.h"

namespace engine::cuda {

constexpr int64_t kMaxBeamRows = kSampleThreads;  // rows of a call: when a group's rows are merged each is one thread's

// As SampleArgs, which are its first fields: of those its rows, lists, mask, status and blocks; its filters but top-k are absent, and so
// are the results of `sample`. `seed` and `stream` are 0 without noise.
struct BeamArgs {
    SampleArgs sample;
    const float* scores;
    const int32_t* group_start;
    int64_t num_beam_groups, num_candidates;
    uint32_t* rows_done;    // [num_beam_groups]; all zero before a launch, and again after it
    uint64_t* keys;         // [num_groups, members, min(num_candidates, chunk)]: the best continuations of each block
    float* key_logprobs;    // likewise
    uint64_t* row_keys;     // [rows, min(num_candidates, vocab)]: of each row
    float* row_logprobs;    // likewise
    float* best_scores;     // [num_beam_groups, num_candidates]
    int64_t* best_tokens;   // likewise
    int32_t* best_parents;  // likewise
    float* best_logprobs;   // likewise
};

constexpr int kBeamWords = sizeof(BeamArgs) / 8;
static_assert(sizeof(BeamArgs) == (kSampleWords + 13) * 8, "every field is one word of 64 bits");

}  // namespace engine::cuda
