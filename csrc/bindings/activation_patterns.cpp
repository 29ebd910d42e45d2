#include "lswag/activation_patterns.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "tensors.h"

namespace py = pybind11;

namespace lswag {
namespace {

void require(bool condition, const std::string& message) {
    if (!condition) throw py::value_error(message);
}

// A buffer of int64 that a kernel writes, of at least so many numbers.
int64_t* buffer(Borrowed& borrowed, const py::object& array, int64_t numel, const char* name) {
    const Tensor tensor = borrowed.add_output(array);
    require(tensor.dtype == DType::int64, std::string(name) + " must be int64");
    require(tensor.numel() >= numel, std::string(name) + " must hold " + std::to_string(numel) + " numbers, got " +
                                         std::to_string(tensor.numel()));
    return tensor.as<int64_t>();
}

uint64_t* word_buffer(Borrowed& borrowed, const py::object& array, int64_t numel, const char* name) {
    return reinterpret_cast<uint64_t*>(buffer(borrowed, array, numel, name));
}

int64_t width(int64_t samples) { return (samples + 63) / 64; }

// The words of several activations, with the memory that they and their table live in.
struct Words {
    Borrowed borrowed;
    std::vector<const uint64_t*> pointers;
    std::vector<int64_t> positions;
    int64_t samples;
    int64_t total = 0;

    Words(const py::sequence& arrays, int64_t samples) : samples(samples) {
        require(samples > 0, "samples must be positive");
        for (const Tensor& tensor : borrowed.add_all(arrays)) {
            require(tensor.dtype == DType::int64 && tensor.ndim == 2 && tensor.contiguous(),
                    "words must be contiguous int64 tensors [W, P]");
            require(tensor.shape[0] >= width(samples), "words must have a row for every 64 samples");
            pointers.push_back(tensor.as<const uint64_t>());
            positions.push_back(tensor.shape[1]);
            total += tensor.shape[1];
        }
    }

    PatternSet set() const {
        return {pointers.data(), positions.data(), static_cast<int64_t>(pointers.size()), samples};
    }
};

void pack(const py::object& pre, const py::object& post, const py::object& words, int activation, int64_t first_sample,
          int64_t packed_samples, bool accumulate, int threads) {
    Borrowed borrowed;
    SignPacking task;
    task.pre = borrowed.add(pre);
    require(task.pre.ndim > 0, "an activation needs a sample axis");
    require(task.pre.dtype == DType::float32 || item_size(task.pre.dtype) == 2, "an activation must be floating point");
    require(activation >= 0 && activation < kActivationCount, "no such activation");
    require(post.is_none() == (activation == 0), "an output is written exactly where there is an activation function");
    task.activation = static_cast<Activation>(activation);
    if (!post.is_none()) {
        task.post = borrowed.add(post);
        require(!task.post.read_only && task.post.dtype == task.pre.dtype && task.post.ndim == task.pre.ndim,
                "the output must be writable, with the dtype and shape of the input");
        for (int d = 0; d < task.pre.ndim; ++d)
            require(task.post.shape[d] == task.pre.shape[d], "the output must have the shape of the input");
    }
    require(first_sample >= 0 && packed_samples >= 0 && packed_samples <= task.pre.shape[0], "no such samples");
    task.positions = 1;
    for (int d = 1; d < task.pre.ndim; ++d) task.positions *= task.pre.shape[d];
    task.words =
        word_buffer(borrowed, words, width(first_sample + packed_samples) * task.positions, "words of the activation");
    task.first_sample = first_sample;
    task.packed_samples = packed_samples;
    task.accumulate = accumulate;
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
