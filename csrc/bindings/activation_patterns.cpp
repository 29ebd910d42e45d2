#include "lswag/activation_patterns.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "pattern_arguments.h"

namespace py = pybind11;

namespace lswag {
namespace {

void pack(const py::object& pre, const py::object& post, const py::object& words, int activation, int64_t first_sample,
          int64_t packed_samples, bool accumulate, int threads) {
    Borrowed borrowed;
    SignPacking task = packing_task(borrowed, pre, post, words, activation, first_sample, packed_samples, accumulate);
    task.threads = threads;
    const py::gil_scoped_release release;
    select_pack_signs()(task);
}

using Counts = std::pair<int64_t, std::vector<int64_t>>;

PatternPartition partition_task(Words& words, int bits, const py::object& patterns, int64_t kept_words,
                                const py::object& ends, int threads) {
    require(bits >= 0 && bits < 32, "too many partitions");
    PatternPartition task;
    task.set = words.set();
    task.bits = bits;
    task.patterns = word_buffer(words.borrowed, patterns, kept_words, "patterns");
    task.ends = buffer(words.borrowed, ends, task.set.activations << bits, "ends");
    task.histograms = nullptr;
    task.threads = threads;
    return task;
}

// The slots of a thread's table that the largest partition needs.
int64_t slots_needed(const PatternPartition& task) {
    const int64_t partitions = int64_t{1} << task.bits;
    int64_t largest = 0;
    for (int64_t k = 0; k < partitions; ++k) {
        int64_t size = 0;
        for (int64_t a = 0; a < task.set.activations; ++a) {
            const int64_t* ends = task.ends + a * partitions;
            size += ends[k] - (k > 0 ? ends[k - 1] : 0);
        }
        largest = std::max(largest, size);
    }
    int64_t capacity = kFirstSlots;
    while (3 * capacity < 4 * largest) capacity *= 2;
    return 2 * capacity;
}

int64_t partition(const py::sequence& arrays, int64_t samples, int bits, const py::object& patterns,
                  const py::object& ends, const py::object& histograms, int threads) {
    Words words(arrays, samples);
    PatternPartition task = partition_task(words, bits, patterns, words.total * width(samples), ends, threads);
    task.histograms = buffer(words.borrowed, histograms, int64_t{threads} << bits, "histograms");
    const py::gil_scoped_release release;
    select_partition_patterns()(task);
    return slots_needed(task);
}

Counts count_by_tags(const py::sequence& arrays, int64_t samples, int bits, const py::object& patterns,
                     const py::object& ends, const py::object& histograms, const py::object& tags, int threads) {
    Words words(arrays, samples);
    require(bits >= 0 && bits <= samples && samples - bits <= 16, "a partition may leave 16 bits of a pattern");
    require(words.positions.size() < 65536, "tags are for fewer than 65536 activations");
    Counts counts(0, words.positions.size());
    std::vector<int64_t> thread_counts(threads * (words.positions.size() + 1));
    TagCount task;
    task.partition = partition_task(words, bits, patterns, (words.total + 3) / 4, ends, threads);
    task.partition.histograms = buffer(words.borrowed, histograms, int64_t{threads} << bits, "histograms");
    const int64_t numel = ((int64_t{threads} << (samples - bits)) + 3) / 4;
    task.tags = reinterpret_cast<uint16_t*>(buffer(words.borrowed, tags, numel, "tags"));
    task.counts = thread_counts.data();
    task.by_activation = counts.second.data();
    task.of_all = &counts.first;
    const py::gil_scoped_release release;
    select_count_by_tags()(task);
    return counts;
}

Counts count_partitioned(const py::sequence& arrays, int64_t samples, int bits, const py::object& patterns,
                         const py::object& ends, int64_t slots, const py::object& keys, const py::object& tags,
                         int threads) {
    Words words(arrays, samples);
    Counts counts(0, words.positions.size());
    PartitionCount task;
    task.partition = partition_task(words, bits, patterns, words.total * width(samples), ends, threads);
    require(slots >= slots_needed(task.partition), "too few slots for the largest partition");
    task.slots = slots;
    task.keys = word_buffer(words.borrowed, keys, threads * slots * width(samples), "keys");
    task.tags = reinterpret_cast<int32_t*>(buffer(words.borrowed, tags, threads * slots / 2, "tags"));
    std::vector<int64_t> thread_counts(threads * 2 * (words.positions.size() + 1));
    task.counts = thread_counts.data();
    task.by_activation = counts.second.data();
    task.of_all = &counts.first;
    const py::gil_scoped_release release;
    select_count_partitions()(task);
    return counts;
}

void agreements(const py::sequence& arrays, int64_t samples, const py::object& codes, const py::object& disagreements,
                const py::object& out, int threads) {
    Words words(arrays, samples);
    AgreementCount task;
    task.set = words.set();
    task.codes = word_buffer(words.borrowed, codes, threads * width(samples) * 64 * kCodeWords, "codes");
    task.disagreements = buffer(words.borrowed, disagreements, threads * samples * samples, "disagreements");
    task.agreements = buffer(words.borrowed, out, samples * samples, "out");
    task.threads = threads;
    const py::gil_scoped_release release;
    select_count_agreements()(task);
}

}  // namespace

void register_activation_patterns(py::module_& m) {
    m.def("pack_signs", &pack, py::arg("pre"), py::arg("post"), py::arg("words"), py::arg("activation"),
          py::arg("first_sample"), py::arg("packed_samples"), py::arg("accumulate"), py::arg("threads"));
    m.def("count_patterns_by_tags", &count_by_tags, py::arg("words"), py::arg("samples"), py::arg("bits"),
          py::arg("patterns"), py::arg("ends"), py::arg("histograms"), py::arg("tags"), py::arg("threads"));
    m.def("partition_patterns", &partition, py::arg("words"), py::arg("samples"), py::arg("bits"), py::arg("patterns"),
          py::arg("ends"), py::arg("histograms"), py::arg("threads"));
    m.def("count_partitions", &count_partitioned, py::arg("words"), py::arg("samples"), py::arg("bits"),
          py::arg("patterns"), py::arg("ends"), py::arg("slots"), py::arg("keys"), py::arg("tags"), py::arg("threads"));
    m.def("count_agreements", &agreements, py::arg("words"), py::arg("samples"), py::arg("codes"),
          py::arg("disagreements"), py::arg("out"), py::arg("threads"));
    m.attr("code_words") = kCodeWords;
}

}  // namespace lswag
