// The launch of `beam_select`. Compiled with --fmad=false, which the law needs.
#include <cuda_runtime.h>

#include "cuda/beam_kernel.h"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace engine::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kSampleThreads, 1) beam_kernel(const BeamArgs b) {
    extern __shared__ __align__(16) unsigned char memory[];
    beam_rows<T>(b, memory);
}

const void* kernel_of(int64_t dtype) {
    void (*const kernel)(BeamArgs) = dtype == 0 ? beam_kernel<float> : dtype == 1 ? beam_kernel<Bfloat16> : beam_kernel<Float16>;
    return reinterpret_cast<const void*>(kernel);
}

}  // namespace

SamplePlan beam_plan(int64_t rows, int64_t vocab, int device) {
    const void* kernels[] = {kernel_of(0), kernel_of(1), kernel_of(2)};
    return plan_rows(kernels, 8, rows, vocab, device);
}

void beam_select(const BeamArgs& args, int device, uintptr_t stream) {
    if (args.num_beam_groups == 0 && args.sample.rows == 0) return;
    BeamArgs b = args;
    launch_rows(kernel_of(b.sample.dtype), 8, &b, b.sample, device, stream);
}

}  // namespace engine::cuda
