// A Hopper block on the CPU: the class that kernels of hopper.cuh are templates over, for tests. A thread is a
// coroutine; barriers, asynchronous copies and matrix products do what the PTX ISA says of them, as early, as late or
// as mixed up as it allows.
//
// Ends the process, where: all threads wait for ever; a product reads shared memory that its threads have not made
// visible to it, or that was overwritten since; a descriptor is none of a 128-byte swizzle that begins at a pattern; a
// copy reads outside its operand; threads of a warpgroup ask for different products; registers are multiplied into
// without a fence; a thread ends before its copies. Sums are NaN until products have ended.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "hopper.cuh"

namespace lswag {
namespace cuda {

constexpr size_t kStackBytes = 128 * 1024;
enum Timing { kEarly, kLate, kMixed };
using Operands = std::vector<std::pair<char*, size_t>>;

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "%s\n", what);
    exit(4);
}

inline void require(bool condition, const char* what) {
    if (!condition) fail(what);
}

struct MBarrier {
    int count = 0;
    int pending = 0;
    uint32_t phase = 0;
};

struct NamedBarrier {
    int threads = 0;
    int arrived = 0;
    int phase = 0;
};

struct Copy {
    uint32_t barrier;  // where this is an arrival, not a copy
    uint32_t to;
    const char* from;
    bool live;
};

struct Product {
    uint64_t d, a;
    bool accumulate;
    bool half;
    int64_t visible;  // what was written before is seen
};

struct Fiber {
    int thread = 0;
    bool done = false;
    std::function<bool()> waits_for;
    ucontext_t context;
    std::deque<Copy> copies;
    std::deque<std::vector<Product>> products;  // committed groups, and the open one last
    float sums[64];                             // what the registers will hold
    float* registers = nullptr;                 // while products are under way
    bool fenced = false;
    int64_t visible = 0;
    uint64_t asked = 0;  // a hash of all products
};

class Block {
 public:
    // `begin` and `bytes` are those of the memory for copies; barriers have any other address.
    Block(int number, int blocks, int threads, uint32_t begin, uint32_t bytes, Timing timing, uint64_t seed,
          const Operands& operands)
        : number(number),
          blocks(blocks),
          threads(threads),
          exchanged(threads),
          begin_(begin),
          timing_(timing),
          random_(seed),
          operands_(operands),
          memory_(bytes, 0xff),  // NaN in either type
          written_(bytes / 16, 0) {}

    template <class Body>
    void run(Body body) {
        body_ = body;
        stacks_.resize(threads * kStackBytes);
        fibers_.resize(threads);
        for (int t = 0; t < threads; ++t) {
            Fiber& fiber = fibers_[t];
            fiber.thread = t;
            fiber.products.resize(1);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = stacks_.data() + t * kStackBytes;
            fiber.context.uc_stack.ss_size = kStackBytes;
            fiber.context.uc_link = &scheduler_;
            const uintptr_t self = reinterpret_cast<uintptr_t>(this);
            makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 2,
                        static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
        }
        schedule();
        for (int t = kWarpgroup; t < threads; ++t) {
            require(fibers_[t].asked == fibers_[t / kWarpgroup * kWarpgroup].asked, "a warpgroup is not of one mind");
            require(fibers_[t].registers == nullptr, "products were never waited for");
        }
    }

    Fiber& fiber() { return *current_; }

    void wait_until(std::function<bool()> condition) {
        if (condition() && !sometimes(8)) return;
        current_->waits_for = std::move(condition);
        leave();
    }
    void maybe_yield() {
        if (sometimes(64)) wait_until([] { return true; });
    }

    void add_copy(Copy copy) {
        current_->copies.push_back(copy);
        if (timing_ == kEarly) finish_copies(*current_);
        maybe_yield();
    }
    void finish_copies(Fiber& fiber) {
        while (!fiber.copies.empty()) finish_one_copy(fiber);
    }

    void multiply(float* registers, Product product) {
        Fiber& fiber = *current_;
        require(fiber.fenced, "registers were not fenced before a product");
        require(fiber.registers == nullptr || fiber.registers == registers, "two sets of registers");
        if (fiber.registers == nullptr) {
            fiber.registers = registers;
            std::copy_n(registers, 64, fiber.sums);
            std::fill_n(registers, 64, std::numeric_limits<float>::quiet_NaN());
        }
        product.visible = fiber.visible;
        fiber.asked = (fiber.asked ^ product.d) * 0x9e3779b97f4a7c15u;
        fiber.asked = (fiber.asked ^ product.a ^ product.accumulate) * 0xd6e8feb86659fd93u;
        fiber.products.back().push_back(product);
        maybe_yield();
    }
    void commit_products() {
        current_->products.emplace_back();
        if (timing_ == kEarly) finish_products(*current_, 1);
        maybe_yield();
    }
    // All but so many groups, the open one counted.
    void finish_products(Fiber& fiber, size_t left) {
        for (; fiber.products.size() > left; fiber.products.pop_front())
            for (const Product& product : fiber.products.front()) compute(fiber, product);
    }

    void show_copies() { current_->visible = now_; }

    MBarrier& barrier(uint32_t at) { return barriers_[at]; }
    void arrive(uint32_t at) {
        MBarrier& barrier = barriers_.at(at);
        if (--barrier.pending == 0) {
            barrier.pending = barrier.count;
            ++barrier.phase;
        }
    }
    int arrive_named(int id, int threads) {
        NamedBarrier& barrier = named_[id];
        require(barrier.arrived == 0 || barrier.threads == threads, "a barrier with two sizes");
        barrier.threads = threads;
        const int phase = barrier.phase;
        if (++barrier.arrived == threads) {
            barrier.arrived = 0;
            ++barrier.phase;
        }
        return phase;
    }
    void sync_named(int id, int threads) {
        const int phase = arrive_named(id, threads);
        wait_until([this, id, phase] { return named_[id].phase != phase; });
    }

    const int number;
    const int blocks;
    const int threads;
    std::vector<double> exchanged;

 private:
    static void enter(unsigned high, unsigned low) {
        Block* const block = reinterpret_cast<Block*>(uintptr_t{high} << 32 | low);
        block->body_();
        require(block->current_->copies.empty(), "a thread ended before its copies did");
        block->current_->done = true;
    }
    void leave() { swapcontext(&current_->context, &scheduler_); }
    bool sometimes(int one_in) { return timing_ == kMixed && random_() % one_in == 0; }

    void schedule() {
        std::vector<int> order(threads);
        for (int t = 0; t < threads; ++t) order[t] = t;
        for (;;) {
            bool over = true, moved = false;
            if (timing_ == kMixed) std::shuffle(order.begin(), order.end(), random_);
            for (const int t : order) {
                Fiber& fiber = fibers_[t];
                if (timing_ == kMixed) advance_some(fiber);
                if (fiber.done) continue;
                over = false;
                if (fiber.waits_for && !fiber.waits_for()) continue;
                fiber.waits_for = nullptr;
                moved = true;
                current_ = &fiber;
                swapcontext(&scheduler_, &fiber.context);
            }
            if (over) return;
            if (!moved && !advance_one()) fail("all threads wait for ever");
        }
    }
    void advance_some(Fiber& fiber) {
        for (uint64_t n = random_() % 24; n > 0 && !fiber.copies.empty(); --n) finish_one_copy(fiber);
        if (random_() % 2 == 0 && fiber.products.size() > 1) finish_products(fiber, fiber.products.size() - 1);
    }
    // Some thread's copies up to an arrival.
    bool advance_one() {
        const size_t first = random_() % fibers_.size();
        for (size_t n = 0; n < fibers_.size(); ++n) {
            Fiber& fiber = fibers_[(first + n) % fibers_.size()];
            for (bool copied = false; !fiber.copies.empty(); copied = true)
                if (finish_one_copy(fiber))
                    return true;
                else if (copied && fiber.copies.empty())
                    return true;
        }
        return false;
    }

    // Returns whether it was an arrival.
    bool finish_one_copy(Fiber& fiber) {
        const Copy copy = fiber.copies.front();
        fiber.copies.pop_front();
        if (copy.barrier != 0) {
            arrive(copy.barrier);
            return true;
        }
        require(copy.to % 16 == 0 && copy.to >= begin_ && copy.to - begin_ < memory_.size(), "a copy to nowhere");
        char bytes[16] = {};
        if (copy.live) {
            const bool inside = std::any_of(operands_.begin(), operands_.end(), [&](const auto& operand) {
                return copy.from >= operand.first && copy.from + 16 <= operand.first + operand.second;
            });
            require(inside, "a copy reads outside its operand");
            require(reinterpret_cast<uintptr_t>(copy.from) % 16 == 0, "a copy from an odd address");
            memcpy(bytes, copy.from, 16);
        }
        memcpy(memory_.data() + (copy.to - begin_), bytes, 16);
        written_[(copy.to - begin_) / 16] = ++now_;
        return false;
    }

    // Element (mn, k) of the matrix of a descriptor, of 16 bits, MN-major: ((8, 8, m), (8, k)) elements with strides
    // ((1, 8, LBO), (64, SBO)), and of that address bits 4 to 6 exclusive or bits 7 to 9.
    float element(uint64_t descriptor, int mn, int k, const Product& product) const {
        const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
        const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
        const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
        require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0 && start % 1024 == 0,
                "a descriptor of another kind");
        uint32_t address = start + mn % 64 * 2 + mn / 64 * leading + k % 8 * 128 + k / 8 * stride;
        address ^= (address >> 7 & 7) << 4;
        require(address >= begin_ && address - begin_ < memory_.size(), "a product reads elsewhere");
        const uint32_t place = address - begin_;
        require(written_[place / 16] != 0, "a product reads what nothing wrote");
        require(written_[place / 16] <= product.visible, "a product reads what it does not see yet, or no more");
        uint16_t bits;
        memcpy(&bits, memory_.data() + place, 2);
        if (product.half) {
            _Float16 value;
            memcpy(&value, &bits, 2);
            return static_cast<float>(value);
        }
        const uint32_t wide = uint32_t{bits} << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    }

    // A thread's fragment of D [64, 128]: of every 8 columns two, in two rows.
    void compute(Fiber& fiber, const Product& product) const {
        const int warp = fiber.thread % kWarpgroup / 32, lane = fiber.thread % 32;
        for (int pair = 0; pair < 2; ++pair) {
            const int row = warp * 16 + lane / 4 + 8 * pair;
            float d[16];
            for (int k = 0; k < 16; ++k) d[k] = element(product.d, row, k, product);
            for (int n = 0; n < 32; ++n) {
                const int column = n / 2 * 8 + lane % 4 * 2 + n % 2;
                float& sum = fiber.sums[n / 2 * 4 + pair * 2 + n % 2];
                if (!product.accumulate) sum = 0;
                for (int k = 0; k < 16; ++k) sum += d[k] * element(product.a, column, k, product);
            }
        }
    }

    const uint32_t begin_;
    const Timing timing_;
    std::mt19937_64 random_;
    const Operands& operands_;
    std::vector<unsigned char> memory_;
    std::vector<int64_t> written_;  // when each 16 bytes were
    int64_t now_ = 0;
    std::function<void()> body_;
    std::vector<char> stacks_;
    std::vector<Fiber> fibers_;
    Fiber* current_ = nullptr;
    ucontext_t scheduler_;
    std::map<uint32_t, MBarrier> barriers_;
    std::map<int, NamedBarrier> named_;
};

class Emulated {
 public:
    explicit Emulated(Block& block) : block_(block), thread_(block.fiber().thread) {}
    int thread() const { return thread_; }
    int block() const { return block_.number; }
    int blocks() const { return block_.blocks; }
    void sync() const { block_.sync_named(0, block_.threads); }
    void sync_some(int barrier, int threads) const { block_.sync_named(barrier, threads); }
    void arrive_at_some(int barrier, int threads) const { block_.arrive_named(barrier, threads); }
    // Instructions that are `.sync`, too, wait for all threads of the warp.
    void sync_warp() const { block_.sync_named(16 + thread_ / 32, 32); }
    void make_barrier(uint32_t at, int arrivals) const { block_.barrier(at) = {arrivals, arrivals, 0}; }
    void arrive(uint32_t at) const {
        block_.maybe_yield();
        block_.arrive(at);
    }
    void wait(uint32_t at, uint32_t parity) const {
        block_.wait_until([this, at, parity] { return (block_.barrier(at).phase & 1) != parity; });
    }
    void copy(uint32_t to, const void* from, bool live) const {
        block_.add_copy({0, to, static_cast<const char*>(from), live});
    }
    void arrive_when_copied(uint32_t at) const { block_.add_copy({at, 0, nullptr, false}); }
    void wait_for_copies() const { block_.finish_copies(block_.fiber()); }
    void show_copies_to_products() const { block_.show_copies(); }
    void begin_products() const { block_.fiber().fenced = true; }
    void commit_products() const { block_.commit_products(); }
    void wait_for_all_but_last() const {
        block_.finish_products(block_.fiber(), 2);
        sync_warp();
    }
    template <class Type>
    void multiply(float (&sums)[64], uint32_t d, uint32_t a, bool accumulate) const {
        const uint64_t upper = uint64_t{kUpperDescriptor} << 32;
        block_.multiply(sums, {upper | d, upper | a, accumulate, std::is_same<Type, Float16Product>::value, 0});
    }
    void finish_products(float (&sums)[64]) const {
        Fiber& fiber = block_.fiber();
        require(fiber.products.back().empty(), "products were waited for before they were committed");
        block_.finish_products(fiber, 1);
        require(fiber.registers == sums, "other registers");
        std::copy_n(fiber.sums, 64, sums);
        fiber.registers = nullptr;
        fiber.fenced = false;
        sync_warp();
    }
    template <int kRegisters>
    void give_registers() const {}
    template <int kRegisters>
    void take_registers() const {}
    double from_above(double x, int lanes) const {
        block_.exchanged[thread_] = x;
        sync_warp();
        const double found = thread_ % 32 + lanes < 32 ? block_.exchanged[thread_ + lanes] : x;
        sync_warp();
        return found;
    }
    int uniform(int x) const { return x; }
    float inverse_root(float x) const { return 1.0f / std::sqrt(x); }

 private:
    Block& block_;
    const int thread_;
};

}  // namespace cuda
}  // namespace lswag
