// Counts distinct patterns exactly, in partitions that stay in the L1 cache: by a tag for each possible pattern of a
// partition where there are few samples, else by hash sets. Those compare whole patterns, so a collision of hashes
// costs time, never exactness; a partition made to collide is sorted.
#include "lswag/activation_patterns.h"
#include "pattern_set.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lswag {
namespace LSWAG_ISA {
namespace {

// The calling thread's number, and how many there are, which may be fewer than were asked for.
struct Team {
    int64_t thread = 0;
    int64_t threads = 1;
    Team() {
#if defined(_OPENMP)
        thread = omp_get_thread_num();
        threads = omp_get_num_threads();
#endif
    }
    int64_t begin(int64_t n) const { return n * thread / threads; }
    int64_t end(int64_t n) const { return n * (thread + 1) / threads; }
};

int64_t words_of(const PatternSet& set) { return (set.samples + 63) / 64; }

// The patterns of one activation. Bits at S and beyond are not part of a pattern.
template <int kWords>
struct Patterns {
    const uint64_t* words;  // [W, positions]
    int64_t positions;
    int64_t run_time_width;
    uint64_t last_mask;

    Patterns(const PatternSet& set, int64_t activation)
        : words(set.words[activation]),
          positions(set.positions[activation]),
          run_time_width(words_of(set)),
          last_mask(~uint64_t{0} >> (63 - (set.samples - 1) % 64)) {}

    int64_t width() const { return kWords > 0 ? kWords : run_time_width; }

    uint64_t word(int64_t p, int64_t w) const {
        return words[w * positions + p] & (w + 1 == width() ? last_mask : ~uint64_t{0});
    }
};

// How a pattern is kept in a partition chosen by its hash: whole.
template <int kWords>
struct ByHash {
    Patterns<kWords> patterns;
    int bits;
    uint64_t* out;

    int64_t partition(int64_t p) const {
        uint64_t hash = 0;
        for (int64_t w = 0; w < patterns.width(); ++w) hash = mix(hash, patterns.word(p, w));
        return partition_of(hash, bits);
    }
    void keep(int64_t p, int64_t at) const {
        for (int64_t w = 0; w < patterns.width(); ++w) out[at * patterns.width() + w] = patterns.word(p, w);
    }
};

// How it is kept in a partition that is part of its value: a product with an odd number modulo 2^S is another name of
// the pattern, of which the upper bits are the partition and the others are kept.
struct ByValue {
    Patterns<1> patterns;
    int rest_bits;
    uint16_t* out;

    uint64_t name(int64_t p) const { return patterns.word(p, 0) * 0x9e3779b97f4a7c15u & patterns.last_mask; }
    int64_t partition(int64_t p) const { return static_cast<int64_t>(name(p) >> rest_bits); }
    void keep(int64_t p, int64_t at) const {
        out[at] = static_cast<uint16_t>(name(p) & ((uint64_t{1} << rest_bits) - 1));
    }
};

template <class Kind>
void partition_activation(const PatternPartition& task, int64_t activation, Kind kind) {
    const int64_t positions = task.set.positions[activation];
    const int64_t partitions = int64_t{1} << task.bits;
    int64_t* ends = task.ends + activation * partitions;
#pragma omp parallel num_threads(task.threads) if (positions > 4 * partitions)
    {
        const Team team;
        int64_t* next = task.histograms + team.thread * partitions;
        for (int64_t k = 0; k < partitions; ++k) next[k] = 0;
        for (int64_t p = team.begin(positions); p < team.end(positions); ++p) ++next[kind.partition(p)];
#pragma omp barrier
#pragma omp single
        for (int64_t k = 0, start = 0; k < partitions; ++k) {
            for (int64_t t = 0; t < team.threads; ++t) {
                const int64_t count = task.histograms[t * partitions + k];
                task.histograms[t * partitions + k] = start;
                start += count;
            }
            ends[k] = start;
        }
        for (int64_t p = team.begin(positions); p < team.end(positions); ++p) kind.keep(p, next[kind.partition(p)]++);
    }
}

template <int kWords>
void partition_all(const PatternPartition& task) {
    uint64_t* out = task.patterns;
    for (int64_t a = 0; a < task.set.activations; ++a) {
        partition_activation(task, a, ByHash<kWords>{Patterns<kWords>(task.set, a), task.bits, out});
        out += task.set.positions[a] * words_of(task.set);
    }
}

int64_t partition_size(const PatternPartition& task, int64_t k) {
    const int64_t partitions = int64_t{1} << task.bits;
    int64_t size = 0;
    for (int64_t a = 0; a < task.set.activations; ++a) {
        const int64_t* ends = task.ends + a * partitions;
        size += ends[k] - (k > 0 ? ends[k - 1] : 0);
    }
    return size;
}

// Adds the patterns of a partition to a set, activation by activation, until that returns false.
template <class Set>
bool add_partition(const PatternPartition& task, int64_t k, Set& set) {
    const int64_t partitions = int64_t{1} << task.bits;
    const int64_t width = words_of(task.set);
    const uint64_t* patterns = task.patterns;
    for (int64_t a = 0; a < task.set.activations; ++a) {
        const int64_t* ends = task.ends + a * partitions;
        for (int64_t p = k > 0 ? ends[k - 1] : 0; p < ends[k]; ++p)
            if (!set.add(a, patterns + p * width)) return false;
        patterns += task.set.positions[a] * width;
    }
    return true;
}

// Counts one partition into by_activation, zeroed before, and returns the count of all.
template <int kWords>
int64_t count_partition(const PartitionCount& task, int64_t k, int64_t thread, int64_t* by_activation) {
    const PatternPartition& partition = task.partition;
    const int64_t width = words_of(partition.set);
    uint64_t* keys = task.keys + thread * task.slots * width;
    int32_t* tags = task.tags + thread * task.slots;
    PatternHashSet<kWords> set(width, keys, tags, by_activation);
    set.start(partition_size(partition, k));
    for (int64_t a = 0; a < partition.set.activations; ++a) by_activation[a] = 0;
    if (add_partition(partition, k, set)) return set.size();
    PatternSort sort(width, keys, tags);
    for (int64_t a = 0; a < partition.set.activations; ++a) by_activation[a] = 0;
    add_partition(partition, k, sort);
    return sort.count(by_activation);
}

// Sums each thread's counts: of the activations, then of all.
void sum_threads(const int64_t* counts, int threads, int64_t stride, int64_t activations, int64_t* by_activation,
                 int64_t* of_all) {
    for (int64_t a = 0; a <= activations; ++a) {
        int64_t total = 0;
        for (int64_t t = 0; t < threads; ++t) total += counts[t * stride + a];
        (a < activations ? by_activation[a] : *of_all) = total;
    }
}

template <int kWords>
void count_all_partitions(const PartitionCount& task) {
    const int64_t activations = task.partition.set.activations;
    const int64_t stride = 2 * (activations + 1);
    const int threads = task.partition.threads;
    for (int64_t i = 0; i < threads * stride; ++i) task.counts[i] = 0;
#pragma omp parallel num_threads(threads)
    {
        const Team team;
        int64_t* counts = task.counts + team.thread * stride;
        int64_t* of_partition = counts + activations + 1;
#pragma omp for schedule(dynamic, 4)
        for (int64_t k = 0; k < int64_t{1} << task.partition.bits; ++k) {
            counts[activations] += count_partition<kWords>(task, k, team.thread, of_partition);
            for (int64_t a = 0; a < activations; ++a) counts[a] += of_partition[a];
        }
    }
    sum_threads(task.counts, threads, stride, activations, task.by_activation, task.of_all);
}

// A pattern is new to an activation exactly when its tag is another's, and new to all when it has none.
void count_tagged(const PatternPartition& task, int64_t k, const uint16_t* kept, uint16_t* tags, int64_t* counts) {
    const int64_t partitions = int64_t{1} << task.bits;
    __builtin_memset(tags, 0, sizeof(uint16_t) << (task.set.samples - task.bits));
    for (int64_t a = 0, first = 0; a < task.set.activations; first += task.set.positions[a++]) {
        const int64_t* ends = task.ends + a * partitions;
        const auto tag = static_cast<uint16_t>(a + 1);
        int64_t fresh = 0, untagged = 0;
        for (int64_t p = k > 0 ? ends[k - 1] : 0; p < ends[k]; ++p) {
            uint16_t& last = tags[kept[first + p]];
            fresh += last != tag;
            untagged += last == 0;
            last = tag;
        }
        counts[a] += fresh;
        counts[task.set.activations] += untagged;
    }
}

}  // namespace

void count_by_tags(const TagCount& task) {
    const PatternPartition& partition = task.partition;
    const PatternSet& set = partition.set;
    const int rest_bits = static_cast<int>(set.samples) - partition.bits;
    auto* kept = reinterpret_cast<uint16_t*>(partition.patterns);
    for (int64_t a = 0, first = 0; a < set.activations; first += set.positions[a++])
        partition_activation(partition, a, ByValue{Patterns<1>(set, a), rest_bits, kept + first});
    const int64_t stride = set.activations + 1;
    for (int64_t i = 0; i < partition.threads * stride; ++i) task.counts[i] = 0;
#pragma omp parallel num_threads(partition.threads)
    {
        const Team team;
        int64_t* counts = task.counts + team.thread * stride;
        uint16_t* tags = task.tags + (team.thread << rest_bits);
#pragma omp for schedule(dynamic, 4)
        for (int64_t k = 0; k < int64_t{1} << partition.bits; ++k) count_tagged(partition, k, kept, tags, counts);
    }
    sum_threads(task.counts, partition.threads, stride, set.activations, task.by_activation, task.of_all);
}

void partition_patterns(const PatternPartition& task) {
    if (words_of(task.set) == 1) return partition_all<1>(task);
    partition_all<0>(task);
}

void count_partitions(const PartitionCount& task) {
    if (words_of(task.partition.set) == 1) return count_all_partitions<1>(task);
    count_all_partitions<0>(task);
}

}  // namespace LSWAG_ISA
}  // namespace lswag
