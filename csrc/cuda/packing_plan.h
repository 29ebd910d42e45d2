// How signs are packed on a GPU: what depends on shapes, strides and addresses alone.
#pragma once

#include "sign_packing.cuh"

namespace lswag {
namespace cuda {

// word_rows is 0 where nothing is to be done.
inline PackTask plan_packing(const SignPacking& task) {
    PackTask plan = {};
    const bool writes = task.activation != Activation::none;
    plan.pre = task.pre.as<const char>();
    plan.post = writes ? task.post.as<char>() : nullptr;
    plan.words = task.words;
    plan.pre_stride = task.pre.strides[0];
    plan.post_stride = writes ? task.post.strides[0] : 0;
    plan.order = LSWAG_ISA::position_order(task.pre, task.post);
    plan.positions = task.positions;
    plan.first_sample = task.first_sample;
    plan.samples = writes ? task.pre.shape[0] : task.packed_samples;
    plan.packed_samples = task.packed_samples;
    plan.accumulate = task.accumulate;
    if (task.positions == 0 || plan.samples == 0) return plan;
    const int64_t end = task.first_sample + plan.samples;
    plan.first_word = static_cast<int>(task.first_sample / 64);
    plan.word_rows = static_cast<int>((end + 63) / 64) - plan.first_word;
    plan.octets = 8;
    if (plan.word_rows > 1) return plan;
    plan.first_octet = static_cast<int>(task.first_sample % 64 / 8);
    const int needed = static_cast<int>((end - int64_t{64} * plan.first_word + 7) / 8) - plan.first_octet;
    for (plan.octets = 1; plan.octets < needed;) plan.octets *= 2;
    if (plan.first_octet + plan.octets > 8) plan.first_octet = 8 - plan.octets;
    return plan;
}

// How many neighbouring positions can be read and written as one run: 16 bytes, or 8 of 16-bit values, or one.
inline int longest_run(const SignPacking& task, const LSWAG_ISA::PositionOrder& order) {
    const int64_t item = item_size(task.pre.dtype);
    const bool writes = task.activation != Activation::none;
    if (order.run.pre != 1 || (writes && order.run.post != 1)) return 1;
    for (int64_t bytes = 16; bytes >= (item == 2 ? 8 : 16); bytes /= 2) {
        const int64_t run = bytes / item;
        bool fits = order.run.size % run == 0 && reinterpret_cast<uintptr_t>(task.pre.data) % bytes == 0 &&
                    task.pre.strides[0] % run == 0;
        if (writes)
            fits = fits && reinterpret_cast<uintptr_t>(task.post.data) % bytes == 0 && task.post.strides[0] % run == 0;
        for (int a = 0; a < order.outer_axes; ++a)
            fits = fits && order.outer[a].pre % run == 0 && (!writes || order.outer[a].post % run == 0);
        if (fits) return static_cast<int>(run);
    }
    return 1;
}

}  // namespace cuda
}  // namespace lswag
