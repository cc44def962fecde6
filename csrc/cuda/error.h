// Errors of the CUDA runtime as exceptions, and the current device for the length of a scope.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace engine::cuda {

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": CUDA says: " + cudaGetErrorString(status));
}

class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "DeviceGuard");
        if (device != previous_) check(cudaSetDevice(device), "DeviceGuard");
    }
    ~DeviceGuard() { cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
};

}  // namespace engine::cuda
