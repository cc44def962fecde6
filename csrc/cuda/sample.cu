// The launch of `sample`. Compiled with --fmad=false, which the law needs.
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/sample_kernel.h"

namespace engine::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kSampleThreads, 2) sample_kernel(const SampleArgs a) {
    extern __shared__ __align__(16) unsigned char memory[];
    sample_rows<T>(a, memory);
}

const void* kernel_of(int64_t dtype) {
    void (*const kernel)(SampleArgs) = dtype == 0 ? sample_kernel<float> : dtype == 1 ? sample_kernel<Bfloat16> : sample_kernel<Float16>;
    return reinterpret_cast<const void*>(kernel);
}

}  // namespace

SamplePlan sample_plan(int64_t rows, int64_t vocab, int device) {
    const void* kernels[] = {kernel_of(0), kernel_of(1), kernel_of(2)};
    return plan_rows(kernels, 4, rows, vocab, device);
}

void sample(const SampleArgs& args, int device, uintptr_t stream) {
    if (args.rows == 0) return;
    SampleArgs a = args;
    launch_rows(kernel_of(a.dtype), 4, &a, a, device, stream);
}

}  // namespace engine::cuda
