// The noise of the token law on the device, from the same source as the CPU's (csrc/common). Compiled with --fmad=false, which the law
// needs.
#include <cuda_runtime.h>

#include "common/fixed_math.h"
#include "common/philox.h"
#include "cuda/error.h"
#include "cuda/launch.h"

namespace engine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

// Grid: x over blocks of four tokens (one Philox call), y over rows.
__global__ void noise_kernel(float* out, const int64_t* seeds, const int32_t* positions, const int32_t* streams, int64_t num_rows,
                             int64_t vocab_size) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (4 * index >= vocab_size) return;
    for (int64_t row = blockIdx.y; row < num_rows; row += gridDim.y) {
        const NoiseKey key{uint64_t(seeds[row]), uint32_t(positions[row]), uint32_t(streams[row])};
        const Philox head = noise_words(key, uint32_t(index), kDomainSample);
        for (int i = 0; i < 4 && 4 * index + i < vocab_size; ++i) {
            const uint32_t word = head.word[i];
            const uint32_t low = word < kTailWords ? noise_words(key, uint32_t(index), kDomainTail).word[i] : 0;
            out[row * vocab_size + 4 * index + i] = fixed_log(noise_exponential(word, low));
        }
    }
}

}  // namespace

void noise(float* out, const int64_t* seeds, const int32_t* positions, const int32_t* streams, int64_t num_rows, int64_t vocab_size,
           int device, uintptr_t stream) {
    if (num_rows == 0 || vocab_size == 0) return;
    const DeviceGuard guard(device);
    const int64_t blocks = (vocab_size + 4 * kThreads - 1) / (4 * kThreads);
    const dim3 grid(unsigned(blocks), unsigned(num_rows < kMaxGridY ? num_rows : kMaxGridY));
    noise_kernel<<<grid, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(out, seeds, positions, streams, num_rows, vocab_size);
    check(cudaGetLastError(), "noise");
}

}  // namespace engine::cuda
