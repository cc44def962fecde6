// A call of `sample` (kernels/api.py), as the binding, the kernel and the emulated grid of the tests share it.
#pragma once

#include <cstdint>

namespace engine::cuda {

constexpr int kSampleThreads = 512;        // of a block
constexpr int kMaxMembers = 256;           // blocks that work on one row
constexpr int kBins = 2048;                // of a histogram
constexpr int kSelectPasses = 3;           // histograms of 11, 11 and 10 bits
constexpr int kCandidates = 512;           // tokens kept by top-k whose top-p one block works out: one of each thread
constexpr int64_t kChunkMultiple = 128;    // tokens of a block: whole vectors, whole words of the mask, whole Philox calls
constexpr int64_t kMaxChunk = kBins * 32;  // a bit for each token fits where a histogram's counts are

// Bits of RowGroup::flags.
constexpr uint32_t kFlagNan = 1, kFlagBad = 2;

// What one block found of a row.
struct MemberBest {
    uint64_t key;  // the best score and its token; 0: none
    uint32_t z;    // of that token, ordered
    uint32_t unused;
};

// What the blocks that work on one row share, in global memory. All zero before a launch, but for `generation`, and again after it.
struct alignas(16) RowGroup {
    uint32_t arrived, generation;  // of the barrier
    uint32_t finished;             // blocks that are done with the row
    uint32_t flags;
    uint32_t largest, raw_largest;  // ordered
    uint32_t candidates;            // written so far
    uint32_t unused;
    uint64_t mass, raw_mass;
    uint64_t candidate[kCandidates];  // z, ordered, and the token
    MemberBest best[kMaxMembers];
    uint32_t counts[2 * kSelectPasses][kBins];  // of top-k's passes, then of top-p's
    uint64_t masses[kSelectPasses][kBins];
};

static_assert(sizeof(RowGroup) == 106544, "ROW_GROUP_BYTES of kernels/cuda.py");

// Addresses and sizes, in the order in which the binding passes them (kernels/cuda.py); tensors as in kernels/api.py, 0 where absent.
struct SampleArgs {
    const void* logits;
    int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16
    int64_t row_stride, rows, vocab;
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const int64_t* seed;
    const int32_t* position;
    const int32_t* stream;
    const float* repetition;
    const float* presence;
    const float* frequency;
    const int32_t* penalty_token;
    const int32_t* penalty_count;
    const int32_t* penalty_start;
    int64_t penalty_size;
    const int32_t* bias_token;
    const float* bias_value;
    const int32_t* bias_start;
    int64_t bias_size;
    const int32_t* end_token;
    const int32_t* end_position;
    const int32_t* end_start;
    int64_t end_size;
    const uint32_t* allowed;
    int64_t logprobs;  // -1: none
    int64_t* tokens;
    int32_t* status;
    float* logprob_raw;
    float* logprob;
    int64_t* top_raw_tokens;
    float* top_raw;
    int64_t* top_tokens;
    float* top;
    RowGroup* groups;    // [num_groups]
    uint64_t* top_keys;  // [num_groups, 2, members, min(logprobs, chunk)], raw and processed
    int64_t members;     // blocks of a group
    int64_t chunk;       // tokens of a block, a multiple of kChunkMultiple
    int64_t num_groups;
};

constexpr int kSampleWords = sizeof(SampleArgs) / 8;
static_assert(sizeof(SampleArgs) == 42 * 8, "every field is one word of 64 bits");

}  // namespace engine::cuda
