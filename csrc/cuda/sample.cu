// The launch of `sample`, and how many blocks share a row. Compiled with --fmad=false, which the law needs.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/error.h"
#include "cuda/launch.h"
#include "cuda/sample_kernel.h"

namespace engine::cuda {
namespace {

constexpr int64_t kLeastTokens = 2048;  // of a block, where there are blocks to spare: four for each thread

template <class T>
__global__ void __launch_bounds__(kSampleThreads, 2) sample_kernel(const SampleArgs a) {
    extern __shared__ __align__(16) unsigned char memory[];
    sample_rows<T>(a, memory);
}

using Kernel = void (*)(SampleArgs);

Kernel kernel_of(int64_t dtype) {
    return dtype == 0 ? sample_kernel<float> : dtype == 1 ? sample_kernel<Bfloat16> : sample_kernel<Float16>;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of shared memory of a block.
int64_t shared_bytes(int64_t chunk) { return int64_t(sizeof(Shared)) + 4 * chunk; }

int64_t most_tokens(int64_t bytes) { return std::min((bytes - int64_t(sizeof(Shared))) / 4 / kChunkMultiple * kChunkMultiple, kMaxChunk); }

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "sample_plan");
    return value;
}

}  // namespace

SamplePlan sample_plan(int64_t rows, int64_t vocab, int device) {
    const DeviceGuard guard(device);
    const int64_t sms = attribute(cudaDevAttrMultiProcessorCount, device);
    const int64_t of_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                  of_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                  reserved = attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
    // Two blocks to a multiprocessor, so that one loads while the other waits; if the row is too large for that, one.
    for (const int64_t bytes : {std::min(of_sm / 2 - reserved, of_block), of_block}) {
        const int64_t most = most_tokens(bytes);
        if (most < kChunkMultiple) continue;
        int64_t members = std::max(ceil_div(vocab, most), std::min(sms / std::max<int64_t>(rows, 1), ceil_div(vocab, kLeastTokens)));
        members = std::min<int64_t>(std::max<int64_t>(members, 1), kMaxMembers);
        const int64_t chunk = ceil_div(ceil_div(vocab, members), kChunkMultiple) * kChunkMultiple;
        if (chunk > most) continue;
        members = ceil_div(vocab, chunk);
        int64_t capacity = sms * 2;  // of blocks at the same time
        for (int64_t dtype = 0; dtype < 3; ++dtype) {
            check(cudaFuncSetAttribute(kernel_of(dtype), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes(most))),
                  "sample_plan");
            int blocks = 0;
            check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_of(dtype), kSampleThreads, size_t(shared_bytes(chunk))),
                  "sample_plan");
            capacity = std::min(capacity, blocks * sms);
        }
        if (capacity < members) continue;
        return {members, chunk, std::min(std::max<int64_t>(rows, 1), capacity / members)};
    }
    return {0, 0, 0};
}

void sample(const SampleArgs& args, int device, uintptr_t stream) {
    if (args.rows == 0) return;
    const DeviceGuard guard(device);
    SampleArgs a = args;
    void* arguments[] = {&a};
    check(
        cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel_of(a.dtype)), dim3(unsigned(a.num_groups * a.members)),
                                    dim3(kSampleThreads), arguments, size_t(shared_bytes(a.chunk)), reinterpret_cast<cudaStream_t>(stream)),
        "sample");
}

}  // namespace engine::cuda
