// What the functions of activation patterns on the CPU and on a GPU ask of their arguments alike.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "lswag/activation_patterns.h"
#include "tensors.h"

namespace lswag {

inline void require(bool condition, const std::string& message) {
    if (!condition) throw pybind11::value_error(message);
}

// A buffer of int64 that a kernel writes, of at least so many numbers.
inline int64_t* buffer(Borrowed& borrowed, const pybind11::object& array, int64_t numel, const char* name) {
    const Tensor tensor = borrowed.add_output(array);
    require(tensor.dtype == DType::int64, std::string(name) + " must be int64");
    require(tensor.numel() >= numel, std::string(name) + " must hold " + std::to_string(numel) + " numbers, got " +
                                         std::to_string(tensor.numel()));
    return tensor.as<int64_t>();
}

inline uint64_t* word_buffer(Borrowed& borrowed, const pybind11::object& array, int64_t numel, const char* name) {
    return reinterpret_cast<uint64_t*>(buffer(borrowed, array, numel, name));
}

inline int64_t width(int64_t samples) { return (samples + 63) / 64; }

// The words of several activations, with the memory that they and their table live in.
struct Words {
    Borrowed borrowed;
    std::vector<const uint64_t*> pointers;
    std::vector<int64_t> positions;
    int64_t samples;
    int64_t total = 0;

    Words(const pybind11::sequence& arrays, int64_t samples, Borrowed::Memory memory = Borrowed::Memory::cpu)
        : borrowed(memory), samples(samples) {
        require(samples > 0, "samples must be positive");
        for (const Tensor& tensor : borrowed.add_all(arrays)) {
            require(tensor.dtype == DType::int64 && tensor.ndim == 2 && tensor.contiguous(),
                    "words must be contiguous int64 tensors [W, P]");
            require(tensor.shape[0] >= width(samples), "words must have a row for every 64 samples");
            pointers.push_back(tensor.as<const uint64_t>());
            positions.push_back(tensor.shape[1]);
            total += tensor.shape[1];
        }
    }

    PatternSet set() const {
        return {pointers.data(), positions.data(), static_cast<int64_t>(pointers.size()), samples};
    }
};

// The task of packing signs, less its threads.
inline SignPacking packing_task(Borrowed& borrowed, const pybind11::object& pre, const pybind11::object& post,
                                const pybind11::object& words, int activation, int64_t first_sample,
                                int64_t packed_samples, bool accumulate) {
    SignPacking task;
    task.pre = borrowed.add(pre);
    require(task.pre.ndim > 0, "an activation needs a sample axis");
    require(task.pre.dtype == DType::float32 || item_size(task.pre.dtype) == 2, "an activation must be floating point");
    require(activation >= 0 && activation < kActivationCount, "no such activation");
    require(post.is_none() == (activation == 0), "an output is written exactly where there is an activation function");
    task.activation = static_cast<Activation>(activation);
    if (!post.is_none()) {
        task.post = borrowed.add(post);
        require(!task.post.read_only && task.post.dtype == task.pre.dtype && task.post.ndim == task.pre.ndim,
                "the output must be writable, with the dtype and shape of the input");
        for (int d = 0; d < task.pre.ndim; ++d)
            require(task.post.shape[d] == task.pre.shape[d], "the output must have the shape of the input");
    }
    require(first_sample >= 0 && packed_samples >= 0 && packed_samples <= task.pre.shape[0], "no such samples");
    task.positions = 1;
    for (int d = 1; d < task.pre.ndim; ++d) task.positions *= task.pre.shape[d];
    task.words =
        word_buffer(borrowed, words, width(first_sample + packed_samples) * task.positions, "words of the activation");
    task.first_sample = first_sample;
    task.packed_samples = packed_samples;
    task.accumulate = accumulate;
    task.threads = 1;
    return task;
}

}  // namespace lswag
