// How blocks share rows of logits, and their cooperative launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/error.h"
#include "cuda/launch.h"
#include "cuda/sample_block.h"

namespace engine::cuda {

constexpr int64_t kLeastTokens = 2048;  // of a block, where there are blocks to spare: four for each thread

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `kernels`: those of an op, one for each dtype, any of which may be launched; `token_bytes`: of shared memory for each token of a block.
inline SamplePlan plan_rows(const void* const (&kernels)[3], int64_t token_bytes, int64_t rows, int64_t vocab, int device) {
    const DeviceGuard guard(device);
    const auto attribute = [device](cudaDeviceAttr name) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, name, device), "plan");
        return int64_t{value};
    };
    const int64_t sms = attribute(cudaDevAttrMultiProcessorCount), fixed = int64_t(sizeof(Shared));
    const int64_t of_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                  of_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                  reserved = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
    rows = std::max<int64_t>(rows, 1);
    for (const void* kernel : kernels) {
        // The most that any plan asks for: plans are kept, and one must not take from another.
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(of_block)), "plan");
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), "plan");
    }
    // Two blocks to a multiprocessor, so that one loads while the other waits; if the row is too large for that, one.
    for (const int64_t bytes : {std::min(of_sm / 2 - reserved, of_block), of_block}) {
        const int64_t most = std::min((bytes - fixed) / token_bytes / kChunkMultiple * kChunkMultiple, kMaxChunk);
        if (most < kChunkMultiple) continue;
        int64_t members = std::max(ceil_div(vocab, most), std::min(sms / rows, ceil_div(vocab, kLeastTokens)));
        members = std::min<int64_t>(members, kMaxMembers);
        const int64_t chunk = ceil_div(ceil_div(vocab, members), kChunkMultiple) * kChunkMultiple;
        if (chunk > most) continue;
        members = ceil_div(vocab, chunk);
        int64_t capacity = 2 * sms;  // of blocks at the same time
        for (const void* kernel : kernels) {
            int blocks = 0;
            check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kSampleThreads, size_t(fixed + token_bytes * chunk)),
                  "plan");
            capacity = std::min(capacity, blocks * sms);
        }
        if (capacity >= members) return {members, chunk, std::min(rows, capacity / members)};
    }
    return {0, 0, 0};
}

// `arguments`: the kernel's only one, of which `a` is a part.
inline void launch_rows(const void* kernel, int64_t token_bytes, void* arguments, const SampleArgs& a, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    const size_t shared_bytes = sizeof(Shared) + size_t(token_bytes * a.chunk);
    check(cudaLaunchCooperativeKernel(kernel, dim3(unsigned(a.num_groups * a.members)), dim3(kSampleThreads), &arguments, shared_bytes,
                                      reinterpret_cast<cudaStream_t>(stream)),
          "launch");
}

}  // namespace engine::cuda
