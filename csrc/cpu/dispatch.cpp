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
const Kernels& avx512_with_vnni() {
    static const Kernels table = [] {
        Kernels k = avx512::kernels();
        k.linear_int = avx512vnni::linear_int;
        return k;
    }();
    return table;
}
const Kernels& avx512_with_bf16() {  // every processor that has it has VNNI
    static const Kernels table = [] {
        Kernels k = avx512_with_vnni();
        k.linear_panels = avx512bf16::linear_panels;
        return k;
    }();
    return table;
}
#endif

const Kernels* table(const std::string& isa) {
#if defined(__x86_64__)
    if (isa == "avx2") return &avx2::kernels();
    if (isa == "avx512") return &avx512::kernels();
    if (isa == "avx512vnni") return &avx512_with_vnni();
    if (isa == "avx512bf16") return &avx512_with_bf16();
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
            if (__builtin_cpu_supports("avx512vnni")) {
                names.push_back("avx512vnni");
                if (__builtin_cpu_supports("avx512bf16")) names.push_back("avx512bf16");
            }
        }
    }
#endif
    return names;
}

const std::string& active_isa() { return choice().isa; }
const Kernels& active() { return *choice().kernels; }

void linear(const LinearArgs& args) {
    const Kernels& kernels = active();
    if (args.format <= kRowsF16) return kernels.linear_rows(args);
    if (args.format <= kPanelsF16) return kernels.linear_panels(args);
    kernels.linear_int(args);
}

}  // namespace engine
