// cuBLAS and cuBLASLt: each product is a launch on its handle's stream. Functions that are missing here are the real
// library's, which find no device.
#include <cublasLt.h>
#include <cublas_v2.h>

#include "runtime.h"

// As the library has it, an object of its own.
struct cublasContext {
    cudaStream_t stream = nullptr;
    cublasMath_t math = CUBLAS_DEFAULT_MATH;
    cublasPointerMode_t pointers = CUBLAS_POINTER_MODE_HOST;
};

namespace rehearsal {
namespace {

cublasStatus_t product(cudaStream_t stream, const char* name) {
    const Lock lock;
    return take_launch(stream, name, {1}, {128}, 0) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                                   : CUBLAS_STATUS_EXECUTION_FAILED;
}

// Descriptions are made and given back, and never read.
template <class Description>
cublasStatus_t describe(Description* description) {
    *description = reinterpret_cast<Description>(new char);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t give_back(void* description) {
    delete static_cast<char*>(description);
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace
}  // namespace rehearsal

using namespace rehearsal;
using Operation = cublasOperation_t;

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
    *handle = new cublasContext;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    handle->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
    *mode = handle->math;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    handle->math = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t* mode) {
    *mode = handle->pointers;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
    handle->pointers = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, Operation, Operation, int, int, int, const void*, const void*,
                            cudaDataType, int, const void*, cudaDataType, int, const void*, void*, cudaDataType, int,
                            cublasComputeType_t, cublasGemmAlgo_t) {
    return product(handle->stream, "cublasGemmEx");
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, Operation, Operation, int, int, int, const void*,
                                          const void*, cudaDataType, int, long long, const void*, cudaDataType, int,
                                          long long, const void*, void*, cudaDataType, int, long long, int,
                                          cublasComputeType_t, cublasGemmAlgo_t) {
    return product(handle->stream, "cublasGemmStridedBatchedEx");
}

cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, Operation, Operation, int, int, int, const float*, const float*,
                              int, const float*, int, const float*, float*, int) {
    return product(handle->stream, "cublasSgemm");
}

cublasStatus_t cublasDgemm_v2(cublasHandle_t handle, Operation, Operation, int, int, int, const double*, const double*,
                              int, const double*, int, const double*, double*, int) {
    return product(handle->stream, "cublasDgemm");
}

cublasStatus_t cublasSgemmEx(cublasHandle_t handle, Operation, Operation, int, int, int, const float*, const void*,
                             cudaDataType, int, const void*, cudaDataType, int, const float*, void*, cudaDataType,
                             int) {
    return product(handle->stream, "cublasSgemmEx");
}

cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, Operation, Operation, int, int, int, const float*,
                                         const float*, int, long long, const float*, int, long long, const float*,
                                         float*, int, long long, int) {
    return product(handle->stream, "cublasSgemmStridedBatched");
}

cublasStatus_t cublasDgemmStridedBatched(cublasHandle_t handle, Operation, Operation, int, int, int, const double*,
                                         const double*, int, long long, const double*, int, long long, const double*,
                                         double*, int, long long, int) {
    return product(handle->stream, "cublasDgemmStridedBatched");
}

cublasStatus_t cublasSgemv_v2(cublasHandle_t handle, Operation, int, int, const float*, const float*, int, const float*,
                              int, const float*, float*, int) {
    return product(handle->stream, "cublasSgemv");
}

cublasStatus_t cublasDgemv_v2(cublasHandle_t handle, Operation, int, int, const double*, const double*, int,
                              const double*, int, const double*, double*, int) {
    return product(handle->stream, "cublasDgemv");
}

cublasStatus_t cublasSdot_v2(cublasHandle_t handle, int, const float*, int, const float*, int, float*) {
    return product(handle->stream, "cublasSdot");
}

cublasStatus_t cublasDdot_v2(cublasHandle_t handle, int, const double*, int, const double*, int, double*) {
    return product(handle->stream, "cublasDdot");
}

size_t cublasLtGetVersion() { return CUBLAS_VERSION; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* description, cublasComputeType_t, cudaDataType_t) {
    return describe(description);
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) { return give_back(description); }

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void*,
                                              size_t) {
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType, uint64_t, uint64_t, int64_t) {
    return describe(layout);
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return give_back(layout); }

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t, const void*,
                                                size_t) {
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) { return describe(preference); }

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) { return give_back(preference); }

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t,
                                                    const void*, size_t) {
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t found[],
                                              int* number) {
    found[0] = {};
    *number = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*, cublasLtMatrixLayout_t,
                              const void*, cublasLtMatrixLayout_t, const void*, const void*, cublasLtMatrixLayout_t,
                              void*, cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t*, void*, size_t,
                              cudaStream_t stream) {
    return product(stream, "cublasLtMatmul");
}

}  // extern "C"
