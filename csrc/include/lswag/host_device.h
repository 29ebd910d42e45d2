// How nvcc is told where a function runs. Other compilers see plain C++, so that tests run device code on the CPU.
#pragma once

#if defined(__CUDACC__)
#define LSWAG_DEVICE __device__ __forceinline__
#define LSWAG_HOST_DEVICE __host__ __device__
#define LSWAG_UNROLL _Pragma("unroll")
#else
#define LSWAG_DEVICE inline
#define LSWAG_HOST_DEVICE
#define LSWAG_UNROLL
#endif
