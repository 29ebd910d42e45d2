// Counts distinct patterns exactly: by a bitmap of all patterns where there are few samples, else by hash sets over
// partitions that fit in the L1 cache. Whole patterns are compared, so a collision of hashes costs time, never
// exactness; a partition made to collide is sorted.
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

    int64_t partition(int64_t p, int bits) const {
        uint64_t hash = 0;
        for (int64_t w = 0; w < width(); ++w) hash = mix(hash, word(p, w));
        return partition_of(hash, bits);
    }
};

template <int kWords>
void partition_activation(const PatternPartition& task, int64_t activation, uint64_t* out) {
    const Patterns<kWords> patterns(task.set, activation);
    const int64_t partitions = int64_t{1} << task.bits;
    int64_t* ends = task.ends + activation * partitions;
#pragma omp parallel num_threads(task.threads) if (patterns.positions > 4 * partitions)
    {
        const Team team;
        int64_t* next = task.histograms + team.thread * partitions;
        for (int64_t k = 0; k < partitions; ++k) next[k] = 0;
        for (int64_t p = team.begin(patterns.positions); p < team.end(patterns.positions); ++p)
            ++next[patterns.partition(p, task.bits)];
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
        for (int64_t p = team.begin(patterns.positions); p < team.end(patterns.positions); ++p) {
            uint64_t* to = out + patterns.width() * next[patterns.partition(p, task.bits)]++;
            for (int64_t w = 0; w < patterns.width(); ++w) to[w] = patterns.word(p, w);
        }
    }
}

template <int kWords>
void partition_all(const PatternPartition& task) {
    uint64_t* out = task.patterns;
    for (int64_t a = 0; a < task.set.activations; ++a) {
        partition_activation<kWords>(task, a, out);
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
    for (int64_t a = 0; a <= activations; ++a) {
        int64_t total = 0;
        for (int64_t t = 0; t < threads; ++t) total += task.counts[t * stride + a];
        (a < activations ? task.by_activation[a] : *task.of_all) = total;
    }
}

}  // namespace

void count_by_bitmap(const BitmapCount& task) {
    const int64_t entries = task.set.samples > 6 ? int64_t{1} << (task.set.samples - 6) : 1;
    uint64_t* all = task.bitmaps + task.threads * entries;
    for (int64_t e = 0; e < entries; ++e) all[e] = 0;
    for (int64_t a = 0; a < task.set.activations; ++a) {
        const Patterns<1> patterns(task.set, a);
        int64_t distinct = 0;
#pragma omp parallel num_threads(task.threads) reduction(+ : distinct) if (patterns.positions > entries)
        {
            const Team team;
            uint64_t* own = task.bitmaps + team.thread * entries;
            for (int64_t e = 0; e < entries; ++e) own[e] = 0;
            for (int64_t p = team.begin(patterns.positions); p < team.end(patterns.positions); ++p) {
                const uint64_t pattern = patterns.word(p, 0);
                own[pattern / 64] |= uint64_t{1} << pattern % 64;
            }
#pragma omp barrier
            for (int64_t e = team.begin(entries); e < team.end(entries); ++e) {
                uint64_t seen = 0;
                for (int64_t t = 0; t < team.threads; ++t) seen |= task.bitmaps[t * entries + e];
                distinct += __builtin_popcountll(seen);
                all[e] |= seen;
            }
        }
        task.by_activation[a] = distinct;
    }
    *task.of_all = 0;
    for (int64_t e = 0; e < entries; ++e) *task.of_all += __builtin_popcountll(all[e]);
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
