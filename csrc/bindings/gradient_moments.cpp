#include "lswag/gradient_moments.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "tensors.h"

namespace py = pybind11;

namespace lswag {
namespace {

// kernel, stride, padding and dilation of a convolution, two each, and its groups.
using ConvolutionValues = std::array<int64_t, 9>;

struct Convolution {
    std::array<int64_t, 2> kernel, stride, padding, dilation;
    int64_t groups;

    explicit Convolution(const ConvolutionValues& v)
        : kernel{v[0], v[1]}, stride{v[2], v[3]}, padding{v[4], v[5]}, dilation{v[6], v[7]}, groups(v[8]) {}
};

// Rows are all dimensions between the first (samples) and the last (columns), merged where memory allows.
GradientOperand linear_operand(const Tensor& tensor) {
    GradientOperand operand;
    operand.tensor = tensor;
    operand.sample_stride = tensor.strides[0];
    operand.column_shape[2] = tensor.shape[tensor.ndim - 1];
    operand.column_strides[2] = tensor.strides[tensor.ndim - 1];
    for (int d = 1; d + 1 < tensor.ndim; ++d) {
        const int last = operand.row_dims - 1;
        if (last >= 0 && operand.row_strides[last] == tensor.strides[d] * tensor.shape[d]) {
            operand.row_shape[last] *= tensor.shape[d];
            operand.row_strides[last] = tensor.strides[d];
        } else {
            operand.row_shape[operand.row_dims] = tensor.shape[d];
            operand.row_strides[operand.row_dims++] = tensor.strides[d];
        }
    }
    return operand;
}

// [S, C, H, W] with output positions for rows and the channels of one group for columns.
GradientOperand plane_operand(const Tensor& tensor, int64_t groups) {
    GradientOperand operand;
    operand.tensor = tensor;
    operand.sample_stride = tensor.strides[0];
    operand.channel_group_stride = tensor.strides[1] * (tensor.shape[1] / groups);
    operand.row_dims = 2;
    for (int axis = 0; axis < 2; ++axis) {
        operand.row_shape[axis] = tensor.shape[2 + axis];
        operand.row_strides[axis] = tensor.strides[2 + axis];
    }
    operand.column_shape[2] = tensor.shape[1] / groups;
    operand.column_strides[2] = tensor.strides[1];
    return operand;
}

bool reaches_outside(const PlaneAxis& axis, int64_t rows, int64_t taps) {
    return axis.pad > 0 || (rows - 1) * axis.row_step + (taps - 1) * axis.column_step - axis.pad >= axis.size;
}

void pad(GradientOperand& operand, int axis, const Convolution& convolution, int64_t taps) {
    PlaneAxis& plane = operand.axes[axis];
    const int64_t stride = operand.tensor.strides[2 + axis];
    plane.size = operand.tensor.shape[2 + axis];
    plane.pad = convolution.padding[axis];
    operand.row_strides[axis] = stride * plane.row_step;
    operand.offset -= stride * plane.pad;
    operand.padded = operand.padded || reaches_outside(plane, operand.row_shape[axis], taps);
}

// The inputs of a convolution: columns are channels x taps, in the order that lies closest in memory.
GradientOperand window_operand(const Tensor& inputs, const Tensor& output_grads, const Convolution& convolution,
                               bool taps_first) {
    GradientOperand operand = plane_operand(inputs, convolution.groups);
    const int channel_dim = taps_first ? 2 : 0;
    operand.column_shape[channel_dim] = inputs.shape[1] / convolution.groups;
    operand.column_strides[channel_dim] = inputs.strides[1];
    for (int axis = 0; axis < 2; ++axis) {
        const int dim = taps_first ? axis : 1 + axis;
        operand.row_shape[axis] = output_grads.shape[2 + axis];
        operand.column_shape[dim] = convolution.kernel[axis];
        operand.column_strides[dim] = inputs.strides[2 + axis] * convolution.dilation[axis];
        operand.axes[axis].row_step = convolution.stride[axis];
        operand.axes[axis].column_step = convolution.dilation[axis];
        operand.axes[axis].column_dim = dim;
        pad(operand, axis, convolution, convolution.kernel[axis]);
    }
    return operand;
}

// The inputs of a depthwise convolution: every position of the padded plane that a tap reads.
GradientOperand depthwise_operand(const Tensor& inputs, const Tensor& output_grads, const Convolution& convolution) {
    GradientOperand operand = plane_operand(inputs, 1);
    for (int axis = 0; axis < 2; ++axis) {
        operand.row_shape[axis] = (output_grads.shape[2 + axis] - 1) * convolution.stride[axis] +
                                  (convolution.kernel[axis] - 1) * convolution.dilation[axis] + 1;
        operand.axes[axis].row_step = 1;
        pad(operand, axis, convolution, 1);
    }
    return operand;
}

// One call: the plan over borrowed tensors, which are let go with it. Shapes are checked by the caller.
class Moments {
 public:
    Moments(const py::sequence& inputs, const py::sequence& output_grads, int64_t groups,
            const std::optional<ConvolutionValues>& convolution, bool with_signed, int threads) {
        const std::vector<Tensor> a = borrowed_.add_all(inputs), d = borrowed_.add_all(output_grads);
        if (a.empty() || a.size() != d.size()) throw py::value_error("expected output_grads for each of the inputs");
        check(a);
        check(d);
        if (groups < 2 || a[0].shape[0] % groups != 0 || threads < 1)
            throw py::value_error("expected groups that divide the samples, and a thread or more");
        plan_.samples = a[0].shape[0];
        plan_.groups = groups;
        plan_.with_signed = with_signed;
        plan_.threads = threads;
        if (convolution)
            add_convolutions(a, d, Convolution(*convolution));
        else
            add_linear(a, d);
        plan_.uses = uses_.data();
        plan_.use_count = static_cast<int>(uses_.size());
    }

    int64_t workspace_bytes() const {
        int64_t bytes = 0;
        select_gradient_moments_workspace()(plan_, &bytes);
        return bytes;
    }

    bool depthwise() const { return plan_.depthwise; }

    bool taps_first() const { return taps_first_; }

    py::tuple run(const py::object& workspace, const py::sequence& maps, const py::object& weight) const;

 private:
    static void check(const std::vector<Tensor>& tensors) {
        for (const Tensor& tensor : tensors) {
            if (tensor.dtype != DType::float32 && tensor.dtype != DType::bfloat16 && tensor.dtype != DType::float16)
                throw py::value_error("expected operands in float32, bfloat16 or float16");
            if (tensor.ndim < 2 || tensor.numel() == 0)
                throw py::value_error("expected operands [S, ..., C] without an empty dimension");
        }
    }

    void add_linear(const std::vector<Tensor>& inputs, const std::vector<Tensor>& output_grads) {
        for (size_t u = 0; u < inputs.size(); ++u) {
            GradientUse use{linear_operand(inputs[u]), linear_operand(output_grads.at(u)), 1};
            for (int r = 0; r < use.inputs.row_dims; ++r) use.rows *= use.inputs.row_shape[r];
            uses_.push_back(use);
        }
        plan_.weight_rows = uses_[0].output_grads.column_shape[2];
        plan_.weight_columns = uses_[0].inputs.column_shape[2];
    }

    void add_convolutions(const std::vector<Tensor>& inputs, const std::vector<Tensor>& output_grads,
                          const Convolution& convolution) {
        const int64_t in = inputs[0].shape[1] / convolution.groups;
        plan_.channel_groups = convolution.groups;
        plan_.weight_rows = output_grads.at(0).shape[1] / convolution.groups;
        plan_.weight_columns = in * convolution.kernel[0] * convolution.kernel[1];
        plan_.depthwise = in == 1 && plan_.weight_rows == 1 && convolution.groups > 1;
        taps_first_ = plan_.depthwise || inputs[0].strides[1] < inputs[0].strides[3];
        for (int axis = 0; axis < 2; ++axis) {
            plan_.kernel[axis] = convolution.kernel[axis];
            plan_.stride[axis] = convolution.stride[axis];
            plan_.dilation[axis] = convolution.dilation[axis];
        }
        for (size_t u = 0; u < inputs.size(); ++u) {
            const Tensor &a = inputs[u], &d = output_grads.at(u);
            const int64_t rows = d.shape[2] * d.shape[3];
            if (plan_.depthwise)
                uses_.push_back({depthwise_operand(a, d, convolution), plane_operand(d, 1), rows});
            else
                uses_.push_back(
                    {window_operand(a, d, convolution, taps_first_), plane_operand(d, convolution.groups), rows});
        }
    }

    Tensor checked_weight(const Tensor& weight) const {
        check({weight});
        const int64_t taps = plan_.kernel[0] * plan_.kernel[1];
        const int64_t rows = plan_.depthwise ? taps : plan_.channel_groups * plan_.weight_rows;
        const int64_t columns = plan_.depthwise ? plan_.channel_groups : plan_.weight_columns;
        const bool adjacent = weight.strides[1] == 1 || columns == 1;
        if (!plan_.with_signed || weight.ndim != 2 || weight.shape[0] != rows || weight.shape[1] != columns ||
            !adjacent)
            throw py::value_error("expected signed moments and a weight of " + std::to_string(rows) + " rows of " +
                                  std::to_string(columns) + " adjacent columns");
        return weight;
    }

    Borrowed borrowed_;
    std::vector<GradientUse> uses_;
    GradientMomentsPlan plan_;
    bool taps_first_ = false;
};

MomentMapPointers map_pointers(Borrowed& borrowed, const py::sequence& maps, int64_t numel) {
    if (maps.size() != 0 && maps.size() != 2 && maps.size() != 5)
        throw py::value_error("expected no map, or 2, or 5 with signed moments, got " + std::to_string(maps.size()));
    std::array<double*, 5> places{};
    for (size_t m = 0; m < maps.size(); ++m) {
        const Tensor tensor = borrowed.add_output(py::reinterpret_borrow<py::object>(maps[m]));
        if (tensor.dtype != DType::float64 || tensor.numel() != numel)
            throw py::value_error("expected float64 maps of " + std::to_string(numel) + " elements");
        places[m] = tensor.as<double>();
    }
    return {places[0], places[1], places[2], places[3], places[4]};
}

py::tuple sums_and_exponent(const MomentResults& results) {
    py::list sums;
    for (const double sum : results.sums) sums.append(sum);
    return py::make_tuple(py::tuple(sums), results.exponent);
}

double* stream_state(Borrowed& borrowed, const py::object& state, int64_t numel, bool with_signed) {
    const Tensor tensor = borrowed.add_output(state);
    const int64_t tiles = (numel + kStreamTile - 1) / kStreamTile;
    const int64_t wanted = tiles * kStreamTile * (with_signed ? kStreamDoublesSigned : kStreamDoubles);
    if (tensor.dtype != DType::float64 || tensor.numel() != wanted)
        throw py::value_error("expected a float64 state of " + std::to_string(wanted) + " elements");
    return tensor.as<double>();
}

void accumulate(const py::object& gradient, int64_t group, bool with_signed, int threads, const py::object& state) {
    Borrowed borrowed;
    const Tensor tensor = borrowed.add(gradient);
    if (!tensor.contiguous() || (tensor.dtype != DType::float32 && tensor.dtype != DType::float64))
        throw py::value_error("expected a contiguous float32 or float64 gradient");
    double* const place = stream_state(borrowed, state, tensor.numel(), with_signed);
    const py::gil_scoped_release release;
    select_accumulate_moments()(tensor, tensor.numel(), group, with_signed, threads, place);
}

py::tuple finish(const py::object& state, int64_t numel, int64_t groups, bool with_signed, const py::sequence& maps) {
    Borrowed borrowed;
    MomentResults results;
    double* const place = stream_state(borrowed, state, numel, with_signed);
    const MomentMapPointers pointers = map_pointers(borrowed, maps, numel);
    select_finish_moments()(place, numel, groups, with_signed, pointers, &results);
    return sums_and_exponent(results);
}

}  // namespace

py::tuple Moments::run(const py::object& workspace, const py::sequence& maps, const py::object& weight) const {
    Borrowed borrowed;
    const Tensor memory = borrowed.add_output(workspace);
    if (memory.dtype != DType::uint8 || memory.numel() < workspace_bytes())
        throw py::value_error("expected a uint8 workspace of " + std::to_string(workspace_bytes()) + " bytes");
    const int64_t numel = plan_.channel_groups * plan_.weight_rows * plan_.weight_columns;
    const MomentMapPointers pointers = map_pointers(borrowed, maps, numel);
    GradientMomentsPlan plan = plan_;
    if (!weight.is_none()) plan.weight = checked_weight(borrowed.add(weight));
    MomentResults results;
    {
        const py::gil_scoped_release release;
        select_gradient_moments()(plan, memory.data, pointers, &results);
    }
    return sums_and_exponent(results);
}

void register_gradient_moments(py::module_& m) {
    py::class_<Moments>(m, "GradientMoments", "The moments of one weight's gradients over borrowed tensors.")
        .def(py::init<const py::sequence&, const py::sequence&, int64_t, const std::optional<ConvolutionValues>&, bool,
                      int>(),
             py::arg("inputs"), py::arg("output_grads"), py::arg("groups"), py::arg("convolution"), py::arg("signed"),
             py::arg("threads"))
        .def_property_readonly("workspace_bytes", &Moments::workspace_bytes)
        .def_property_readonly("depthwise", &Moments::depthwise, "Whether maps are [KH, KW, C].")
        .def_property_readonly("taps_first", &Moments::taps_first,
                               "Whether maps are [O, KH, KW, C], not [O, C, KH, KW].")
        .def("run", &Moments::run, py::arg("workspace"), py::arg("maps"), py::arg("weight"),
             "Returns the sums and the scale's exponent.");
    m.def("moments_state_size", [](int64_t numel, bool with_signed) {
        return (numel + kStreamTile - 1) / kStreamTile * kStreamTile *
               (with_signed ? kStreamDoublesSigned : kStreamDoubles);
    });
    m.def("accumulate_moments", &accumulate, py::arg("gradient"), py::arg("group"), py::arg("signed"),
          py::arg("threads"), py::arg("state"));
    m.def("finish_moments", &finish, py::arg("state"), py::arg("numel"), py::arg("groups"), py::arg("signed"),
          py::arg("maps"));
}

}  // namespace lswag
