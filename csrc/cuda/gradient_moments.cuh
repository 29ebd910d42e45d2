// Moments of |g| of linear weights, g_k = sum over n in group k of d_n^T a_n, by wgmma (sm_90a). Tables, scale, dead
// weights and the sums of a tile are those of the Triton kernel (lswag_fast/kernels/gradient_moments.py), which stays
// the default: this one has not run on a GPU yet, so nothing here is timed. It has run on the CPU, where
// tests/cuda/moments_on_host.cpp does what the PTX ISA says of each instruction.
//
// Cost of a weight [O, I] over S samples of T rows: 2 * S * T * O * I FLOP; S * T * (O + I) elements at least, and
// S * T * O * I / 64 from the L2 cache, as a tile is 128 x 128. At the full rate of 4096 FLOP a clock that is 64 bytes
// a clock and multiprocessor, all it can take in. The L2 cache is estimated to give half to two thirds of that to all
// at once, and so should set the pace, at 50 to 65 % of the matrix rate. T is rounded up to a multiple of 16: 5 % for
// 197 rows, against 23 % in chunks of 64.
//
// A block has a multiprocessor. One warpgroup copies chunks of 64 rows into a ring of seven stages (32 KB each), two
// multiply 64 x 128 weights each. These take 64 registers a thread for g, its mean and its squared deviations: 192 of
// the 204 in use, so the copying warpgroup gives registers away. Welford's update is four instructions a weight, 31 %
// of the time of the products of 197 rows; one half of the tile begins kLead chunks before the other, so that it
// updates while the other multiplies. A half writes sums of its own, and nothing but the ring ties the two together.
//
// What was weighed, in compiled code alone:
// - Copies by threads (cp.async), not by the tensor memory accelerator: no map of each operand for a driver to encode,
//   and the tables of the Triton kernel as they are. They take 150 instructions a chunk in each of four warps, a third
//   of what one of them can issue meanwhile. What the accelerator would add is copies that two blocks of a cluster
//   share: 48 bytes a clock from the L2 cache, not 64. That is the next step if the cache is what limits.
// - An arrival that follows the copies (cp.async.mbarrier.arrive.noinc), with the fence between proxies in the
//   consumer. A fence in the producer comes with a memory barrier that may wait for copies still under way.
// - A loop over the products of a chunk, with a count known at run time, makes the compiler serialise them (C7520):
//   each count is straight code of its own.
// - An address worked out for each copy spills in the producer, with 40 registers and with 56. A pointer an operand
//   that is stepped does not.
// - Counts and the half that a warpgroup has come from its first lane, so that stages and descriptors are in registers
//   that a warp has once: 90 instructions a chunk in a consumer, not 137.
// Descriptors, and places in shared memory, are those of the code that Triton makes for the same product.
//
// Why no warpgroup waits for ever: all three go through the same chunks in the same order. The producer, at chunk n,
// waits for both halves to release chunk n - 7. A half at chunk n waits for that chunk alone, and has then released all
// but chunk n - 1, or that too where a group ended; so chunk n - 7 waits for no copy later than n - 6. The second half
// waits once, before its first chunk, for the first half to have asked for the products of one of its first kLead
// chunks; the producer copies as many as there are stages before it waits for any half.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "hopper.cuh"
#include "lswag/gradient_moments_cuda.h"

namespace lswag {
namespace cuda {

constexpr int kTileSide = 128;
constexpr int kHalf = 64;       // rows of a tile that a consumer has
constexpr int kChunkRows = 64;  // rows of a sample in a stage
constexpr int kProductRows = 16;
constexpr uint32_t kPanelBytes = kChunkRows * 128;
constexpr uint32_t kStageBytes = 4 * kPanelBytes;  // two panels of d, two of a
constexpr int kStages = 7;
constexpr int kLead = 2;  // chunks by which the first consumer begins earlier
static_assert(kLead <= kStages, "the first consumer would wait for stages that the second is yet to release");
constexpr int kMomentsThreads = 3 * kWarpgroup;
constexpr int kWarps = kWarpgroup / 32;
constexpr int kSums = 5;
constexpr int kUnitBytes = 16;  // tables count in units of 8 elements
constexpr int kUnitElements = 8;

// The columns of the tables, as in lswag_fast/kernels/gradient_moments_shared.py.
constexpr int kProblemFields = 24, kUseFields = 16;
enum ProblemField { kHeightUnits, kWidthUnits, kGroups, kInGroup, kFirstUse, kUses, kFirstTile, kSlot };
enum UseField { kInputs = 0, kOutputGrads = 7, kRows = 14 };
enum OperandField { kAddress, kSampleStep, kRowStep };  // from one of the first two on

constexpr uint32_t kBarrierBytes = 8;

struct MomentsShared {
    uint64_t barriers[2 * kStages];  // full ones, empty ones
    double sums[2][kWarps][kSums];
};

// The stages in turn, by addresses in shared memory.
struct Ring {
    const uint32_t barriers;
    const uint32_t stages;
    int stage = 0;
    uint32_t parity = 0;  // of the round

    LSWAG_DEVICE Ring(uint32_t barriers, uint32_t stages) : barriers(barriers), stages(stages) {}
    LSWAG_DEVICE uint32_t memory() const { return stages + stage * kStageBytes; }
    LSWAG_DEVICE uint32_t full() const { return barriers + stage * kBarrierBytes; }
    LSWAG_DEVICE uint32_t empty() const { return full() + kStages * kBarrierBytes; }
    LSWAG_DEVICE uint32_t empty_before() const {
        return barriers + (kStages + (stage == 0 ? kStages : stage) - 1) * kBarrierBytes;
    }
    LSWAG_DEVICE void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// A tile of a weight, two rows of partials.
struct WeightTile {
    const int64_t* problem;
    const int64_t* use;
    int row;  // of partials
    int o;    // the first weight
    int i;

    LSWAG_DEVICE WeightTile(const GroupedMoments& task, int tile) : row(task.first_tile + 2 * tile) {
        int low = 0, high = task.problem_count;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (task.ends[middle] <= row)
                low = middle + 1;
            else
                high = middle;
        }
        problem = task.problems + low * kProblemFields;
        use = task.uses + problem[kFirstUse] * kUseFields;
        const int number = (row - static_cast<int>(problem[kFirstTile])) / 2;
        const int across = (width() * kUnitElements + kTileSide - 1) / kTileSide;
        o = number / across * kTileSide;
        i = number % across * kTileSide;
    }
    LSWAG_DEVICE int height() const { return static_cast<int>(problem[kHeightUnits]); }
    LSWAG_DEVICE int width() const { return static_cast<int>(problem[kWidthUnits]); }
    LSWAG_DEVICE int groups() const { return static_cast<int>(problem[kGroups]); }
    LSWAG_DEVICE int in_group() const { return static_cast<int>(problem[kInGroup]); }
    LSWAG_DEVICE int rows() const { return static_cast<int>(use[kRows]); }
};

LSWAG_DEVICE int least(int x, int y) { return x < y ? x : y; }

LSWAG_DEVICE int chunks_of(int rows) { return (rows + kChunkRows - 1) / kChunkRows; }

// Products that a chunk takes, of 16 rows each; what lies between the last row and theirs is filled with zeros.
LSWAG_DEVICE int products_of(int rows) { return (least(rows, kChunkRows) + kProductRows - 1) / kProductRows; }

// The warpgroup that fills the stages: thread t copies the 16 bytes at place t % 8 of rows t / 8, t / 8 + 16, ...
template <class Machine>
class Producer {
 public:
    LSWAG_DEVICE Producer(const Machine& machine, Ring ring)
        : machine_(machine),
          next_(ring),
          row_(machine.thread() / 8),
          place_(machine.thread() % 8),
          to_(swizzled(row_, place_)) {}

    LSWAG_DEVICE void run(const GroupedMoments& task) {
        const int tiles = (task.end_tile - task.first_tile) / 2;
        for (int tile = machine_.block(); tile < tiles; tile += machine_.blocks()) copy_tile(WeightTile(task, tile));
        machine_.wait_for_copies();
    }

 private:
    // One of the two operands, as this thread sees it: where its 16 bytes of the next chunk's first 16 rows are.
    struct Operand {
        const char* from;
        int64_t step;    // bytes to the next 16 rows
        int64_t sample;  // bytes from the last chunk of a sample to the first of the next
        bool live[2];    // whether its place in a panel is inside the matrix
    };

    LSWAG_DEVICE Operand operand_of(const int64_t* fields, int first, int units, int chunks) const {
        const int64_t row = fields[kRowStep] * kUnitBytes;
        Operand operand;
        operand.from =
            reinterpret_cast<const char*>(fields[kAddress] * kUnitBytes + row_ * row + first * 2 + place_ * kUnitBytes);
        operand.step = kProductRows * row;
        operand.sample = fields[kSampleStep] * kUnitBytes - int64_t{chunks - 1} * kChunkRows * row;
        for (int panel = 0; panel < 2; ++panel)
            operand.live[panel] = first / kUnitElements + panel * 8 + place_ < units;
        return operand;
    }

    LSWAG_DEVICE void copy_tile(const WeightTile& tile) {
        const int rows = machine_.uniform(tile.rows()), chunks = chunks_of(rows);
        Operand d = operand_of(tile.use + kOutputGrads, tile.o, tile.height(), chunks);
        Operand a = operand_of(tile.use + kInputs, tile.i, tile.width(), chunks);
        for (int sample = machine_.uniform(tile.groups() * tile.in_group()); sample > 0; --sample)
            for (int left = rows; left > 0; left -= kChunkRows) {
                machine_.wait(next_.empty(), next_.parity ^ 1);
                const uint32_t stage = next_.memory() + to_;
                copy_chunk(d, left, stage);
                copy_chunk(a, left, stage + 2 * kPanelBytes);
                machine_.arrive_when_copied(next_.full());
                next_.advance();
            }
    }

    LSWAG_DEVICE void copy_chunk(Operand& operand, int left, uint32_t to) const {
        const char* from = operand.from;
        LSWAG_UNROLL
        for (int begin = 0; begin < kChunkRows; begin += kProductRows) {
            if (begin >= left) break;
            LSWAG_UNROLL
            for (int panel = 0; panel < 2; ++panel)
                machine_.copy(to + panel * kPanelBytes + begin * 128, from + panel * 128,
                              operand.live[panel] && begin + row_ < left);
            from += operand.step;
        }
        operand.from += left <= kChunkRows ? operand.sample : kChunkRows / kProductRows * operand.step;
    }

    const Machine& machine_;
    Ring next_;
    const int row_;
    const int place_;
    const uint32_t to_;
};

// A warpgroup that multiplies: half 0 has rows 0 to 63 of a tile of weights, half 1 the others.
template <class Machine, class Product>
class Consumer {
 public:
    LSWAG_DEVICE Consumer(const Machine& machine, MomentsShared& shared, Ring ring, int half)
        : machine_(machine),
          shared_(shared),
          next_(ring),
          half_(half),
          thread_(machine.thread() % kWarpgroup),
          leads_(half == 0) {}

    LSWAG_DEVICE void run(const GroupedMoments& task) {
        const int tiles = (task.end_tile - task.first_tile) / 2;
        if (machine_.block() < tiles && half_ == 1) machine_.sync_some(kLeadBarrier, 2 * kWarpgroup);
        for (int number = machine_.block(); number < tiles; number += machine_.blocks()) {
            const WeightTile tile(task, number);
            double* const sums = task.partials + int64_t{tile.row + half_} * kSums;
            if (tile.o + half_ * kHalf < tile.height() * kUnitElements)
                multiply_tile(task, tile, sums);
            else
                skip_tile(tile, sums);
        }
    }

 private:
    static constexpr int kLeadBarrier = 3;

    LSWAG_DEVICE void multiply_tile(const GroupedMoments& task, const WeightTile& tile, double* sums) {
        float g[64], mean[64], squares[64];
        LSWAG_UNROLL
        for (int w = 0; w < 64; ++w) g[w] = mean[w] = squares[w] = 0.0f;
        const float scale = scale_of(task.magnitudes + 2 * tile.problem[kSlot]);
        const int rows = machine_.uniform(tile.rows()), groups = machine_.uniform(tile.groups());
        const int chunks = machine_.uniform(tile.in_group() * chunks_of(rows));
        for (int group = 0; group < groups; ++group) {
            int left = rows;
            for (int chunk = 0; chunk < chunks; ++chunk) {
                multiply_chunk(g, products_of(left), chunk > 0);
                if (chunk > 0) {
                    machine_.wait_for_all_but_last();
                    release(next_.empty_before());
                }
                if (leads_ && chunk == least(kLead, chunks) - 1) {
                    machine_.arrive_at_some(kLeadBarrier, 2 * kWarpgroup);
                    leads_ = false;
                }
                next_.advance();
                left = left > kChunkRows ? left - kChunkRows : rows;
            }
            machine_.finish_products(g);
            release(next_.empty_before());
            add_group(mean, squares, g, scale, static_cast<float>(group));
        }
        finish_tile(mean, squares, static_cast<float>(groups), sums);
    }

    LSWAG_DEVICE void multiply_chunk(float (&g)[64], int products, bool accumulate) {
        machine_.wait(next_.full(), next_.parity);
        machine_.show_copies_to_products();
        const uint32_t stage = next_.memory();
        const uint32_t d = matrix_descriptor(stage + half_ * kPanelBytes, kPanelBytes);
        const uint32_t a = matrix_descriptor(stage + 2 * kPanelBytes, kPanelBytes);
        switch (products) {
            case 4:
                return multiply_rows<4>(g, d, a, accumulate);
            case 3:
                return multiply_rows<3>(g, d, a, accumulate);
            case 2:
                return multiply_rows<2>(g, d, a, accumulate);
            default:
                return multiply_rows<1>(g, d, a, accumulate);
        }
    }

    template <int kProducts>
    LSWAG_DEVICE void multiply_rows(float (&g)[64], uint32_t d, uint32_t a, bool accumulate) {
        machine_.begin_products();
        LSWAG_UNROLL
        for (int product = 0; product < kProducts; ++product)
            machine_.template multiply<Product>(g, d + product * descriptor_step(kProductRows),
                                                a + product * descriptor_step(kProductRows), accumulate || product > 0);
        machine_.commit_products();
    }

    // The half of a tile that lies beyond the last row of its weight.
    LSWAG_DEVICE void skip_tile(const WeightTile& tile, double* sums) {
        for (int chunk = tile.groups() * tile.in_group() * chunks_of(tile.rows()); chunk > 0; --chunk) {
            machine_.wait(next_.full(), next_.parity);
            // All lanes have seen this round of the stage before it can go on to the next.
            machine_.sync_warp();
            release(next_.empty());
            next_.advance();
        }
        if (thread_ < kSums) sums[thread_] = 0.0;
    }

    // A warp has read a stage for the last time.
    LSWAG_DEVICE void release(uint32_t empty) {
        if (thread_ % 32 == 0) machine_.arrive(empty);
    }

    LSWAG_DEVICE static float scale_of(const int32_t* magnitudes) {
        const int exponent = 24 - ((magnitudes[0] >> 23) - 127) - ((magnitudes[1] >> 23) - 127);
        const int biased = (exponent < -126 ? -126 : least(exponent, 127)) + 127;
        const uint32_t bits = static_cast<uint32_t>(biased) << 23;
        float scale;
        memcpy(&scale, &bits, sizeof scale);
        return scale;
    }

    // Welford's update: equal values of |g| leave squares of exactly 0.
    LSWAG_DEVICE static void add_group(float (&mean)[64], float (&squares)[64], const float (&g)[64], float scale,
                                       float group) {
        const float share = 1.0f / (group + 1.0f), rest = group * share;
        LSWAG_UNROLL
        for (int w = 0; w < 64; ++w) {
            const float difference = fabsf(g[w]) * scale - mean[w];
            mean[w] += difference * share;
            squares[w] += difference * (difference * rest);
        }
    }

    LSWAG_DEVICE void finish_tile(const float (&mean)[64], const float (&squares)[64], float groups, double* to) {
        constexpr float kDeadSquared = 1.0f / (1ull << 44);
        const float share = 1.0f / groups;
        float sums[kSums] = {};
        LSWAG_UNROLL
        for (int w = 0; w < 64; ++w) {
            const float variance = squares[w] * share;
            // Weights beyond the edges of a matrix never have a gradient, so they are dead and add to nothing.
            const bool dead = variance <= mean[w] * mean[w] * kDeadSquared;
            const float root = machine_.inverse_root(variance == 0.0f ? 1.0f : variance);
            const float inverse = dead ? 0.0f : root;
            sums[0] += dead ? 0.0f : 1.0f;
            sums[1] += inverse;
            sums[2] += mean[w] * inverse;
            sums[3] += variance * root;
            sums[4] += mean[w];
        }
        double (&of_warps)[kWarps][kSums] = shared_.sums[half_];
        for (int s = 0; s < kSums; ++s) {
            double sum = sums[s];
            for (int lanes = 16; lanes > 0; lanes /= 2) sum += machine_.from_above(sum, lanes);
            if (thread_ % 32 == 0) of_warps[thread_ / 32][s] = sum;
        }
        machine_.sync_some(1 + half_, kWarpgroup);
        if (thread_ < kSums)
            to[thread_] = of_warps[0][thread_] + of_warps[1][thread_] + of_warps[2][thread_] + of_warps[3][thread_];
        machine_.sync_some(1 + half_, kWarpgroup);
    }

    const Machine& machine_;
    MomentsShared& shared_;
    Ring next_;
    const int half_;
    const int thread_;
    bool leads_;
};

template <class Machine, class Product>
LSWAG_DEVICE void moments_of_tiles(const Machine& machine, const GroupedMoments& task, MomentsShared& shared,
                                   Ring ring) {
    if (machine.thread() == 0)
        for (Ring each = ring; each.parity == 0; each.advance()) {
            machine.make_barrier(each.full(), kWarpgroup);
            machine.make_barrier(each.empty(), 2 * kWarps);
        }
    machine.sync();
    // All have 168 at the start, which together is all there are.
    if (machine.thread() < kWarpgroup) {
        machine.template give_registers<56>();
        Producer<Machine>(machine, ring).run(task);
    } else {
        machine.template take_registers<224>();
        Consumer<Machine, Product>(machine, shared, ring, machine.uniform(machine.thread() / kWarpgroup) - 1).run(task);
    }
}

}  // namespace cuda
}  // namespace lswag
