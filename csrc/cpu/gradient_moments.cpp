// Weight gradients of one group after the other on blocks whose running moments stay in the L2 cache; no gradient is
// ever stored beyond one block.
//
// Floor: 2 * S * T * O * I operations, those of an ordinary weight gradient, at the rate of the micro-kernel.
#include "lswag/gradient_moments.h"

#include "gradient_panels.h"
#include "microkernel.h"
#include "moment_state.h"
#include "operand_scale.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lswag {
namespace LSWAG_ISA {

void depthwise_moments(const GradientMomentsPlan& plan, void* workspace, const float scales[2], double unit,
                       const MomentMapPointers& maps, MomentResults* results);
void depthwise_workspace(const GradientMomentsPlan& plan, int64_t* bytes);

namespace {

constexpr int64_t kTileWeights = static_cast<int64_t>(kTileRows) * kTileColumns;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// How the weight is cut into blocks, and what of each lies where in a thread's memory.
struct Blocking {
    int64_t row_tiles, column_tiles;              // of the weight (of one channel group)
    int64_t block_row_tiles, block_column_tiles;  // of a block, at most
    int64_t row_blocks, column_blocks;
    bool carries;                     // a group takes several chunks of rows: partial sums wait in memory
    bool wide;                        // those and the moments are float64, else float32
    int64_t real_bytes, state_bytes;  // of a gradient; of a weight's moments
    int64_t row_panels, column_panels, partial_sums, state, thread_bytes;

    explicit Blocking(const GradientMomentsPlan& plan) {
        row_tiles = ceil_div(plan.weight_rows, kTileRows);
        column_tiles = ceil_div(plan.weight_columns, kTileColumns);
        int64_t rows = 0;
        carries = plan.use_count > 1;
        for (int u = 0; u < plan.use_count; ++u) {
            const int64_t of_group = plan.uses[u].rows * (plan.samples / plan.groups);
            carries = carries || of_group > kChunkRows;
            rows = of_group > rows ? of_group : rows;
        }
        wide = carries || sums_in_float64(plan);
        real_bytes = wide ? 8 : 4;
        state_bytes = wide ? MomentState<double>::bytes_per_weight(plan.with_signed)
                           : MomentState<float>::bytes_per_weight(plan.with_signed);
        rows = rows < kChunkRows ? rows + rows % 2 : kChunkRows;
        choose_blocks(plan, rows);
        row_panels = round_up(rows * block_row_tiles * kTileRows * 4);
        column_panels = round_up(rows * block_column_tiles * kTileColumns * 4);
        const int64_t weights = block_row_tiles * block_column_tiles * kTileWeights;
        partial_sums = (carries ? weights : kTileWeights) * real_bytes;
        state = state_bytes * weights;
        thread_bytes = row_panels + column_panels + partial_sums + state;
    }

    int64_t items(const GradientMomentsPlan& plan) const { return plan.channel_groups * row_blocks * column_blocks; }
    int64_t tiles(const GradientMomentsPlan& plan) const { return plan.channel_groups * row_tiles * column_tiles; }

 private:
    // Least time by a model: products at kLanes * 2 a cycle, packing at 4 elements a cycle, whole waves of threads;
    // blocks whose moments do not fit half an L2 cache of 1 MB are not considered.
    void choose_blocks(const GradientMomentsPlan& plan, int64_t rows) {
        const int64_t bytes = state_bytes + (carries ? real_bytes : 0);
        double least = -1;
        for (int64_t across = 1; across <= column_tiles; ++across) {
            const int64_t columns = ceil_div(column_tiles, across);
            if (across > 1 && columns == ceil_div(column_tiles, across - 1)) continue;
            for (int64_t down = 1; down <= row_tiles; ++down) {
                const int64_t block_rows = ceil_div(row_tiles, down);
                if (down > 1 && block_rows == ceil_div(row_tiles, down - 1)) continue;
                const int64_t weights = block_rows * columns * kTileWeights;
                if (weights * bytes > (1 << 19) && block_rows * columns > 1) continue;
                const double waves = static_cast<double>(ceil_div(plan.channel_groups * down * across, plan.threads));
                const double packed = static_cast<double>(rows * (block_rows * kTileRows + columns * kTileColumns));
                const double time = waves * (static_cast<double>(rows * weights) / (2 * kLanes) + packed / 4 +
                                             static_cast<double>(weights) / 2);
                if (least >= 0 && time >= least) continue;
                least = time;
                block_row_tiles = block_rows;
                block_column_tiles = columns;
            }
        }
        row_blocks = ceil_div(row_tiles, block_row_tiles);
        column_blocks = ceil_div(column_tiles, block_column_tiles);
    }
};

// One block of the weight, worked on by one thread: panels of Packed, products summed in Sum within a chunk of rows,
// partial sums and moments of Real. A chain of float32 sums no longer than a chunk keeps the error of data of one sign,
// which grows with its length, within the tolerance.
template <typename Packed, typename Sum, typename Real>
struct Block {
    const GradientMomentsPlan& plan;
    const Blocking& blocking;
    const float* scales;  // of inputs and output gradients
    char* memory;
    int64_t channel_group;
    int64_t first_row_tile, first_column_tile;
    int64_t row_tiles, column_tiles;

    Packed* row_panels() const { return reinterpret_cast<Packed*>(memory); }
    Packed* column_panels() const { return reinterpret_cast<Packed*>(memory + blocking.row_panels); }
    Real* partial(int64_t tile) const {
        char* const place = memory + blocking.row_panels + blocking.column_panels;
        return reinterpret_cast<Real*>(place) + (blocking.carries ? tile * kTileWeights : 0);
    }
    MomentState<Real> state(int64_t tile) const {
        char* const place = memory + blocking.row_panels + blocking.column_panels + blocking.partial_sums;
        return {place + tile * blocking.state_bytes * kTileWeights, kTileWeights};
    }

    // Adds `count` rows of a use, from row `begin` of the group; returns the steps of k packed.
    int64_t pack(const GradientUse& use, int64_t group, int64_t begin, int64_t count) const {
        const int64_t sample = group * (plan.samples / plan.groups);
        const int64_t steps = kPairs<Packed> ? (count + 1) / 2 : count;
        RowTable rows;
        list_rows(use.output_grads, use.rows, sample, begin, count, rows);
        const int64_t first_row = first_row_tile * kTileRows, last_row = first_row + row_tiles * kTileRows;
        pack_operand<kTileRows>(use.output_grads, channel_group, rows, first_row, least(last_row, plan.weight_rows),
                                scales[1], row_panels(), steps * kTileRows);
        list_rows(use.inputs, use.rows, sample, begin, count, rows);
        const int64_t first = first_column_tile * kTileColumns, last = first + column_tiles * kTileColumns;
        pack_operand<kTileColumns>(use.inputs, channel_group, rows, first, least(last, plan.weight_columns), scales[0],
                                   column_panels(), steps * kTileColumns);
        return steps;
    }

    // Only the last tile across may have fewer columns than kTileColumns filled.
    static void multiply(int64_t steps, const Packed* a, const Packed* b, Sum* c, bool accumulate, int64_t filled) {
        if constexpr (sizeof(Sum) == 8)
            multiply_tile(steps, a, b, c, kTileColumns, accumulate, filled);
        else if (filled <= kLanes)
            multiply_tile<1>(steps, a, b, c, kTileColumns, accumulate);
        else if (kTileVectors > 2 && filled <= 2 * kLanes)
            multiply_tile<2>(steps, a, b, c, kTileColumns, accumulate);
        else
            multiply_tile(steps, a, b, c, kTileColumns, accumulate);
    }

    static void multiply_chunk(int64_t steps, const Packed* a, const Packed* b, Real* c, bool first, int64_t filled) {
        if constexpr (sizeof(Sum) == sizeof(Real)) {
            multiply(steps, a, b, c, !first, filled);
        } else {
            alignas(64) Sum chunk[kTileWeights];
            multiply(steps, a, b, chunk, false, filled);
            for (int64_t w = 0; w < kTileWeights; w += kLanes / 2)
                store(c + w, (first ? vdouble{} : load(c + w)) + load_double(chunk + w));
        }
    }

    template <bool with_signed>
    void add_chunk(int64_t steps, bool first, bool last, int64_t group) const {
        for (int64_t column = 0; column < column_tiles; ++column) {
            const Packed* const b = column_panels() + column * steps * kTileColumns;
            const int64_t filled = plan.weight_columns - (first_column_tile + column) * kTileColumns;
            for (int64_t row = 0; row < row_tiles; ++row) {
                const int64_t tile = column * row_tiles + row;
                const Packed* const a = row_panels() + row * steps * kTileRows;
                multiply_chunk(steps, a, b, partial(tile), first, filled);
                if (last) update_moments<with_signed>(state(tile), partial(tile), kTileWeights, group);
            }
        }
    }

    void add_group(int64_t group) const {
        for (int u = 0; u < plan.use_count; ++u) {
            const int64_t rows = plan.uses[u].rows * (plan.samples / plan.groups);
            const int64_t chunks = ceil_div(rows, kChunkRows);
            const int64_t chunk = ceil_div(ceil_div(rows, chunks), 2) * 2;
            for (int64_t begin = 0; begin < rows; begin += chunk) {
                const int64_t steps = pack(plan.uses[u], group, begin, least(chunk, rows - begin));
                const bool first = u == 0 && begin == 0, last = u == plan.use_count - 1 && begin + chunk >= rows;
                if (plan.with_signed)
                    add_chunk<true>(steps, first, last, group);
                else
                    add_chunk<false>(steps, first, last, group);
            }
        }
    }

    void finish(double* sums, double unit, const MomentMapPointers& maps) const {
        for (int64_t tile = 0; tile < row_tiles * column_tiles; ++tile) {
            const int64_t row = first_row_tile + tile % row_tiles, column = first_column_tile + tile / row_tiles;
            const int64_t number = (channel_group * blocking.row_tiles + row) * blocking.column_tiles + column;
            double* const place = sums + number * kMomentSums;
            for (int s = 0; s < kMomentSums; ++s) place[s] = 0;
            if (plan.with_signed)
                sum_moments<true>(state(tile), kTileWeights, plan.groups, place);
            else
                sum_moments<false>(state(tile), kTileWeights, plan.groups, place);
            if (plan.weight.data != nullptr) add_weight(tile, row * kTileRows, column * kTileColumns, place);
            if (maps.sigma != nullptr) write_tile(tile, row * kTileRows, column * kTileColumns, unit, maps);
        }
    }

    void add_weight(int64_t tile, int64_t row, int64_t column, double* sums) const {
        const int64_t height = least(kTileRows, plan.weight_rows - row);
        const int64_t width = least(kTileColumns, plan.weight_columns - column);
        sum_saliencies(state(tile), kTileColumns, plan.weight, channel_group * plan.weight_rows + row, height, column,
                       width, sums);
    }

    void write_tile(int64_t tile, int64_t row, int64_t column, double unit, const MomentMapPointers& maps) const {
        const int64_t width = least(kTileColumns, plan.weight_columns - column);
        for (int64_t m = 0; m < least(kTileRows, plan.weight_rows - row); ++m) {
            const int64_t place = (channel_group * plan.weight_rows + row + m) * plan.weight_columns + column;
            write_maps(state(tile), m * kTileColumns, width, plan.groups, unit, maps, place);
        }
    }
};

template <typename Packed, typename Sum, typename Real>
void run_blocks(const GradientMomentsPlan& plan, const Blocking& blocking, char* workspace, const float* scales,
                double unit, const MomentMapPointers& maps) {
    double* const sums = reinterpret_cast<double*>(workspace);
    char* const memory = workspace + round_up(blocking.tiles(plan) * kMomentSums * 8);
    const int64_t items = blocking.items(plan), blocks = blocking.row_blocks * blocking.column_blocks;
#pragma omp parallel num_threads(plan.threads)
    {
        char* const mine = memory + thread_number() * blocking.thread_bytes;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t item = 0; item < items; ++item) {
            const int64_t row_tile = item % blocks / blocking.column_blocks * blocking.block_row_tiles;
            const int64_t column_tile = item % blocks % blocking.column_blocks * blocking.block_column_tiles;
            const Block<Packed, Sum, Real> block{
                plan,
                blocking,
                scales,
                mine,
                item / blocks,
                row_tile,
                column_tile,
                least(blocking.block_row_tiles, blocking.row_tiles - row_tile),
                least(blocking.block_column_tiles, blocking.column_tiles - column_tile)};
            for (int64_t group = 0; group < plan.groups; ++group) block.add_group(group);
            block.finish(sums, unit, maps);
        }
    }
}

struct Scales {
    float factors[2];  // of inputs and output gradients
    int64_t exponent = 0;
    bool certain = true;  // no more could be learnt from the pieces not looked at

    Scales(const GradientMomentsPlan& plan, int64_t every) {
        uint32_t largest[2] = {0, 0};  // as bits, in whose order NaN is above infinity
        for (int u = 0; u < plan.use_count; ++u) {
            const Tensor* const tensors[2] = {&plan.uses[u].inputs.tensor, &plan.uses[u].output_grads.tensor};
            for (int side = 0; side < 2; ++side) {
                const uint32_t found = largest_magnitude(*tensors[side], every, plan.threads);
                largest[side] = found > largest[side] ? found : largest[side];
            }
        }
        for (int side = 0; side < 2; ++side) {
            factors[side] = __builtin_ldexpf(1, scale_exponent(largest[side]));
            exponent += scale_exponent(largest[side]);
            certain = certain && (every == 1 || (largest[side] > 0 && largest[side] < kInfinityBits));
        }
    }
};

void run_blocks_or_depthwise(const GradientMomentsPlan& plan, const Scales& scales, void* workspace,
                             const MomentMapPointers& maps, MomentResults* results) {
    const double unit = __builtin_ldexp(1, static_cast<int>(-scales.exponent)) * static_cast<double>(plan.groups) /
                        static_cast<double>(plan.samples);
    *results = MomentResults();
    results->exponent = scales.exponent;
    if (plan.depthwise) return depthwise_moments(plan, workspace, scales.factors, unit, maps, results);
    const Blocking blocking(plan);
    char* const memory = static_cast<char*>(workspace);
#if defined(__AVX512BF16__)
    using PackedBfloat16 = uint32_t;
#else
    using PackedBfloat16 = float;
#endif
    auto run = blocking.wide ? run_blocks<float, float, double> : run_blocks<float, float, float>;
    if (sums_in_float64(plan)) run = run_blocks<float, double, double>;
    if (all_bfloat16(plan))
        run = blocking.wide ? run_blocks<PackedBfloat16, float, double> : run_blocks<PackedBfloat16, float, float>;
    run(plan, blocking, memory, scales.factors, unit, maps);
    const double* const sums = static_cast<const double*>(workspace);
    for (int64_t tile = 0; tile < blocking.tiles(plan); ++tile)
        for (int s = 0; s < kMomentSums; ++s) results->sums[s] += sums[tile * kMomentSums + s];
}

bool all_finite(const MomentResults& results) {
    bool finite = true;
    for (const double sum : results.sums) finite = finite && is_finite(sum);
    return finite;
}

}  // namespace

void gradient_moments_workspace(const GradientMomentsPlan& plan, int64_t* bytes) {
    if (plan.depthwise) return depthwise_workspace(plan, bytes);
    const Blocking blocking(plan);
    *bytes = round_up(blocking.tiles(plan) * kMomentSums * 8) + plan.threads * blocking.thread_bytes;
}

// A scale needs the largest magnitude to a factor of 2^40 or so: one piece in 32 of the operands tells it, for next to
// no memory traffic. Should it not, a product, sum or difference overflows, which makes one of the sums over the
// weights infinite or NaN, and every piece is looked at.
void gradient_moments(const GradientMomentsPlan& plan, void* workspace, const MomentMapPointers& maps,
                      MomentResults* results) {
    const Scales sampled(plan, 32);
    if (sampled.certain) {
        run_blocks_or_depthwise(plan, sampled, workspace, maps, results);
        if (all_finite(*results)) return;
    }
    run_blocks_or_depthwise(plan, Scales(plan, 1), workspace, maps, results);
}

}  // namespace LSWAG_ISA
}  // namespace lswag
