// Tensors of any DLPack producer, borrowed for the length of one call.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "lswag/tensor.h"

namespace lswag {

// Holds the DLPack capsules of its tensors, and so their memory, until it is destroyed.
class Borrowed {
 public:
    enum class Memory { cpu, cuda };

    explicit Borrowed(Memory memory = Memory::cpu) : memory_(memory) {}

    // Reads one array object (it has __dlpack__). Throws ValueError where it is not in the memory asked for, on another
    // device than the arrays before it, or of a dtype that no kernel reads. No stream waits for another.
    Tensor add(const pybind11::object& array);

    // Reads a writable array: the same, and ValueError where it is read-only or not contiguous.
    Tensor add_output(const pybind11::object& array);

    // Reads every array of a sequence.
    std::vector<Tensor> add_all(const pybind11::sequence& arrays);

    // The number of the device that the arrays lie on; -1 before the first.
    int device() const { return device_; }

 private:
    void check_device(int type, int id);

    Memory memory_;
    int device_ = -1;
    std::vector<pybind11::capsule> capsules_;
};

}  // namespace lswag
