// Which instruction set's kernels this process runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace engine {

// Compiled in and runnable on this CPU and operating system, slowest first.
std::vector<std::string> supported_isas();

// The chosen one: ENGINE_CPU_ISA if set (std::runtime_error when unknown or not runnable here), else the fastest whose tests have run on
// such hardware. avx512 is not among those yet, so only ENGINE_CPU_ISA=avx512 selects it.
const std::string& active_isa();
const Kernels& active();

}  // namespace engine
