// The kernels on an emulated grid, as a library for `emulated.py`: the same words as the binding takes, and an order of threads.
#include "cuda/beam_kernel.h"

using namespace engine::cuda;

namespace {

// body(memory) on all groups of blocks, which know nothing of each other, or only who comes last. 0, or 1 where the kernel would hang.
template <class Body>
int run(const SampleArgs& a, size_t token_bytes, int order, uint32_t seed, Body body) {
    emulated::Grid grid(kSampleThreads, sizeof(Shared) + token_bytes * static_cast<size_t>(a.chunk));
    try {
        for (int64_t group = 0; group < a.num_groups; ++group)
            grid.run(static_cast<int>(group * a.members), static_cast<int>(a.members), static_cast<emulated::Grid::Order>(order), seed,
                     body);
    } catch (const std::exception&) {
        return 1;
    }
    return 0;
}

}  // namespace

extern "C" {

int emulated_sample(const int64_t* words, int order, uint32_t seed) {
    SampleArgs a;
    std::memcpy(&a, words, sizeof a);
    return run(a, 4, order, seed, [&](unsigned char* memory) {
        a.dtype == 0 ? sample_rows<float>(a, memory) : a.dtype == 1 ? sample_rows<Bfloat16>(a, memory) : sample_rows<Float16>(a, memory);
    });
}

int emulated_beam_select(const int64_t* words, int order, uint32_t seed) {
    BeamArgs b;
    std::memcpy(&b, words, sizeof b);
    return run(b.sample, 8, order, seed, [&](unsigned char* memory) {
        b.sample.dtype == 0   ? beam_rows<float>(b, memory)
        : b.sample.dtype == 1 ? beam_rows<Bfloat16>(b, memory)
                              : beam_rows<Float16>(b, memory);
    });
}
}
