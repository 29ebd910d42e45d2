#include "lswag/device_numbers_cuda.h"

#include <pybind11/pybind11.h>

#include "pattern_arguments.h"

namespace py = pybind11;

namespace lswag {

#if !defined(LSWAG_HAVE_CUDA)

namespace cuda {
void write_numbers(const int64_t*, int64_t, int64_t*, const Queue&) {
    throw py::value_error("this build holds no CUDA kernels");
}
}  // namespace cuda

#endif

namespace {

void write(const py::object& numbers, const py::object& out, uintptr_t stream) {
    Borrowed here, there(Borrowed::Memory::cuda);
    const Tensor from = here.add(numbers);
    require(from.dtype == DType::int64 && from.contiguous(), "numbers must be contiguous int64");
    int64_t* const to = buffer(there, out, from.numel(), "out");
    const py::gil_scoped_release release;
    cuda::write_numbers(from.as<const int64_t>(), from.numel(), to, {there.device(), stream});
}

}  // namespace

void register_device_numbers_cuda(py::module_& m) {
    m.def("cuda_write_numbers", &write, py::arg("numbers"), py::arg("out"), py::arg("stream"));
}

}  // namespace lswag
