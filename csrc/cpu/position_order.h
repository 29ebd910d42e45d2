// The order in which the positions of an activation are read: as they lie in memory, whatever the order of its axes.
#pragma once

#include "lswag/host_device.h"
#include "lswag/tensor.h"

namespace lswag {
namespace LSWAG_ISA {

// One axis of the positions, with its strides in the tensor read, in the one written, and among the words.
struct Axis {
    int64_t size;
    int64_t pre;
    int64_t post;
    int64_t word;
};

// Rows of `run.size` positions each; `outer` says where a row starts.
struct PositionOrder {
    Axis outer[kMaxDims];
    int outer_axes;
    int64_t rows;
    Axis run;

    // Where a row starts: the strides' fields hold offsets.
    LSWAG_HOST_DEVICE Axis row_start(int64_t row) const {
        Axis start = {run.size, 0, 0, 0};
        for (int a = outer_axes - 1; a >= 0; --a) {
            const int64_t i = row % outer[a].size;
            row /= outer[a].size;
            start.pre += i * outer[a].pre;
            start.post += i * outer[a].post;
            start.word += i * outer[a].word;
        }
        return start;
    }
};

inline bool follows(const Axis& outer, const Axis& inner) {
    return outer.pre == inner.pre * inner.size && outer.post == inner.post * inner.size &&
           outer.word == inner.word * inner.size;
}

// Axes from the widest stride of `pre` to the narrowest, those that continue one another joined. Axis 0 of both tensors
// is the samples'; `post` has no data where nothing is written.
inline PositionOrder position_order(const Tensor& pre, const Tensor& post) {
    Axis axes[kMaxDims];
    int count = 0;
    int64_t word = 1;
    for (int d = pre.ndim - 1; d > 0; --d) {
        const Axis axis = {pre.shape[d], pre.strides[d], post.data != nullptr ? post.strides[d] : pre.strides[d], word};
        word *= axis.size;
        if (axis.size == 1) continue;
        int at = count++;
        for (; at > 0 && axes[at - 1].pre > axis.pre; --at) axes[at] = axes[at - 1];
        axes[at] = axis;
    }
    PositionOrder order = {};
    order.run = count > 0 ? axes[0] : Axis{1, 1, 1, 1};
    order.rows = 1;
    int next = 1;
    while (next < count && follows(axes[next], order.run)) order.run.size *= axes[next++].size;
    for (int a = count - 1; a >= next; --a) {
        order.outer[order.outer_axes++] = axes[a];
        order.rows *= axes[a].size;
    }
    return order;
}

}  // namespace LSWAG_ISA
}  // namespace lswag
