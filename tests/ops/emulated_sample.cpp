// The kernel of `sample` on an emulated grid, as a library for `emulated.py`: the same words as the binding takes, and an order of threads.
#include "cuda/sample_kernel.h"

using namespace engine::cuda;

namespace {

template <class T>
void run(const SampleArgs& a, emulated::Grid::Order order, uint32_t seed) {
    emulated::Grid grid(kSampleThreads, sizeof(Shared) + 4 * static_cast<size_t>(a.chunk));
    for (int64_t group = 0; group < a.num_groups; ++group)  // groups know nothing of each other
        grid.run(static_cast<int>(group * a.members), static_cast<int>(a.members), order, seed,
                 [&](unsigned char* memory) { sample_rows<T>(a, memory); });
}

}  // namespace

extern "C" {

int64_t row_group_bytes() { return sizeof(RowGroup); }

// 0, or 1 where the kernel would hang.
int emulated_sample(const int64_t* words, int order, uint32_t seed) {
    SampleArgs a;
    std::memcpy(&a, words, sizeof a);
    try {
        if (a.dtype == 0) run<float>(a, static_cast<emulated::Grid::Order>(order), seed);
        if (a.dtype == 1) run<Bfloat16>(a, static_cast<emulated::Grid::Order>(order), seed);
        if (a.dtype == 2) run<Float16>(a, static_cast<emulated::Grid::Order>(order), seed);
    } catch (const std::exception&) {
        return 1;
    }
    return 0;
}
}
