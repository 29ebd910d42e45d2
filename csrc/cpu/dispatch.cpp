#include "lswag/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(LSWAG_X86)
#include <cpuid.h>
#endif

namespace lswag {
namespace {

#if defined(LSWAG_X86)
// Not every supported compiler's __builtin_cpu_supports knows this name.
bool has_f16c() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
}
#endif

Isa choose() {
    const char* wanted = std::getenv("LSWAG_CPU");
    if (wanted == nullptr || *wanted == '\0') {
        for (int i = kIsaCount - 1; i > 0; --i)
            if (isa_supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
        return Isa::generic;
    }
    std::string names;
    for (int i = 0; i < kIsaCount; ++i) {
        const Isa isa = static_cast<Isa>(i);
        if (!isa_supported(isa)) continue;
        if (isa_name(isa) == std::string(wanted)) return isa;
        names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
    }
    throw std::runtime_error("LSWAG_CPU=" + std::string(wanted) + " is not one of what this machine runs: " + names);
}

}  // namespace

const char* isa_name(Isa isa) {
    static const char* const names[kIsaCount] = {"generic", "avx2", "avx512", "avx512-bf16"};
    return names[static_cast<int>(isa)];
}

bool isa_supported(Isa isa) {
    if (isa == Isa::generic) return true;
#if defined(LSWAG_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == Isa::avx2) return avx2;
    if (isa == Isa::avx512) return avx512;
    return avx512 && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

Isa active_isa() {
    static const Isa isa = choose();
    return isa;
}

}  // namespace lswag
