// Runs the block algorithms of csrc/cuda on threads of the CPU: a block is some threads with a barrier, its shared
// memory is filled with rubbish first, and blocks run one after the other in an order that differs from case to case.
//
// Reads cases from standard input and writes results to standard output, in binary; test_patterns_on_host.py does both.
// Meant to be compiled with -fsanitize=address,undefined or -fsanitize=thread.
#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "packing_plan.h"
#include "pattern_agreement.cuh"
#include "pattern_count.cuh"

using namespace lswag;
using namespace lswag::cuda;

namespace {

class Barrier {
 public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const int64_t round = round_;
        if (++waiting_ == threads_) {
            waiting_ = 0;
            ++round_;
            all_.notify_all();
        }
        all_.wait(lock, [&] { return round != round_; });
    }

 private:
    const int threads_;
    int waiting_ = 0;
    int64_t round_ = 0;
    std::mutex mutex_;
    std::condition_variable all_;
};

struct HostBlock {
    int thread;
    int threads;
    Barrier* barrier;
    void sync() const {
        if (threads > 1) barrier->wait();
    }
};

int block_threads = 1;
std::mt19937_64 order_of_blocks;

// Calls body(block, number, shared) for every block of a grid. The threads live as long as the grid.
template <class Shared, class Body>
void launch(int64_t blocks, Body body) {
    std::vector<int64_t> order(blocks);
    for (int64_t b = 0; b < blocks; ++b) order[b] = b;
    std::shuffle(order.begin(), order.end(), order_of_blocks);
    const std::unique_ptr<Shared> shared(new Shared);
    Barrier barrier(block_threads);
    const auto run = [&](int thread) {
        const HostBlock block = {thread, block_threads, &barrier};
        for (const int64_t b : order) {
            if (thread == 0) memset(static_cast<void*>(shared.get()), 0xa5, sizeof(Shared));
            block.sync();
            body(block, b, *shared);
            block.sync();
        }
    };
    std::vector<std::thread> others;
    for (int t = 1; t < block_threads; ++t) others.emplace_back(run, t);
    run(0);
    for (std::thread& other : others) other.join();
}

struct NoShared {
    int nothing;
};

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

template <class T>
void write_vector(const std::vector<T>& values) {
    fwrite(values.data(), sizeof(T), values.size(), stdout);
}

struct HostSources {
    std::vector<std::vector<uint64_t>> words;
    std::vector<Source> table;
    int64_t tiles = 0;
    int64_t positions = 0;
    int samples = 0;

    HostSources() {
        samples = static_cast<int>(read_number());
        const int64_t activations = read_number();
        for (int64_t a = 0; a < activations; ++a) {
            const int64_t here = read_number();
            words.push_back(read_vector<uint64_t>((samples + 63) / 64 * here));
            table.push_back({nullptr, here, tiles});
            tiles += (here + kTile - 1) / kTile;
            positions += here;
        }
        for (int64_t a = 0; a < activations; ++a) table[a].words = words[a].data();
    }
    Sources sources() const { return {table.data(), static_cast<int>(table.size()), samples}; }
};

template <int kBits, int kSteps>
void count(const HostSources& host, int bits) {
    std::vector<uint32_t> ends(int64_t{1} << bits);
    std::vector<uint64_t> entries[2];
    for (auto& buffer : entries) buffer.assign(host.tiles * kTile, 0xa5a5a5a5a5a5a5a5u);
    std::vector<int64_t> counts(1 + host.table.size());
    CountTask task = {};
    task.sources = host.sources();
    task.tiles = host.tiles;
    task.bits = bits;
    task.ends = ends.data();
    for (int i = 0; i < 2; ++i) task.entries[i] = entries[i].data();
    task.counts = counts.data();
    launch<TileShared>(host.tiles, [&](const HostBlock& block, int64_t b, TileShared& shared) {
        dedupe_tile(block, task, b, shared);
    });
    launch<ScanShared>(
        1, [&](const HostBlock& block, int64_t, ScanShared& shared) { scan_partitions(block, task, shared); });
    launch<NoShared>(host.tiles, [&](const HostBlock& block, int64_t b, NoShared&) { scatter_tile(block, task, b); });
    launch<CountShared<kBits>>(int64_t{1} << bits, [&](const HostBlock& block, int64_t b, CountShared<kBits>& shared) {
        PartitionCounter<kBits, kSteps>(task, shared).count(block, static_cast<int>(b));
    });
    write_vector(counts);
}

void count_case() {
    const int bits = static_cast<int>(read_number());
    const bool small = read_number() != 0;
    const HostSources host;
    small ? count<6, 8>(host, bits) : count<11, 128>(host, bits);
}

void agreement_case() {
    const int64_t blocks = read_number();
    const HostSources host;
    const int64_t words = (host.samples + 63) / 64;
    std::vector<int64_t> agreements(host.samples * host.samples, host.positions);
    const AgreementTask task = {host.sources(), host.tiles, agreements.data()};
    launch<AgreementShared>(blocks * words * words, [&](const HostBlock& block, int64_t b, AgreementShared& shared) {
        const int row = static_cast<int>(b / blocks / words), column = static_cast<int>(b / blocks % words);
        if (column <= row) count_agreements(block, task, row, column, b % blocks, blocks, shared);
    });
    write_vector(agreements);
}

template <Activation kActivation, class T, int kRun>
void pack_run(const PackTask& plan) {
    const int64_t tile = int64_t{kPackWarps / plan.octets} * 32 * kRun;
    const int64_t tiles = (plan.positions + tile - 1) / tile;
    launch<PackShared<kRun>>(tiles * plan.word_rows, [&](const HostBlock& block, int64_t b, PackShared<kRun>& shared) {
        pack_tile<kActivation, T, kRun>(block, plan, b / plan.word_rows, b % plan.word_rows, shared);
    });
}

template <Activation kActivation, class T>
void pack_typed(const PackTask& plan, int run) {
    if (run * T::kBytes == 16) return pack_run<kActivation, T, 16 / T::kBytes>(plan);
    if constexpr (T::kBytes == 2)
        if (run == 4) return pack_run<kActivation, T, 4>(plan);
    pack_run<kActivation, T, 1>(plan);
}

template <class T>
void pack_activation(Activation activation, const PackTask& plan, int run) {
    switch (activation) {
        case Activation::none:
            return pack_typed<Activation::none, T>(plan, run);
        case Activation::relu:
            return pack_typed<Activation::relu, T>(plan, run);
        case Activation::relu6:
            return pack_typed<Activation::relu6, T>(plan, run);
        case Activation::gelu:
            return pack_typed<Activation::gelu, T>(plan, run);
        case Activation::gelu_tanh:
            return pack_typed<Activation::gelu_tanh, T>(plan, run);
        case Activation::silu:
            return pack_typed<Activation::silu, T>(plan, run);
        case Activation::hardswish:
            return pack_typed<Activation::hardswish, T>(plan, run);
    }
}

// A tensor of a buffer of its own; `offset` elements come before its first.
Tensor read_tensor(void* data, DType dtype, int ndim, const std::vector<int64_t>& shape) {
    Tensor tensor;
    tensor.data = static_cast<char*>(data) + read_number() * item_size(dtype);
    tensor.dtype = dtype;
    tensor.ndim = ndim;
    for (int d = 0; d < ndim; ++d) {
        tensor.shape[d] = shape[d];
        tensor.strides[d] = read_number();
    }
    return tensor;
}

void pack_case() {
    SignPacking task;
    task.activation = static_cast<Activation>(read_number());
    const DType dtype = read_number() == 4 ? DType::float32 : DType::bfloat16;
    task.first_sample = read_number();
    task.packed_samples = read_number();
    task.accumulate = read_number() != 0;
    const int ndim = static_cast<int>(read_number());
    const std::vector<int64_t> shape = read_vector<int64_t>(ndim);
    const int64_t bytes = read_number();
    std::vector<char> pre = read_vector<char>(bytes);
    task.pre = read_tensor(pre.data(), dtype, ndim, shape);
    const bool inplace = read_number() != 0;
    std::vector<char> post = read_vector<char>(read_number());
    task.post = read_tensor(inplace ? pre.data() : post.data(), dtype, ndim, shape);
    if (task.activation == Activation::none) task.post = Tensor();
    std::vector<uint64_t> words = read_vector<uint64_t>(read_number());
    task.words = words.data();
    task.positions = 1;
    for (int d = 1; d < ndim; ++d) task.positions *= shape[d];
    task.threads = 1;
    const PackTask plan = plan_packing(task);
    const int run = longest_run(task, plan.order);
    if (plan.word_rows > 0) {
        if (dtype == DType::float32)
            pack_activation<Float32>(task.activation, plan, run);
        else
            pack_activation<BFloat16>(task.activation, plan, run);
    }
    write_vector(inplace ? pre : post);
    write_vector(words);
    write_vector(std::vector<int64_t>{run});
}

}  // namespace

int main(int argc, char** argv) {
    block_threads = argc > 1 ? atoi(argv[1]) : 1;
    for (int64_t cases = read_number(); cases > 0; --cases) {
        switch (read_number()) {
            case 0:
                count_case();
                break;
            case 1:
                agreement_case();
                break;
            default:
                pack_case();
        }
    }
    return 0;
}
