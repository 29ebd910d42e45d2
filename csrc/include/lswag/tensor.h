// A tensor as the kernels see it: a pointer, a dtype, sizes and strides. Nothing here knows of torch or Python.
#pragma once

#include <cstdint>

namespace lswag {

enum class DType : int32_t { float32, bfloat16, float16, float64, int64, uint8 };

inline int64_t item_size(DType dtype) {
    switch (dtype) {
        case DType::bfloat16:
        case DType::float16:
            return 2;
        case DType::float32:
            return 4;
        case DType::uint8:
            return 1;
        default:
            return 8;
    }
}

constexpr int kMaxDims = 8;

struct Tensor {
    void* data = nullptr;
    DType dtype = DType::float32;
    int ndim = 0;
    bool read_only = false;
    int64_t shape[kMaxDims] = {};
    int64_t strides[kMaxDims] = {};  // in elements

    int64_t numel() const {
        int64_t n = 1;
        for (int d = 0; d < ndim; ++d) n *= shape[d];
        return n;
    }

    bool contiguous() const {
        if (numel() == 0) return true;
        int64_t expected = 1;
        for (int d = ndim - 1; d >= 0; --d) {
            if (shape[d] != 1 && strides[d] != expected) return false;
            expected *= shape[d];
        }
        return true;
    }

    template <typename T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

}  // namespace lswag
