// Which of the compiled instruction sets runs. A kernel is declared once with LSWAG_KERNEL, defined once in
// csrc/cpu/<op>.cpp inside `namespace lswag::LSWAG_ISA`, compiled once per instruction set, and called
// as `select_<name>()(arguments)`.
#pragma once

namespace lswag {

enum class Isa { generic, avx2, avx512, avx512_bf16 };

constexpr int kIsaCount = 4;

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // compiled in, and the processor and its operating system have it

// The widest supported set, or the one that the environment variable LSWAG_CPU names. Throws std::runtime_error
// where that names none, or one that this machine lacks.
Isa active_isa();

}  // namespace lswag

#if defined(LSWAG_X86)
#define LSWAG_KERNEL(name, ...)                       \
    namespace generic {                               \
    void name(__VA_ARGS__);                           \
    }                                                 \
    namespace avx2 {                                  \
    void name(__VA_ARGS__);                           \
    }                                                 \
    namespace avx512 {                                \
    void name(__VA_ARGS__);                           \
    }                                                 \
    namespace avx512_bf16 {                           \
    void name(__VA_ARGS__);                           \
    }                                                 \
    inline decltype(&generic::name) select_##name() { \
        switch (active_isa()) {                       \
            case Isa::avx2:                           \
                return &avx2::name;                   \
            case Isa::avx512:                         \
                return &avx512::name;                 \
            case Isa::avx512_bf16:                    \
                return &avx512_bf16::name;            \
            default:                                  \
                return &generic::name;                \
        }                                             \
    }
#else
#define LSWAG_KERNEL(name, ...) \
    namespace generic {         \
    void name(__VA_ARGS__);     \
    }                           \
    inline decltype(&generic::name) select_##name() { return &generic::name; }
#endif
