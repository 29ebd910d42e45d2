#include "tensors.h"

#include <string>
#include <utility>

#include "lswag/dlpack.h"

namespace py = pybind11;

namespace lswag {
namespace {

DType read_dtype(const dlpack::DataType& dtype) {
    if (dtype.lanes == 1) {
        if (dtype.code == dlpack::kFloat && dtype.bits == 32) return DType::float32;
        if (dtype.code == dlpack::kFloat && dtype.bits == 16) return DType::float16;
        if (dtype.code == dlpack::kFloat && dtype.bits == 64) return DType::float64;
        if (dtype.code == dlpack::kBFloat && dtype.bits == 16) return DType::bfloat16;
        if (dtype.code == dlpack::kInt && dtype.bits == 64) return DType::int64;
        if (dtype.code == dlpack::kUInt && dtype.bits == 8) return DType::uint8;
    }
    throw py::value_error(
        "the kernels read float32, bfloat16, float16, float64, int64 and uint8 tensors, got DLPack type code " +
        std::to_string(dtype.code) + " with " + std::to_string(dtype.bits) + " bits");
}

Tensor read(const dlpack::Tensor& source, bool read_only) {
    if (source.ndim > kMaxDims)
        throw py::value_error("the kernels read tensors of up to " + std::to_string(kMaxDims) + " dimensions, got " +
                              std::to_string(source.ndim));
    Tensor tensor;
    tensor.data = static_cast<char*>(source.data) + source.byte_offset;
    tensor.dtype = read_dtype(source.dtype);
    tensor.ndim = source.ndim;
    tensor.read_only = read_only;
    int64_t compact = 1;
    for (int d = source.ndim - 1; d >= 0; --d) {
        tensor.shape[d] = source.shape[d];
        tensor.strides[d] = source.strides != nullptr ? source.strides[d] : compact;
        compact *= source.shape[d];
    }
    if (source.data == nullptr && tensor.numel() > 0)
        throw py::value_error("the kernels read tensors with memory, got one that only has a shape (a fake tensor?)");
    return tensor;
}

py::object export_capsule(const py::object& array, Borrowed::Memory memory) {
    const py::object method = py::getattr(array, "__dlpack__", py::none());
    if (method.is_none())
        throw py::type_error("expected a tensor or array that offers __dlpack__, got " +
                             py::str(py::type::handle_of(array)).cast<std::string>());
    py::dict arguments;
    // The producer's stream is the one that kernels are put on: nothing has to wait.
    if (memory == Borrowed::Memory::cuda) arguments["stream"] = -1;
    try {
        return method(py::arg("max_version") = py::make_tuple(1, 0), **arguments);
    } catch (py::error_already_set& error) {
        // A producer older than DLPack 1.0 does not know the argument.
        if (!error.matches(PyExc_TypeError)) throw;
        return method(**arguments);
    }
}

}  // namespace

void Borrowed::check_device(int type, int id) {
    const bool cuda = memory_ == Memory::cuda;
    if (type != (cuda ? dlpack::kCuda : dlpack::kCpu))
        throw py::value_error(std::string("the ") + (cuda ? "CUDA" : "CPU") + " kernels read tensors on " +
                              (cuda ? "a CUDA device" : "the CPU") + ", got DLPack device type " +
                              std::to_string(type));
    if (cuda && device_ >= 0 && id != device_)
        throw py::value_error("the tensors of one call must lie on one device, got CUDA devices " +
                              std::to_string(device_) + " and " + std::to_string(id));
    device_ = id;
}

Tensor Borrowed::add(const py::object& array) {
    // Asked first: a producer on the CPU refuses any stream.
    if (memory_ == Memory::cuda && py::hasattr(array, "__dlpack_device__")) {
        const auto device = array.attr("__dlpack_device__")().cast<std::pair<int, int>>();
        check_device(device.first, device.second);
    }
    const py::object exported = export_capsule(array, memory_);
    py::capsule capsule = py::reinterpret_borrow<py::capsule>(exported);
    // A capsule that keeps its first name calls the producer's deleter when it is dropped, which is all that is needed.
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0) {
        const auto* managed =
            static_cast<const dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
        if (managed->version.major > 1)
            throw py::value_error("DLPack version " + std::to_string(managed->version.major) + " is not known here");
        check_device(managed->tensor.device.type, managed->tensor.device.id);
        capsules_.push_back(capsule);
        return read(managed->tensor, (managed->flags & dlpack::kReadOnly) != 0);
    }
    const auto* managed = static_cast<const dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (managed == nullptr) throw py::error_already_set();
    check_device(managed->tensor.device.type, managed->tensor.device.id);
    capsules_.push_back(capsule);
    return read(managed->tensor, false);
}

Tensor Borrowed::add_output(const py::object& array) {
    const Tensor tensor = add(array);
    if (tensor.read_only) throw py::value_error("an output tensor must be writable");
    if (!tensor.contiguous()) throw py::value_error("an output tensor must be contiguous");
    return tensor;
}

std::vector<Tensor> Borrowed::add_all(const py::sequence& arrays) {
    std::vector<Tensor> tensors;
    tensors.reserve(arrays.size());
    for (const auto& array : arrays) tensors.push_back(add(py::reinterpret_borrow<py::object>(array)));
    return tensors;
}

}  // namespace lswag
