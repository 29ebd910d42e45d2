// A set of patterns in one thread's workspace, which counts the distinct ones of each activation and of all.
#pragma once

#include "lswag/activation_patterns.h"

namespace lswag {
namespace LSWAG_ISA {
namespace {

inline uint64_t mix(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 32;
}

// The partition and the slot take the top bits of two products, so that one says little of the other.
inline int64_t partition_of(uint64_t hash, int bits) {
    return bits == 0 ? 0 : static_cast<int64_t>((hash * 0xd6e8feb86659fd93u) >> (64 - bits));
}
inline int64_t slot_of(uint64_t hash, int bits) {
    return static_cast<int64_t>((hash * 0xa0761d6478bd642fu) >> (64 - bits));
}

// Open addressing; each pattern is tagged with the last activation that had it. Patterns come activation by activation,
// so one is new to an activation exactly when its tag is another's. With kWords = 0 the words are counted at run time.
template <int kWords>
class PatternHashSet {
 public:
    PatternHashSet(int64_t words, uint64_t* keys, int32_t* tags, int64_t* by_activation)
        : words_(words), arena_keys_(keys), arena_tags_(tags), by_activation_(by_activation) {}

    // Empties the set, for up to n patterns to come. Few slots at first: where most patterns are the same, the set
    // stays in the cache.
    void start(int64_t n) {
        int bits = 6;
        while (int64_t{1} << bits < kFirstSlots && int64_t{3} << bits < 4 * n) ++bits;
        open(bits);
        size_ = 0;
        steps_left_ = 16 * n + 1024;
    }

    // False where so many steps were taken that the hashes must have been made to collide; the counts are void then.
    bool add(int64_t activation, const uint64_t* pattern) {
        const int32_t tag = static_cast<int32_t>(activation) + 1;
        const int64_t slot = find(pattern);
        if (tags_[slot] == tag) return steps_left_ > 0;
        ++by_activation_[activation];
        const bool fresh = tags_[slot] == 0;
        tags_[slot] = tag;
        if (!fresh) return steps_left_ > 0;
        copy(keys_ + slot * width(), pattern);
        if (4 * ++size_ > int64_t{3} << bits_) grow();
        return steps_left_ > 0;
    }

    int64_t size() const { return size_; }

 private:
    int64_t width() const { return kWords > 0 ? kWords : words_; }

    void copy(uint64_t* to, const uint64_t* from) const {
        for (int64_t w = 0; w < width(); ++w) to[w] = from[w];
    }

    bool equal(const uint64_t* x, const uint64_t* y) const {
        uint64_t difference = 0;
        for (int64_t w = 0; w < width(); ++w) difference |= x[w] ^ y[w];
        return difference == 0;
    }

    void open(int bits) {
        bits_ = bits;
        keys_ = arena_keys_ + (width() << bits);
        tags_ = arena_tags_ + (int64_t{1} << bits);
        for (int64_t s = 0; s < int64_t{1} << bits; ++s) tags_[s] = 0;
    }

    int64_t find(const uint64_t* pattern) {
        uint64_t hash = 0;
        for (int64_t w = 0; w < width(); ++w) hash = mix(hash, pattern[w]);
        const int64_t last = (int64_t{1} << bits_) - 1;
        int64_t slot = slot_of(hash, bits_);
        for (; tags_[slot] != 0 && !equal(keys_ + slot * width(), pattern); slot = (slot + 1) & last) --steps_left_;
        return slot;
    }

    void grow() {
        const uint64_t* keys = keys_;
        const int32_t* tags = tags_;
        const int64_t slots = int64_t{1} << bits_;
        open(bits_ + 1);
        for (int64_t s = 0; s < slots && steps_left_ > 0; ++s) {
            if (tags[s] == 0) continue;
            const int64_t to = find(keys + s * width());
            copy(keys_ + to * width(), keys + s * width());
            tags_[to] = tags[s];
        }
    }

    int64_t words_;
    uint64_t* arena_keys_;
    int32_t* arena_tags_;
    int64_t* by_activation_;
    uint64_t* keys_ = nullptr;
    int32_t* tags_ = nullptr;
    int bits_ = 0;
    int64_t size_ = 0;
    int64_t steps_left_ = 0;
};

// The same counts by a heap sort, whose time no input makes worse: n patterns with their activations as tags.
class PatternSort {
 public:
    PatternSort(int64_t words, uint64_t* keys, int32_t* tags) : words_(words), keys_(keys), tags_(tags) {}

    bool add(int64_t activation, const uint64_t* pattern) {
        for (int64_t w = 0; w < words_; ++w) keys_[size_ * words_ + w] = pattern[w];
        tags_[size_++] = static_cast<int32_t>(activation);
        return true;
    }

    // Adds to the counts, and returns the number of distinct patterns of all.
    int64_t count(int64_t* by_activation) {
        for (int64_t root = size_ / 2; root-- > 0;) sift(root, size_);
        for (int64_t last = size_ - 1; last > 0; --last) {
            swap(0, last);
            sift(0, last);
        }
        int64_t distinct = 0;
        for (int64_t i = 0; i < size_; ++i) {
            const int order = i > 0 ? compare(i - 1, i) : -1;
            if (order != 0) ++distinct;
            if (order != 0 || tags_[i - 1] != tags_[i]) ++by_activation[tags_[i]];
        }
        return distinct;
    }

 private:
    int compare(int64_t i, int64_t j) const {
        for (int64_t w = 0; w < words_; ++w) {
            const uint64_t x = keys_[i * words_ + w], y = keys_[j * words_ + w];
            if (x != y) return x < y ? -1 : 1;
        }
        return 0;
    }

    bool less(int64_t i, int64_t j) const {
        const int order = compare(i, j);
        return order != 0 ? order < 0 : tags_[i] < tags_[j];
    }

    void swap(int64_t i, int64_t j) {
        for (int64_t w = 0; w < words_; ++w) {
            const uint64_t word = keys_[i * words_ + w];
            keys_[i * words_ + w] = keys_[j * words_ + w];
            keys_[j * words_ + w] = word;
        }
        const int32_t tag = tags_[i];
        tags_[i] = tags_[j];
        tags_[j] = tag;
    }

    void sift(int64_t root, int64_t end) {
        for (int64_t child; (child = 2 * root + 1) < end; root = child) {
            if (child + 1 < end && less(child, child + 1)) ++child;
            if (!less(root, child)) return;
            swap(root, child);
        }
    }

    int64_t words_;
    uint64_t* keys_;
    int32_t* tags_;
    int64_t size_ = 0;
};

}  // namespace
}  // namespace LSWAG_ISA
}  // namespace lswag
