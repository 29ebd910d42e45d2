// Runs the wgmma kernel of gradient moments on the CPU, as hopper_on_host.h describes.
//
// Reads cases from standard input and writes results to standard output, in binary; test_moments_on_host.py does both.
// As a library it runs a launch that tests/kernels/test_wgmma_launch.py makes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "gradient_moments.cuh"
#include "hopper_on_host.h"

using namespace lswag;
using namespace lswag::cuda;

namespace {

constexpr uint32_t kBarriersAt = 128;
constexpr uint32_t kStagesAt = 3 * 1024;

void read_into(void* to, size_t bytes) {
    if (bytes != 0 && fread(to, 1, bytes, stdin) != bytes) exit(3);
}

int64_t read_number() {
    int64_t number = 0;
    read_into(&number, sizeof number);
    return number;
}

template <class T>
std::vector<T> read_vector(int64_t size) {
    std::vector<T> values(size);
    read_into(values.data(), size * sizeof(T));
    return values;
}

struct Freed {
    void operator()(char* memory) const { free(memory); }
};

void run_blocks(const GroupedMoments& task, bool half, int blocks, Timing timing, uint64_t seed,
                const Operands& operands) {
    for (int number = 0; number < blocks; ++number) {
        Block block(number, blocks, kMomentsThreads, kStagesAt, kStages * kStageBytes, timing, seed + number, operands);
        MomentsShared shared;
        memset(static_cast<void*>(&shared), 0xa5, sizeof shared);
        block.run([&] {
            const Emulated machine(block);
            const Ring ring(kBarriersAt, kStagesAt);
            if (half)
                moments_of_tiles<Emulated, Float16Product>(machine, task, shared, ring);
            else
                moments_of_tiles<Emulated, BFloat16Product>(machine, task, shared, ring);
        });
    }
}

// The tables name an operand by its number where a launch has the sixteenth of an address.
void moments_case() {
    const Timing timing = static_cast<Timing>(read_number());
    const uint64_t seed = static_cast<uint64_t>(read_number());
    const int blocks = static_cast<int>(read_number());
    const bool half = read_number() != 0;
    std::vector<std::unique_ptr<char, Freed>> memory;
    Operands operands;
    for (int64_t n = read_number(); n > 0; --n) {
        const size_t bytes = static_cast<size_t>(read_number());
        memory.emplace_back(static_cast<char*>(aligned_alloc(16, (bytes + 15) / 16 * 16)));
        read_into(memory.back().get(), bytes);
        operands.emplace_back(memory.back().get(), bytes);
    }
    GroupedMoments task = {};
    task.problem_count = static_cast<int>(read_number());
    task.first_tile = static_cast<int>(read_number());
    task.end_tile = static_cast<int>(read_number());
    const std::vector<int64_t> problems = read_vector<int64_t>(int64_t{task.problem_count} * kProblemFields);
    std::vector<int64_t> uses = read_vector<int64_t>(read_number() * kUseFields);
    const std::vector<int64_t> ends = read_vector<int64_t>(task.problem_count);
    const std::vector<int32_t> magnitudes = read_vector<int32_t>(read_number());
    for (size_t use = 0; use < uses.size(); use += kUseFields)
        for (const int field : {kInputs, kOutputGrads})
            uses[use + field] =
                static_cast<int64_t>(reinterpret_cast<uintptr_t>(operands[uses[use + field]].first) / 16);
    std::vector<double> partials(int64_t{task.end_tile} * kSums, std::numeric_limits<double>::quiet_NaN());
    task.problems = problems.data();
    task.uses = uses.data();
    task.ends = ends.data();
    task.magnitudes = magnitudes.data();
    task.partials = partials.data();
    run_blocks(task, half, blocks, timing, seed, operands);
    fwrite(partials.data(), sizeof(double), partials.size(), stdout);
}

}  // namespace

int main() {
    for (int64_t cases = read_number(); cases > 0; --cases) moments_case();
    return 0;
}

// A launch in the caller's process, whose tables hold addresses. Reads of operands are not checked.
extern "C" void moments_on_host(const GroupedMoments* task, int half, int blocks) {
    const Operands anywhere = {{nullptr, std::numeric_limits<size_t>::max()}};
    run_blocks(*task, half != 0, blocks, kMixed, 1, anywhere);
}
