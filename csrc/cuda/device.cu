// What the device is, or why there is none.
#include <cuda_runtime.h>

#include "cuda/error.h"
#include "cuda/launch.h"

namespace engine::cuda {

std::string unavailable() {
    int count = 0, driver = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    // CUDA calls a driver that is absent "insufficient".
    if (status == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) {
        return "there is no NVIDIA driver";
    }
    if (status != cudaSuccess) return cudaGetErrorString(status);
    return count > 0 ? "" : "there is no CUDA device";
}

DeviceInfo device_info(int device) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), "device_info");
    return {properties.name, properties.major, properties.minor, properties.multiProcessorCount, int64_t(properties.totalGlobalMem)};
}

}  // namespace engine::cuda
