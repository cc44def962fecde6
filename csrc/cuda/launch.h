// Host functions of the CUDA sources, as the binding (module.cpp, compiled without nvcc) sees them: raw device pointers, and the CUDA
// stream as an integer (torch.cuda.Stream.cuda_stream; 0 is the default stream). They do not wait for the device, and throw
// std::runtime_error where CUDA reports an error.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/beam.h"

namespace engine::cuda {

struct DeviceInfo {
    std::string name;
    int compute_major, compute_minor;
    int num_sms;
    int64_t memory_bytes;
};

// Empty if a device can be used, else the reason why not.
std::string unavailable();

DeviceInfo device_info(int device);

// out[r, i] = log(E) of token i under seeds[r], positions[r], streams[r]: the noise that the token law subtracts from z (kernels/noise.py),
// bit for bit. `out` is float32 [num_rows, vocab_size], contiguous; seeds int64 and positions, streams int32 are [num_rows], read as bits.
void noise(float* out, const int64_t* seeds, const int32_t* positions, const int32_t* streams, int64_t num_rows, int64_t vocab_size,
           int device, uintptr_t stream);

// How `sample` divides rows among blocks that run at the same time: `members` blocks to a row, with `chunk` tokens each; `num_groups` rows
// at a time. All 0 where no row of so many tokens fits this device. The launch is for a plan of the same device.
struct SamplePlan {
    int64_t members, chunk, num_groups;
};
SamplePlan sample_plan(int64_t rows, int64_t vocab, int device);

// One cooperative launch (sample_kernel.h).
void sample(const SampleArgs& args, int device, uintptr_t stream);

// Likewise for `beam_select` (beam_kernel.h), which needs more shared memory.
SamplePlan beam_plan(int64_t rows, int64_t vocab, int device);
void beam_select(const BeamArgs& args, int device, uintptr_t stream);

}  // namespace engine::cuda
