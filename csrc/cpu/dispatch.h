// Which instruction set's kernels this process runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace engine {

// Compiled in and runnable on this CPU and operating system, slowest first.
std::vector<std::string> supported_isas();

// The chosen one: ENGINE_CPU_ISA if set (std::runtime_error when unknown or not runnable here), else the last of supported_isas. The tests
// of all of them have run on such hardware (docs/hardware-status.md); one whose tests have not must not be chosen here.
const std::string& active_isa();
const Kernels& active();

// The product of args.format by the active kernels.
void linear(const LinearArgs& args);

}  // namespace engine
