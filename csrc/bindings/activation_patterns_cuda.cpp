#include "lswag/activation_patterns_cuda.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "pattern_arguments.h"

namespace py = pybind11;

namespace lswag {

#if !defined(LSWAG_HAVE_CUDA)

// The module has the same functions in every build.
namespace cuda {
namespace {
[[noreturn]] void absent() { throw py::value_error("this build holds no CUDA kernels"); }
}  // namespace
void pack_signs(const SignPacking&, const Queue&) { absent(); }
int64_t count_workspace(const std::vector<int64_t>&) { absent(); }
void count_patterns(const PatternSet&, int64_t*, int64_t*, const Queue&) { absent(); }
int64_t agreement_workspace(int64_t) { absent(); }
void count_agreements(const PatternSet&, int64_t*, int64_t*, const Queue&) { absent(); }
}  // namespace cuda

#endif

namespace {

void pack(const py::object& pre, const py::object& post, const py::object& words, int activation, int64_t first_sample,
          int64_t packed_samples, bool accumulate, uintptr_t stream) {
    Borrowed borrowed(Borrowed::Memory::cuda);
    const SignPacking task =
        packing_task(borrowed, pre, post, words, activation, first_sample, packed_samples, accumulate);
    const py::gil_scoped_release release;
    cuda::pack_signs(task, {borrowed.device(), stream});
}

int64_t count_workspace(const std::vector<int64_t>& positions) {
    const int64_t numel = cuda::count_workspace(positions);
    require(numel >= 0, "fewer than 2^31 positions can be counted");
    return numel;
}

void count(const py::sequence& arrays, int64_t samples, const py::object& counts, const py::object& workspace,
           uintptr_t stream) {
    Words words(arrays, samples, Borrowed::Memory::cuda);
    require(!words.pointers.empty(), "there are no words to count");
    require(samples <= 1024, "samples must be at most 1024");
    int64_t* const out = buffer(words.borrowed, counts, 1 + static_cast<int64_t>(words.pointers.size()), "counts");
    int64_t* const space = buffer(words.borrowed, workspace, count_workspace(words.positions), "workspace");
    const py::gil_scoped_release release;
    cuda::count_patterns(words.set(), out, space, {words.borrowed.device(), stream});
}

void agreements(const py::sequence& arrays, int64_t samples, const py::object& out, const py::object& workspace,
                uintptr_t stream) {
    Words words(arrays, samples, Borrowed::Memory::cuda);
    require(!words.pointers.empty(), "there are no words to compare");
    require(samples <= 1024, "samples must be at most 1024");
    int64_t* const kernel = buffer(words.borrowed, out, samples * samples, "out");
    const int64_t numel = cuda::agreement_workspace(static_cast<int64_t>(words.pointers.size()));
    int64_t* const space = buffer(words.borrowed, workspace, numel, "workspace");
    const py::gil_scoped_release release;
    cuda::count_agreements(words.set(), kernel, space, {words.borrowed.device(), stream});
}

}  // namespace

void register_activation_patterns_cuda(py::module_& m) {
    m.def("cuda_pack_signs", &pack, py::arg("pre"), py::arg("post"), py::arg("words"), py::arg("activation"),
          py::arg("first_sample"), py::arg("packed_samples"), py::arg("accumulate"), py::arg("stream"));
    m.def("cuda_count_workspace", &count_workspace, py::arg("positions"));
    m.def("cuda_count_patterns", &count, py::arg("words"), py::arg("samples"), py::arg("counts"), py::arg("workspace"),
          py::arg("stream"));
    m.def("cuda_agreement_workspace", &cuda::agreement_workspace, py::arg("activations"));
    m.def("cuda_count_agreements", &agreements, py::arg("words"), py::arg("samples"), py::arg("out"),
          py::arg("workspace"), py::arg("stream"));
}

}  // namespace lswag
