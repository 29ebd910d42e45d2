#include "lswag/relative_attention.h"

#include <pybind11/pybind11.h>

#include "tensors.h"

namespace py = pybind11;

namespace lswag {
namespace {

// The Python side has checked shapes and dtypes; what it hands over is (heads, rows, columns), scale and threads.
RelativeAttention read_call(Borrowed& borrowed, const py::object& qkv, const py::sequence& tables,
                            const py::tuple& layout, float scale, int threads) {
    RelativeAttention call;
    call.qkv = borrowed.add(qkv);
    const std::vector<Tensor> all = borrowed.add_all(tables);
    if (all.size() != 4) throw py::value_error("expected four tables, got " + std::to_string(all.size()));
    for (int i = 0; i < 4; ++i) call.tables[i] = all[i];
    for (const Tensor& tensor : all)
        if (tensor.dtype != call.qkv.dtype || !tensor.contiguous() || !call.qkv.contiguous())
            throw py::value_error("qkv and the tables must be contiguous and of one dtype");
    call.heads = layout[0].cast<int64_t>();
    call.rows = layout[1].cast<int64_t>();
    call.columns = layout[2].cast<int64_t>();
    call.scale = scale;
    call.threads = threads;
    return call;
}

int64_t forward_bytes(const py::object& qkv, const py::sequence& tables, const py::tuple& layout, int threads) {
    Borrowed borrowed;
    int64_t bytes = 0;
    select_relative_attention_forward_bytes()(read_call(borrowed, qkv, tables, layout, 1, threads), &bytes);
    return bytes;
}

int64_t backward_bytes(const py::object& qkv, const py::sequence& tables, const py::tuple& layout, int threads,
                       bool table_grads) {
    Borrowed borrowed;
    int64_t bytes = 0;
    select_relative_attention_backward_bytes()(read_call(borrowed, qkv, tables, layout, 1, threads), table_grads,
                                               &bytes);
    return bytes;
}

void forward(const py::object& qkv, const py::sequence& tables, const py::tuple& layout, float scale, int threads,
             const py::object& out, const py::object& softmax, const py::object& workspace) {
    Borrowed borrowed;
    const RelativeAttention call = read_call(borrowed, qkv, tables, layout, scale, threads);
    const Tensor outputs[] = {borrowed.add_output(out), borrowed.add_output(softmax), borrowed.add_output(workspace)};
    const auto kernel = select_relative_attention_forward();
    py::gil_scoped_release release;
    kernel(call, outputs[0], outputs[1], outputs[2]);
}

void backward(const py::object& qkv, const py::sequence& tables, const py::tuple& layout, float scale, int threads,
              const py::object& softmax, const py::object& grad_out, const py::object& grad_qkv,
              const py::sequence& table_grads, const py::object& workspace) {
    Borrowed borrowed;
    const RelativeAttention call = read_call(borrowed, qkv, tables, layout, scale, threads);
    const Tensor inputs[] = {borrowed.add(softmax), borrowed.add(grad_out)};
    const Tensor outputs[] = {borrowed.add_output(grad_qkv), borrowed.add_output(workspace)};
    Tensor of_tables[4];
    const bool with_tables = table_grads.size() == 4;
    for (int i = 0; with_tables && i < 4; ++i)
        of_tables[i] = borrowed.add_output(py::reinterpret_borrow<py::object>(table_grads[i]));
    const auto kernel = select_relative_attention_backward();
    py::gil_scoped_release release;
    kernel(call, inputs[0], inputs[1], outputs[0], with_tables ? of_tables : nullptr, outputs[1]);
}

}  // namespace

void register_relative_attention(py::module_& m) {
    m.def("relative_attention_forward_bytes", &forward_bytes, "Bytes of workspace that the forward pass takes.");
    m.def("relative_attention_backward_bytes", &backward_bytes, "Bytes of workspace that the backward pass takes.");
    m.def("relative_attention_forward", &forward,
          "Writes the attention's output and what its softmax subtracts and divides by.");
    m.def("relative_attention_backward", &backward, "Writes the gradients of qkv and, where given, of the tables.");
}

}  // namespace lswag
