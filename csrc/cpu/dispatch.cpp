#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace engine {
namespace {

struct Choice {
    std::string isa;
    const Kernels* kernels;
};

#if defined(__x86_64__)
Kernels with(Kernels kernels, void (*linear_int)(const LinearArgs&)) {
    kernels.linear_int = linear_int;
    return kernels;
}
#endif

const Kernels* table(const std::string& isa) {
#if defined(__x86_64__)
    if (isa == "avx2") return &avx2::kernels();
    if (isa == "avx512") return &avx512::kernels();
    static const Kernels avx512vnni = with(avx512::kernels(), avx512vnni::linear_int);
    if (isa == "avx512vnni") return &avx512vnni;
#endif
    return isa == "portable" ? &portable::kernels() : nullptr;
}

Choice choose() {
    const std::vector<std::string> runnable = supported_isas();
    if (const char* forced = std::getenv("ENGINE_CPU_ISA"); forced != nullptr && *forced != '\0') {
        std::string names;
        for (const std::string& isa : runnable) {
            if (isa == forced) return {isa, table(isa)};
            names += (names.empty() ? "" : ", ") + isa;
        }
        throw std::runtime_error("ENGINE_CPU_ISA is '" + std::string(forced) + "', but this CPU runs only: " + names);
    }
    return {runnable.back(), table(runnable.back())};
}

const Choice& choice() {
    static const Choice chosen = choose();
    return chosen;
}

}  // namespace

std::vector<std::string> supported_isas() {
    std::vector<std::string> names = {"portable"};
#if defined(__x86_64__)
    __builtin_cpu_init();  // the builtin also asks XGETBV whether the operating system saves the wide registers
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1) != 0;  // older compilers know no "f16c"
    if (f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        names.push_back("avx2");
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512dq")) {
            names.push_back("avx512");
            if (__builtin_cpu_supports("avx512vnni")) names.push_back("avx512vnni");
        }
    }
#endif
    return names;
}

const std::string& active_isa() { return choice().isa; }
const Kernels& active() { return *choice().kernels; }

}  // namespace engine
