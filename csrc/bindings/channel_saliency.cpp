#include "lswag/channel_saliency.h"

#include <pybind11/pybind11.h>

#include "tensors.h"

namespace py = pybind11;

namespace lswag {
namespace {

bool is_float(DType dtype) { return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16; }

void sum_channels(const py::object& outputs, const py::object& output_grads, const py::object& sums, int threads) {
    Borrowed borrowed;
    ChannelSaliency task;
    task.outputs = borrowed.add(outputs);
    task.output_grads = borrowed.add(output_grads);
    task.threads = threads;
    const Tensor &y = task.outputs, &d = task.output_grads, out = borrowed.add_output(sums);
    if (y.ndim != 3 || d.ndim != 3 || y.dtype != d.dtype || !is_float(y.dtype))
        throw py::value_error("expected outputs and output_grads [S, positions, C] in one floating dtype");
    for (int axis = 0; axis < 3; ++axis)
        if (y.shape[axis] != d.shape[axis]) throw py::value_error("expected output_grads in the shape of outputs");
    if (out.dtype != DType::float64 || out.numel() != y.shape[0] * y.shape[2] || threads < 1)
        throw py::value_error("expected float64 sums [S, C], and a thread or more");
    task.sums = out.as<double>();
    const py::gil_scoped_release release;
    select_channel_saliency()(task);
}

}  // namespace

void register_channel_saliency(py::module_& m) {
    m.def("channel_saliency", &sum_channels, py::arg("outputs"), py::arg("output_grads"), py::arg("sums"),
          py::arg("threads"));
}

}  // namespace lswag
