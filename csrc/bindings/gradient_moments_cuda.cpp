#include "lswag/gradient_moments_cuda.h"

#include <pybind11/pybind11.h>

#include <string>

#include "pattern_arguments.h"

namespace py = pybind11;

namespace lswag {

#if !defined(LSWAG_HAVE_CUDA)

namespace cuda {
bool has_grouped_moments(int) { return false; }
void grouped_moments(const GroupedMoments&, DType, const Queue&) {
    throw py::value_error("this build holds no CUDA kernels");
}
}  // namespace cuda

#endif

namespace {

const int64_t* table(Borrowed& borrowed, const py::object& array, const char* name) {
    const Tensor tensor = borrowed.add(array);
    require(tensor.dtype == DType::int64 && tensor.contiguous(), std::string(name) + " must be contiguous int64");
    return tensor.as<const int64_t>();
}

void grouped_moments(const py::object& problems, const py::object& uses, const py::object& ends,
                     const py::object& magnitudes, const py::object& partials, int problem_count, int first_tile,
                     int end_tile, bool half, uintptr_t stream) {
    Borrowed borrowed(Borrowed::Memory::cuda);
    cuda::GroupedMoments task = {};
    task.problems = table(borrowed, problems, "problems");
    task.uses = table(borrowed, uses, "uses");
    task.ends = table(borrowed, ends, "ends");
    task.magnitudes = reinterpret_cast<const int32_t*>(table(borrowed, magnitudes, "magnitudes"));
    const Tensor sums = borrowed.add_output(partials);
    require(sums.dtype == DType::float64 && sums.numel() >= int64_t{5} * end_tile,
            "partials must be float64, five a row");
    task.partials = sums.as<double>();
    require(problem_count > 0 && first_tile >= 0 && end_tile >= first_tile && (end_tile - first_tile) % 2 == 0,
            "tiles have two rows of partials each");
    task.problem_count = problem_count;
    task.first_tile = first_tile;
    task.end_tile = end_tile;
    const py::gil_scoped_release release;
    cuda::grouped_moments(task, half ? DType::float16 : DType::bfloat16, {borrowed.device(), stream});
}

}  // namespace

void register_gradient_moments_cuda(py::module_& m) {
    m.def("cuda_has_grouped_moments", &cuda::has_grouped_moments, py::arg("device"));
    m.def("cuda_grouped_moments", &grouped_moments, py::arg("problems"), py::arg("uses"), py::arg("ends"),
          py::arg("magnitudes"), py::arg("partials"), py::arg("problem_count"), py::arg("first_tile"),
          py::arg("end_tile"), py::arg("half"), py::arg("stream"));
}

}  // namespace lswag
