#include <pybind11/pybind11.h>

#include "tensors.h"

namespace lswag {

void register_relative_attention(pybind11::module_&) {}

}  // namespace lswag
