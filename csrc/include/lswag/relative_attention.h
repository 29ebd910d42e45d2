// Attention with 2-D relative positions on keys and values (AutoFormer), forward and backward.
#pragma once

#include "lswag/dispatch.h"
#include "lswag/tensor.h"

namespace lswag {

// What both directions read. The tables are of the dtype of qkv (float32, bfloat16 or float16); all is contiguous.
struct RelativeAttention {
    Tensor qkv;        // [S, 1 + rows * columns, 3 * heads * D]
    Tensor tables[4];  // keys vertical, keys horizontal, values vertical, values horizontal: [2 * L + 2, D]
    int64_t heads = 1;
    int64_t rows = 1;
    int64_t columns = 1;
    float scale = 1;
    int threads = 1;
};

// Bytes of workspace that each pass takes, from a 64-byte boundary on.
LSWAG_KERNEL(relative_attention_forward_bytes, const RelativeAttention& call, int64_t* bytes)
LSWAG_KERNEL(relative_attention_backward_bytes, const RelativeAttention& call, bool table_grads, int64_t* bytes)

// out [S, T, heads * D] in the dtype of qkv; softmax [S, heads, T, 2] float32: what the backward pass needs to
// compute the probabilities again, exp(scale * (score - first)) * second.
LSWAG_KERNEL(relative_attention_forward, const RelativeAttention& call, const Tensor& out, const Tensor& softmax,
             const Tensor& workspace)

// grad_qkv is like qkv; table_grads is null, or four tensors like the tables. The gradients of the tables are summed
// in an order that does not depend on the number of threads.
LSWAG_KERNEL(relative_attention_backward, const RelativeAttention& call, const Tensor& softmax, const Tensor& grad_out,
             const Tensor& grad_qkv, const Tensor* table_grads, const Tensor& workspace)

}  // namespace lswag
