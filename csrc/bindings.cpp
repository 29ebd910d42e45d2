// The extension module lswag_fast._C: one registration per op, each in csrc/bindings/<op>.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "lswag/dispatch.h"

namespace py = pybind11;

namespace lswag {

void register_activation_patterns(py::module_& m);
void register_activation_patterns_cuda(py::module_& m);
void register_channel_saliency(py::module_& m);
void register_device_numbers_cuda(py::module_& m);
void register_gradient_moments(py::module_& m);
void register_gradient_moments_cuda(py::module_& m);
void register_relative_attention(py::module_& m);

}  // namespace lswag

using namespace lswag;

namespace {

std::vector<std::string> cpu_paths() {
    std::vector<std::string> names;
    for (int i = 0; i < kIsaCount; ++i)
        if (isa_supported(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
    return names;
}

std::string build_info() {
    std::string text = "compiler " __VERSION__;
#if defined(_OPENMP)
    text += ", OpenMP " + std::to_string(_OPENMP);
#else
    text += ", no OpenMP";
#endif
    return text;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of lswag_fast. Import torch first: its OpenMP runtime is the one that is used.";
    m.def("cpu_paths", &cpu_paths, "The instruction sets that this machine runs, narrowest first.");
    m.def("cpu_path", [] { return std::string(isa_name(active_isa())); }, "The instruction set in use (LSWAG_CPU).");
    m.def("cpu_has_bf16", [] { return active_isa() == Isa::avx512_bf16; }, "Whether bf16 dot products are in use.");
    m.def("build_info", &build_info, "The compiler and the threading runtime of this build.");
    m.def(
        "cuda_kernels",
        [] {
#if defined(LSWAG_HAVE_CUDA)
            return true;
#else
            return false;
#endif
        },
        "Whether this build holds CUDA kernels.");
    register_activation_patterns(m);
    register_activation_patterns_cuda(m);
    register_channel_saliency(m);
    register_device_numbers_cuda(m);
    register_gradient_moments(m);
    register_gradient_moments_cuda(m);
    register_relative_attention(m);
}
