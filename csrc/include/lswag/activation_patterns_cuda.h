// Activation patterns on a GPU. Tensors lie on one CUDA device; work is put on a stream of it, given as the integer
// that is its handle, and nothing waits for it. What is launched depends on shapes alone, so that it can be captured in
// a graph. Every function throws std::runtime_error where a launch fails or the device is too old.
#pragma once

#include <cstdint>
#include <vector>

#include "lswag/activation_patterns.h"

namespace lswag {
namespace cuda {

struct Queue {
    int device;
    uintptr_t stream;
};

// As on the CPU, whose `threads` is not looked at.
void pack_signs(const SignPacking& task, const Queue& queue);

// The distinct patterns of all activations of a set and of each, into counts [1 + activations].
int64_t count_workspace(const std::vector<int64_t>& positions);  // in int64; -1: more positions than can be counted
void count_patterns(const PatternSet& set, int64_t* counts, int64_t* workspace, const Queue& queue);

// Every two samples' agreements [S, S].
int64_t agreement_workspace(int64_t activations);  // in int64
void count_agreements(const PatternSet& set, int64_t* agreements, int64_t* workspace, const Queue& queue);

}  // namespace cuda
}  // namespace lswag
