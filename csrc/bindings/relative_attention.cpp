#include "lswag/relative_attention.h"

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "tensors.h"

namespace py = pybind11;

namespace lswag {
namespace {

void require(bool condition, const std::string& message) {
    if (!condition) throw py::value_error(message);
}

void require_shape(const Tensor& tensor, DType dtype, std::initializer_list<int64_t> shape, const char* name) {
    bool same = tensor.dtype == dtype && tensor.contiguous() && tensor.ndim == static_cast<int>(shape.size());
    int axis = 0;
    for (const int64_t size : shape) same = same && tensor.shape[axis++] == size;
    require(same, std::string(name) + " must be contiguous, of the dtype and shape that the call writes or reads");
}

// The layout is (heads, rows, columns). The Python side has checked all of this, with better messages.
RelativeAttention read_call(Borrowed& borrowed, const py::object& qkv, const py::sequence& tables,
                            const py::tuple& layout, float scale, int threads) {
    RelativeAttention call;
    call.qkv = borrowed.add(qkv);
    const std::vector<Tensor> all = borrowed.add_all(tables);
    if (all.size() != 4) throw py::value_error("expected four tables, got " + std::to_string(all.size()));
    for (int i = 0; i < 4; ++i) call.tables[i] = all[i];
    call.heads = layout[0].cast<int64_t>();
    call.rows = layout[1].cast<int64_t>();
    call.columns = layout[2].cast<int64_t>();
    call.scale = scale;
    call.threads = threads;
    const Tensor& q = call.qkv;
    require(q.dtype == DType::float32 || q.dtype == DType::bfloat16 || q.dtype == DType::float16,
            "qkv must be float32, bfloat16 or float16");
    require(call.heads > 0 && call.rows > 0 && call.columns > 0 && threads > 0 && q.ndim == 3,
            "expected qkv [S, T, 3*H*D], and heads, a grid and threads of 1 or more");
    require(q.shape[2] > 0 && q.shape[2] % (3 * call.heads) == 0, "expected qkv whose last size divides by 3*H");
    require_shape(q, q.dtype, {q.shape[0], 1 + call.rows * call.columns, q.shape[2]}, "qkv");
    for (const Tensor& table : call.tables) {
        require(table.ndim == 2 && table.shape[0] >= 2 && table.shape[0] % 2 == 0, "expected tables [2*L+2, D]");
        require_shape(table, q.dtype, {table.shape[0], q.shape[2] / (3 * call.heads)}, "a table");
    }
    return call;
}

void require_out(const RelativeAttention& call, const Tensor& out, const char* name) {
    require_shape(out, call.qkv.dtype, {call.qkv.shape[0], call.qkv.shape[1], call.qkv.shape[2] / 3}, name);
}

void require_softmax(const RelativeAttention& call, const Tensor& softmax) {
    require_shape(softmax, DType::float32, {call.qkv.shape[0], call.heads, call.qkv.shape[1], 2}, "softmax");
}

void require_workspace(const Tensor& workspace, int64_t bytes) {
    require(workspace.dtype == DType::uint8 && workspace.numel() >= bytes,
            "expected a uint8 workspace of " + std::to_string(bytes) + " bytes");
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
    int64_t bytes = 0;
    select_relative_attention_forward_bytes()(call, &bytes);
    require_out(call, outputs[0], "out");
    require_softmax(call, outputs[1]);
    require_workspace(outputs[2], bytes);
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
    require(table_grads.size() == 0 || table_grads.size() == 4, "expected the gradients of no table, or of four");
    const bool with_tables = table_grads.size() == 4;
    for (int i = 0; with_tables && i < 4; ++i) {
        of_tables[i] = borrowed.add_output(py::reinterpret_borrow<py::object>(table_grads[i]));
        const Tensor& table = call.tables[i];
        require_shape(of_tables[i], table.dtype, {table.shape[0], table.shape[1]}, "the gradient of a table");
    }
    int64_t bytes = 0;
    select_relative_attention_backward_bytes()(call, with_tables, &bytes);
    require_softmax(call, inputs[0]);
    require_out(call, inputs[1], "grad_out");
    require_shape(outputs[0], call.qkv.dtype, {call.qkv.shape[0], call.qkv.shape[1], call.qkv.shape[2]}, "grad_qkv");
    require_workspace(outputs[1], bytes);
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
