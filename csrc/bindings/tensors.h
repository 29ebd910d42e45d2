// Tensors of any DLPack producer, borrowed for the length of one call.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "lswag/tensor.h"

namespace lswag {

// Holds the DLPack capsules of its tensors, and so their memory, until it is destroyed.
class Borrowed {
 public:
    // Reads one array object (it has __dlpack__). Throws ValueError where it is not on the CPU or of a dtype that no
    // kernel reads.
    Tensor add(const pybind11::object& array);

    // Reads a writable array: the same, and ValueError where it is read-only or not contiguous.
    Tensor add_output(const pybind11::object& array);

    // Reads every array of a sequence.
    std::vector<Tensor> add_all(const pybind11::sequence& arrays);

 private:
    std::vector<pybind11::capsule> capsules_;
};

}  // namespace lswag
