#include "linear.h"
namespace engine {
namespace ENGINE_ISA {
void linear_panels(const LinearArgs&) {}
}  // namespace ENGINE_ISA
}  // namespace engine
