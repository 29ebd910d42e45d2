// The DLPack exchange structures (versions 0.8 and 1.x of https://dmlc.github.io/dlpack), as far as they are read here.
#pragma once

#include <cstdint>

namespace lswag::dlpack {

struct Version {
    uint32_t major;
    uint32_t minor;
};

struct Device {
    int32_t type;
    int32_t id;
};

struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // null: compact, row-major
    uint64_t byte_offset;
};

struct Managed {
    Tensor tensor;
    void* manager_context;
    void (*deleter)(Managed*);
};

struct ManagedVersioned {
    Version version;
    void* manager_context;
    void (*deleter)(ManagedVersioned*);
    uint64_t flags;
    Tensor tensor;
};

constexpr int32_t kCpu = 1;
constexpr int32_t kCuda = 2;
constexpr uint64_t kReadOnly = 1;
constexpr uint8_t kInt = 0;
constexpr uint8_t kUInt = 1;
constexpr uint8_t kFloat = 2;
constexpr uint8_t kBFloat = 4;

}  // namespace lswag::dlpack
