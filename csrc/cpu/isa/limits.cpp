// The machine's limits, measured: how fast all threads together read memory, and how many multiply-adds they do. Called by
// kernels/limits.py for the yardstick of benchmarks and of the command line.
#include "../kernels.h"
#include "../thread_pool.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {

static const int kChains = 10;  // independent accumulators: more than latency x throughput asks for, few enough to stay in registers

// Reads `count` floats once; returns their sum so that the reads cannot be dropped.
float read_floats(const float* data, int64_t count) {
    const int64_t grain = int64_t(1) << 16;
    const int64_t chunks = (count + grain - 1) / grain;
    float* sums = static_cast<float*>(scratch(kCallScratch, chunks * int64_t(sizeof(float))));
    parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
            const float* p = data + c * grain;
            const int64_t n = c + 1 < chunks ? grain : count - c * grain;
            VecF acc[4] = {zero(), zero(), zero(), zero()};
            int64_t i = 0;
            for (; i + 4 * kLanes <= n; i += 4 * kLanes)
                for (int a = 0; a < 4; ++a) acc[a] = add(acc[a], load(p + i + a * kLanes));
            float sum = reduce_add(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
            for (; i < n; ++i) sum += p[i];
            sums[c] = sum;
        }
    });
    float sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += sums[c];
    return sum;
}

// `rounds` rounds of kChains vector multiply-adds in each of `tasks` tasks; returns the floating-point operations done.
int64_t multiply_adds(int64_t tasks, int64_t rounds) {
    float* sink = static_cast<float*>(scratch(kCallScratch, tasks * int64_t(sizeof(float))));
    parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const VecF factor = set1(0.999f), addend = set1(0.5f);
            VecF acc[kChains];
            for (int c = 0; c < kChains; ++c) acc[c] = set1(float(c + 1));
            for (int64_t r = 0; r < rounds; ++r)
                for (int c = 0; c < kChains; ++c) acc[c] = fma(acc[c], factor, addend);
            for (int c = 1; c < kChains; ++c) acc[0] = add(acc[0], acc[c]);
            sink[t] = reduce_add(acc[0]);
        }
    });
    return tasks * rounds * kChains * kLanes * 2;
}

}  // namespace ENGINE_ISA
}  // namespace engine
