// Forward pass of relative_attention: strips of queries against all keys, whose probabilities never leave the
// first-level cache. Floor of AutoFormer-Tiny (T = 197, D = 64): 11.4 MFLOP a (sample, head), the tables' part of it
// 1.4, at the float32 rate of a tile.
#include "lswag/relative_attention.h"

#include "relative_attention_steps.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lswag {
namespace LSWAG_ISA {
namespace {

template <typename Word>
class ForwardUnit {
 public:
    ForwardUnit(const RelativeAttention& call, const Tables<Word>& keys, const Tables<Word>& values, Arena& arena)
        : call_(call),
          s_(call),
          keys_(keys),
          values_(values),
          q_(arena.take<Word>(s_.tokens, packed_width<Word>(s_.width))),
          kv_(arena.take<Word>(s_.tokens, packed_width<Word>(s_.width))),
          k_columns_(arena.take<Word>(words<Word>(s_.width), s_.score_width)),
          v_pairs_(arena.take<Word>(kPack<Word> == 1 ? 0 : words<Word>(s_.tokens), s_.width)),
          packed_strip_(arena.take<Word>(kPack<Word> == 1 ? 0 : kStripRows, words<Word>(s_.score_width))),
          packed_places_(arena.take<Word>(s_.tokens, packed_width<Word>(padded(larger(s_.rows, s_.columns))))),
          strip_(arena.take<float>(kStripRows, s_.score_stride)),
          out_(arena.take<float>(s_.tokens, s_.width)),
          bias_(s_, arena),
          sums_(s_, arena),
          row_(arena.take<float>(s_.width)) {}

    // Writes the head's columns of `out`, and its rows of `softmax`.
    void run(int64_t unit, const Tensor& out, float* softmax) {
        const Matrix<const Word> v = pack(unit);
        dot_tables(s_, read_only(q_), keys_, bias_);
        const float of_class = dot_row(row_, keys_.of_class, s_.width);
        const Strips strips(s_.tokens, 1);
        float first_probability = 0;
        for (int64_t strip = 0; strip < strips.count; ++strip) {
            const int64_t first = strips.start(strip), count = strips.start(strip + 1) - first;
            for (int part = 0; unit + call_.threads < s_.units() && part < 3; ++part)
                prefetch_rows(s_, Tokens(s_, call_.qkv, unit + call_.threads, part, 3), first, count);
            for (int64_t r = 0; r < count; ++r)
                start_row(s_, first + r, bias_, of_class, -__builtin_inff(), strip_.row(r));
            multiply<false>(count, s_.score_width, words<Word>(s_.head_dim), read_only(q_.from(first)),
                            read_only(k_columns_), strip_, true);
            soften(first, count, softmax);
            if (first == 0) first_probability = strip_.data[0];
            multiply<false>(count, s_.width, words<Word>(s_.tokens), pack_strip(count), v, out_.from(first), false);
        }
        add_tables(s_, sums_, values_, packed_places_, out_);
        add_row(values_.of_class, 1 / softmax[1] - first_probability, s_.width, out_.data);
        const Tokens rows(s_, out, unit, 0, 1);
        for (int64_t i = 0; i < s_.tokens; ++i)
            write_row(out_.row(i), softmax[2 * i + 1], s_.head_dim, out, rows.row(i));
    }

 private:
    // Reads q, k and v, leaves the first query in row_, and returns v as the right operand of its product.
    Matrix<const Word> pack(int64_t unit) {
        const Tokens q(s_, call_.qkv, unit, 0, 3);
        pack_tokens(s_, q, nullptr, q_);
        pack_tokens(s_, Tokens(s_, call_.qkv, unit, 1, 3), keys_.of_class, kv_);
        transpose(read_only(kv_), s_.tokens, words<Word>(s_.head_dim), s_.score_width, k_columns_);
        pack_tokens(s_, Tokens(s_, call_.qkv, unit, 2, 3), values_.of_class, kv_);
        read_row(call_.qkv, q.offset, s_.head_dim, s_.width, row_);
        return over_tokens(s_, read_only(kv_), v_pairs_);
    }

    // Turns the strip's scores into probabilities times the sum of their row, and sums those by place.
    void soften(int64_t first, int64_t count, float* softmax) {
        const vfloat factor = splat(call_.scale * kLog2E);
        vfloat largest[kLanes] = {}, total[kLanes] = {};
        for (int64_t r = 0; r < count; ++r) {
            const float* scores = strip_.row(r);
            vfloat top = load(scores);
            for (int64_t j = kLanes; j < s_.score_width; j += kLanes) top = max(top, load(scores + j));
            largest[r] = top;
        }
        float shift[kLanes], sum[kLanes];
        store(shift, max_rows(largest));
        for (int64_t r = 0; r < count; ++r) {
            float* scores = strip_.row(r);
            vfloat row_total = {};
            for (int64_t j = 0; j < s_.score_width; j += kLanes) {
                const vfloat p = exp2((load(scores + j) - splat(shift[r])) * factor);
                store(scores + j, p);
                row_total += p;
            }
            total[r] = row_total;
        }
        for (int64_t r = first == 0 ? 1 : 0; r < count; ++r)
            sum_places(s_, strip_.row(r), sums_.of[0].row(first + r), sums_.of[1].row(first + r));
        store(sum, sum_rows(total));
        for (int64_t r = 0; r < count; ++r) {
            softmax[2 * (first + r)] = shift[r];
            softmax[2 * (first + r) + 1] = 1 / sum[r];
        }
    }

    Matrix<const Word> pack_strip(int64_t count) {
        if constexpr (kPack<Word> == 1) return read_only(strip_);
        if constexpr (kPack<Word> == 2) {
            for (int64_t r = 0; r < count; ++r) pack_row(strip_.row(r), s_.score_width, packed_strip_.row(r));
            return read_only(packed_strip_);
        }
    }

    const RelativeAttention& call_;
    const Shape s_;
    const Tables<Word>&keys_, &values_;
    Matrix<Word> q_, kv_, k_columns_, v_pairs_, packed_strip_, packed_places_;
    Matrix<float> strip_, out_;
    Places bias_, sums_;
    float* row_;
};

// Returns the bytes of workspace; only these, reading and writing nothing, where `measuring`.
template <typename Word>
int64_t forward(const RelativeAttention& call, const Tensor& out, const Tensor& softmax, void* workspace,
                bool measuring) {
    const Shape s(call);
    Arena shared(workspace);
    Tables<Word> keys(s, shared), values(s, shared);
    Arena measure(nullptr);
    ForwardUnit<Word>(call, keys, values, measure);
    const int64_t bytes = shared.used() + call.threads * measure.used();
    if (measuring) return bytes;
    keys.fill(s, call.tables);
    values.fill(s, call.tables + 2);
#pragma omp parallel num_threads(call.threads)
    {
#if defined(_OPENMP)
        const int thread = omp_get_thread_num();
#else
        const int thread = 0;
#endif
        Arena own(static_cast<char*>(workspace) + shared.used() + thread * measure.used());
        ForwardUnit<Word> work(call, keys, values, own);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < s.units(); ++unit) work.run(unit, out, softmax.as<float>() + 2 * unit * s.tokens);
    }
    return bytes;
}

int64_t forward_in_words(const RelativeAttention& call, const Tensor& out, const Tensor& softmax, void* workspace,
                         bool measuring) {
#if defined(__AVX512BF16__)
    if (call.qkv.dtype == DType::bfloat16) return forward<uint32_t>(call, out, softmax, workspace, measuring);
#endif
    return forward<float>(call, out, softmax, workspace, measuring);
}

}  // namespace

void relative_attention_forward_bytes(const RelativeAttention& call, int64_t* bytes) {
    *bytes = forward_in_words(call, {}, {}, nullptr, true);
}

void relative_attention_forward(const RelativeAttention& call, const Tensor& out, const Tensor& softmax,
                                const Tensor& workspace) {
    forward_in_words(call, out, softmax, workspace.data, false);
}

}  // namespace LSWAG_ISA
}  // namespace lswag
