// Exact counts of distinct patterns, of all activations together and of each.
//
// 1. dedupe_tile: the patterns of a tile meet in a hash set; the first of each becomes an entry. However often a
//    pattern occurs, no later step sees it more than once a tile.
// 2. scan and scatter: entries are grouped by the upper bits of their hash into partitions of some 700.
// 3. count_partitions: a block adds a partition to a hash set in shared memory. Where that takes too many steps, the
//    partition is split in two by the next bit, of the hash and then of the patterns themselves, and so on: patterns
//    made to collide cost time (n log n), never exactness.
//
// An entry is 32 bits of hash above the number of a position (plus 1, so that 0 is an empty slot). Sets compare whole
// patterns through that number; words are written before these kernels run, so that nothing compared can change.
//
// Bytes: 8 W a position read, 8 an entry written, read, written, read. Floor for AutoFormer-Tiny (S = 64, 2.5 M
// positions): 100 MB, most of them in the L2 cache: 23 us at 4.3 TB/s.
#pragma once

#include "pattern_sources.cuh"

namespace lswag {
namespace cuda {

constexpr int kCountThreads = 256;
constexpr int kMaxPartitionBits = 20;
constexpr int kMaxSplits = 32 + 1024;  // the bits of a hash and of a pattern
constexpr int kMaskBits = 32;          // the activations that are counted at a time

struct CountTask {
    Sources sources;
    int64_t tiles;
    int bits;              // 2^bits partitions
    uint32_t* ends;        // [2^bits] sizes of partitions, then starts, then ends
    uint64_t* entries[2];  // [tiles * kTile] each; 1 by tile, with zeros; 0 by partition; and both while splitting
    int64_t* counts;       // [1 + activations], zeroed before: of all, of each
};

LSWAG_DEVICE uint32_t fingerprint(uint64_t entry) { return static_cast<uint32_t>(entry >> 32); }
LSWAG_DEVICE int64_t position_number(uint64_t entry) { return static_cast<int64_t>(static_cast<uint32_t>(entry)) - 1; }
LSWAG_DEVICE uint32_t partition_of(uint64_t entry, int bits) {
    return bits == 0 ? 0u : static_cast<uint32_t>(entry >> (64 - bits));
}

LSWAG_DEVICE uint64_t make_entry(const Sources& sources, const Source& source, int64_t position) {
    uint64_t hash = 0;
    for (int w = 0; w < sources.width(); ++w) {
        hash = (hash ^ sources.word(source, position, w)) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 32;
    }
    const uint64_t number = static_cast<uint64_t>(source.first_tile * kTile + position + 1);
    return (hash * 0xd6e8feb86659fd93u & 0xffffffff00000000u) | number;
}

LSWAG_DEVICE bool equal_patterns(const Sources& sources, uint64_t x, uint64_t y) {
    const int64_t p = position_number(x), q = position_number(y);
    const Source& left = sources.sources[sources.activation_of(p / kTile)];
    const Source& right = sources.sources[sources.activation_of(q / kTile)];
    for (int w = 0; w < sources.width(); ++w)
        if (sources.word(left, p - left.first_tile * kTile, w) != sources.word(right, q - right.first_tile * kTile, w))
            return false;
    return true;
}

// What became of an entry in a set of 2^kBits slots: its slot, and whether it is the first of its pattern there.
struct Found {
    int slot;  // -1: not found within the steps
    bool fresh;
};

// Open addressing, by any number of threads at once: slots are filled and never emptied.
template <int kBits>
LSWAG_DEVICE Found find_or_insert(const Sources& sources, uint64_t* slots, uint64_t entry, int steps) {
    uint32_t slot = fingerprint(entry) * 0x9e3779b1u >> (32 - kBits);
    for (int i = 0; i < steps; ++i, slot = (slot + 1) & ((1u << kBits) - 1)) {
        uint64_t there = load_shared(slots + slot);
        if (there == 0) there = compare_exchange(slots + slot, 0, entry);
        if (there == 0) return {static_cast<int>(slot), true};
        if (there == entry) return {static_cast<int>(slot), false};
        if (fingerprint(there) == fingerprint(entry) && equal_patterns(sources, there, entry))
            return {static_cast<int>(slot), false};
    }
    return {-1, false};
}

constexpr int kTileBits = 11;  // twice as many slots as positions
struct TileShared {
    uint64_t slots[1 << kTileBits];
    uint64_t entries[kTile];
};

template <class Block>
LSWAG_DEVICE void dedupe_tile(const Block& block, const CountTask& task, int64_t tile, TileShared& shared) {
    const Source source = task.sources.sources[task.sources.activation_of(tile)];
    const int64_t first = (tile - source.first_tile) * kTile;
    for (int i = block.thread; i < 1 << kTileBits; i += block.threads) shared.slots[i] = 0;
    // Apart from the insertions, so that the words of several positions are on their way at once.
    for (int i = block.thread; i < kTile; i += block.threads)
        shared.entries[i] = first + i < source.positions ? make_entry(task.sources, source, first + i) : 0;
    block.sync();
    for (int i = block.thread; i < kTile; i += block.threads) {
        uint64_t entry = shared.entries[i];
        if (entry != 0 && !find_or_insert<kTileBits>(task.sources, shared.slots, entry, 1 << kTileBits).fresh)
            entry = 0;
        task.entries[1][tile * kTile + i] = entry;
        if (entry != 0) fetch_add(task.ends + partition_of(entry, task.bits), 1);
    }
}

constexpr int kScanThreads = 1024;
struct ScanShared {
    uint32_t sums[2][kScanThreads];
};

// Turns the partitions' sizes into their starts, in one block.
template <class Block>
LSWAG_DEVICE void scan_partitions(const Block& block, const CountTask& task, ScanShared& shared) {
    const int partitions = 1 << task.bits;
    const int share = (partitions + kScanThreads - 1) / kScanThreads;
    for (int i = block.thread; i < kScanThreads; i += block.threads) {
        uint32_t sum = 0;
        for (int k = i * share; k < (i + 1) * share && k < partitions; ++k) sum += task.ends[k];
        shared.sums[0][i] = sum;
    }
    int now = 0;
    for (int step = 1; step < kScanThreads; step *= 2, now = 1 - now) {
        block.sync();
        for (int i = block.thread; i < kScanThreads; i += block.threads)
            shared.sums[1 - now][i] = shared.sums[now][i] + (i >= step ? shared.sums[now][i - step] : 0);
    }
    block.sync();
    for (int i = block.thread; i < kScanThreads; i += block.threads) {
        uint32_t start = i > 0 ? shared.sums[now][i - 1] : 0;
        for (int k = i * share; k < (i + 1) * share && k < partitions; ++k) {
            const uint32_t size = task.ends[k];
            task.ends[k] = start;
            start += size;
        }
    }
}

template <class Block>
LSWAG_DEVICE void scatter_tile(const Block& block, const CountTask& task, int64_t tile) {
    for (int i = block.thread; i < kTile; i += block.threads) {
        const uint64_t entry = task.entries[1][tile * kTile + i];
        if (entry != 0) task.entries[0][fetch_add(task.ends + partition_of(entry, task.bits), 1)] = entry;
    }
}

// kBits, kSteps: the slots of a set, and how many of them are tried for one entry.
template <int kBits>
struct CountShared {
    uint64_t slots[1 << kBits];
    uint32_t masks[1 << kBits];  // the activations that have a slot's pattern
    uint32_t distinct;
    uint32_t by_activation[kMaskBits];
    uint32_t overflow;
    uint32_t sizes[2];
    uint32_t ends[kMaxSplits];  // of the ranges that were split off and are to come
    uint16_t splits[kMaxSplits];
};

// Entries [begin, end) of the buffer of their number of splits: they agree in their partition's bits and the next
// `splits` bits.
struct Range {
    uint32_t begin, end;
    int splits;
};

template <int kBits, int kSteps>
class PartitionCounter {
 public:
    LSWAG_DEVICE PartitionCounter(const CountTask& task, CountShared<kBits>& shared) : task_(task), shared_(shared) {}

    template <class Block>
    LSWAG_DEVICE void count(const Block& block, int partition) {
        Range range = {partition > 0 ? task_.ends[partition - 1] : 0, task_.ends[partition], 0};
        const uint32_t last = range.end;
        int pending = 0;
        while (true) {
            if (count_range(block, range)) {
                if (range.end == last) break;
                --pending;
                range = {range.end, shared_.ends[pending], shared_.splits[pending]};
            } else {
                const uint32_t middle = split(block, range);
                if (block.thread == 0) {
                    shared_.ends[pending] = range.end;
                    shared_.splits[pending] = static_cast<uint16_t>(range.splits + 1);
                }
                ++pending;
                range = {range.begin, middle, range.splits + 1};
            }
            block.sync();
        }
    }

 private:
    LSWAG_DEVICE uint64_t* buffer(int splits) const { return task_.entries[splits % 2]; }

    // Adds the counts of a range, or none and returns false where the set overflows.
    template <class Block>
    LSWAG_DEVICE bool count_range(const Block& block, const Range& range) {
        if (range.begin == range.end) return true;
        for (int i = block.thread; i < 1 << kBits; i += block.threads) shared_.slots[i] = 0;
        if (block.thread == 0) shared_.distinct = shared_.overflow = 0;
        const int passes = (task_.sources.activations + kMaskBits - 1) / kMaskBits;
        if (passes > 1) {
            block.sync();
            insert(block, range, -1);
        }
        for (int pass = 0; pass < passes; ++pass) {
            block.sync();
            if (load_shared(&shared_.overflow) != 0) break;
            for (int i = block.thread; i < 1 << kBits; i += block.threads) shared_.masks[i] = 0;
            for (int i = block.thread; i < kMaskBits; i += block.threads) shared_.by_activation[i] = 0;
            block.sync();
            insert(block, range, pass);
            block.sync();
            if (load_shared(&shared_.overflow) != 0) break;
            for (int i = block.thread; i < kMaskBits; i += block.threads)
                if (shared_.by_activation[i] != 0)
                    add(task_.counts + 1 + pass * kMaskBits + i, shared_.by_activation[i]);
        }
        const bool counted = load_shared(&shared_.overflow) == 0;
        if (counted && block.thread == 0) add(task_.counts, shared_.distinct);
        block.sync();
        return counted;
    }

    // Inserts all entries, and marks those of the activations of a pass.
    template <class Block>
    LSWAG_DEVICE void insert(const Block& block, const Range& range, int pass) {
        const uint64_t* entries = buffer(range.splits);
        const Sources& sources = task_.sources;
        for (int64_t i = range.begin + int64_t{block.thread}; i < range.end; i += block.threads) {
            if (load_shared(&shared_.overflow) != 0) return;
            const uint64_t entry = entries[i];
            const int activation = sources.activation_of(position_number(entry) / kTile);
            if (pass >= 0 && activation / kMaskBits != pass) continue;
            const Found found = find_or_insert<kBits>(sources, shared_.slots, entry, kSteps);
            if (found.slot < 0) return store_shared(&shared_.overflow, uint32_t{1});
            if (found.fresh) fetch_add(&shared_.distinct, 1);
            const uint32_t bit = 1u << activation % kMaskBits;
            if (pass >= 0 && (fetch_or(shared_.masks + found.slot, bit) & bit) == 0)
                fetch_add(shared_.by_activation + activation % kMaskBits, 1);
        }
    }

    // Moves a range to the other buffer, those whose next bit is 0 first, and returns where the others begin.
    template <class Block>
    LSWAG_DEVICE uint32_t split(const Block& block, const Range& range) {
        if (block.thread == 0) shared_.sizes[0] = shared_.sizes[1] = 0;
        block.sync();
        const uint64_t* from = buffer(range.splits);
        uint64_t* to = buffer(range.splits + 1);
        for (int64_t i = range.begin + int64_t{block.thread}; i < range.end; i += block.threads) {
            const uint64_t entry = from[i];
            if (next_bit(entry, range.splits))
                to[range.end - 1 - fetch_add(shared_.sizes + 1, 1)] = entry;
            else
                to[range.begin + fetch_add(shared_.sizes, 1)] = entry;
        }
        block.sync();
        return range.begin + shared_.sizes[0];
    }

    LSWAG_DEVICE bool next_bit(uint64_t entry, int splits) const {
        const int bit = task_.bits + splits;
        if (bit < 32) return (fingerprint(entry) >> (31 - bit) & 1u) != 0;
        const int64_t number = position_number(entry);
        const Source& source = task_.sources.sources[task_.sources.activation_of(number / kTile)];
        const int sample = bit - 32;
        return (task_.sources.word(source, number - source.first_tile * kTile, sample / 64) >> sample % 64 & 1) != 0;
    }

    const CountTask& task_;
    CountShared<kBits>& shared_;
};

}  // namespace cuda
}  // namespace lswag
