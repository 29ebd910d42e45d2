// Backward pass of relative_attention: strips of queries give probabilities and score gradients for a block of queries
// that fits the second-level cache, whose products with queries and output gradients then give those of keys and
// values. Floor of AutoFormer-Tiny (T = 197, D = 64): 27 MFLOP a (sample, head), 2.1 of them for the tables, and 2.8
// more where their gradients are wanted, at the float32 rate of a tile.
#include "lswag/relative_attention.h"
#include "relative_attention_steps.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lswag {
namespace LSWAG_ISA {
namespace {

constexpr int64_t kBlockBytes = 400 << 10;  // probabilities and score gradients of a block
constexpr int64_t kMaxPartials = 256;       // partial sums of table gradients, whatever the number of threads

// The gradients of a vertical and a horizontal table, extended like them.
struct TableGradients {
    float* of_class;
    Matrix<float> rows[2];

    TableGradients(const Shape& s, Arena& arena) : of_class(arena.take<float>(s.width)) {
        for (int which = 0; which < 2; ++which)
            rows[which] = arena.take<float>(2 * direction_of(s, which).places, s.width);
    }

    void clear(const Shape& s) const {
        for (int64_t d = 0; d < s.width; ++d) of_class[d] = 0;
        for (int which = 0; which < 2; ++which)
            for (int64_t d = 0; d < 2 * direction_of(s, which).places * s.width; ++d) rows[which].data[d] = 0;
    }

    // Adds to each extended row the sum of places[i, p] * x_i over the queries i and key places p that it serves.
    void add(const Shape& s, const Places& places, Matrix<const float> x) const {
        for (int which = 0; which < 2; ++which) {
            const Direction d = direction_of(s, which);
            const Matrix<float> sums = places.of[which];
            for (int64_t place = 0; place < d.places; ++place)
                multiply<true>(d.places, s.width, d.count,
                               Matrix<const float>{sums.row(d.first(place)), sums.stride * d.step},
                               Matrix<const float>{x.row(d.first(place)), x.stride * d.step},
                               rows[which].from(d.slice(place)), true);
        }
    }
};

// Partial sums of the gradients of key tables and value tables.
struct Partial {
    TableGradients keys, values;

    Partial(const Shape& s, Arena& arena) : keys(s, arena), values(s, arena) {}

    void clear(const Shape& s) const {
        keys.clear(s);
        values.clear(s);
    }
};

template <typename Word>
class BackwardUnit {
 public:
    BackwardUnit(const RelativeAttention& call, const Tables<Word>& keys, const Tables<Word>& values, bool with_tables,
                 Arena& arena)
        : call_(call),
          s_(call),
          keys_(keys),
          values_(values),
          block_(block_rows(s_)),
          q_(arena.take<Word>(s_.tokens, packed_width<Word>(s_.width))),
          k_(arena.take<Word>(s_.tokens, packed_width<Word>(s_.width))),
          grad_(arena.take<Word>(s_.tokens, packed_width<Word>(s_.width))),
          k_columns_(arena.take<Word>(words<Word>(s_.width), s_.score_width)),
          v_columns_(arena.take<Word>(words<Word>(s_.width), s_.score_width)),
          packed_places_(arena.take<Word>(s_.tokens, packed_width<Word>(padded(larger(s_.rows, s_.columns))))),
          p_(arena.take<Word>(words<Word>(block_), s_.score_stride)),
          ds_(arena.take<Word>(words<Word>(block_), s_.score_stride)),
          dq_(arena.take<float>(s_.tokens, s_.width)),
          dk_(arena.take<float>(s_.tokens, s_.width)),
          dv_(arena.take<float>(s_.tokens, s_.width)),
          score_bias_(s_, arena),
          p_bias_(s_, arena),
          ds_sums_(s_, arena),
          p_sums_(s_, arena),
          q_row_(arena.take<float>(s_.width)),
          grad_row_(arena.take<float>(s_.width)) {
        if (kPack<Word> == 1) return;
        q_pairs_ = arena.take<Word>(words<Word>(s_.tokens), s_.width);
        k_pairs_ = arena.take<Word>(words<Word>(s_.tokens), s_.width);
        grad_pairs_ = arena.take<Word>(words<Word>(s_.tokens), s_.width);
        packed_strip_ = arena.take<Word>(kStripRows, words<Word>(s_.score_width));
        p_strip_ = arena.take<float>(kStripRows + 1, s_.score_stride);
        ds_strip_ = arena.take<float>(kStripRows + 1, s_.score_stride);
        if (!with_tables) return;
        q_floats_ = arena.take<float>(s_.tokens, s_.width);
        grad_floats_ = arena.take<float>(s_.tokens, s_.width);
    }

    // Writes the head's part of grad_qkv, and adds to `partial` where there is one.
    void run(int64_t unit, const float* softmax, const Tensor& grad_out, const Tensor& grad_qkv,
             const Partial* partial) {
        const Tokens qkv[] = {{s_, call_.qkv, unit, 0, 3}, {s_, call_.qkv, unit, 1, 3}, {s_, call_.qkv, unit, 2, 3}};
        const Tokens grad(s_, grad_out, unit, 0, 1);
        pack(qkv, grad);
        dot_tables(s_, read_only(q_), keys_, score_bias_);
        dot_tables(s_, read_only(grad_), values_, p_bias_);
        score_of_class_ = dot_row(q_row_, keys_.of_class, s_.width);
        p_of_class_ = dot_row(grad_row_, values_.of_class, s_.width);
        for (int64_t first = 0; first < s_.tokens; first += block_)
            block(first, smaller(block_, s_.tokens - first), softmax, grad_out, unit + call_.threads,
                  partial != nullptr);
        add_tables(s_, ds_sums_, keys_, packed_places_, dq_);
        add_row(keys_.of_class, -first_ds_, s_.width, dq_.data);
        if (partial != nullptr) add_partial(qkv[0], grad, *partial);
        for (int64_t i = 0; i < s_.tokens; ++i) {
            write_row(dq_.row(i), call_.scale, s_.head_dim, grad_qkv, qkv[0].row(i));
            write_row(dk_.row(i), call_.scale, s_.head_dim, grad_qkv, qkv[1].row(i));
            write_row(dv_.row(i), 1, s_.head_dim, grad_qkv, qkv[2].row(i));
        }
    }

 private:
    // Queries in a block: even, and evenly many in each.
    static int64_t block_rows(const Shape& s) {
        const int64_t most = larger(kBlockBytes / (8 * s.score_stride), kStripRows);
        const int64_t blocks = (s.tokens + most - 1) / most;
        return ((s.tokens + blocks - 1) / blocks + 1) / 2 * 2;
    }

    void pack(const Tokens* qkv, const Tokens& grad) {
        const int64_t depth = words<Word>(s_.head_dim);
        pack_tokens(s_, qkv[2], values_.of_class, k_);
        transpose(read_only(k_), s_.tokens, depth, s_.score_width, v_columns_);
        pack_tokens(s_, qkv[1], keys_.of_class, k_);
        transpose(read_only(k_), s_.tokens, depth, s_.score_width, k_columns_);
        pack_tokens(s_, qkv[0], nullptr, q_);
        pack_tokens(s_, grad, nullptr, grad_);
        read_row(qkv[0].source, qkv[0].offset, s_.head_dim, s_.width, q_row_);
        read_row(grad.source, grad.offset, s_.head_dim, s_.width, grad_row_);
        q_over_ = over_tokens(s_, read_only(q_), q_pairs_);
        k_over_ = over_tokens(s_, read_only(k_), k_pairs_);
        grad_over_ = over_tokens(s_, read_only(grad_), grad_pairs_);
    }

    void block(int64_t first, int64_t count, const float* softmax, const Tensor& grad_out, int64_t next,
               bool with_tables) {
        const Strips strips(count, kPack<Word>);
        for (int64_t strip = 0; strip < strips.count; ++strip) {
            const int64_t start = strips.start(strip), rows = strips.start(strip + 1) - start;
            for (int part = 0; next < s_.units() && part < 3; ++part)
                prefetch_rows(s_, Tokens(s_, call_.qkv, next, part, 3), first + start, rows);
            if (next < s_.units()) prefetch_rows(s_, Tokens(s_, grad_out, next, 0, 1), first + start, rows);
            const Matrix<float> p = strip_of(p_, p_strip_, start), ds = strip_of(ds_, ds_strip_, start);
            differentiate(first + start, rows, softmax, p, ds);
            if (first + start == 0) first_p_ = p.data[0];
            if (first + start == 0) first_ds_ = ds.data[0];
            for (int64_t r = first + start == 0 ? 1 : 0; r < rows; ++r) {
                const int64_t i = first + start + r;
                sum_places(s_, ds.row(r), ds_sums_.of[0].row(i), ds_sums_.of[1].row(i));
                if (with_tables) sum_places(s_, p.row(r), p_sums_.of[0].row(i), p_sums_.of[1].row(i));
            }
            multiply<false>(rows, s_.width, words<Word>(s_.tokens), pack_strip(start, rows, p, ds), k_over_,
                            dq_.from(first + start), false);
        }
        const int64_t from = first / kPack<Word>;
        multiply<true>(s_.tokens, s_.width, words<Word>(count), read_only(p_), grad_over_.from(from), dv_, first > 0);
        multiply<true>(s_.tokens, s_.width, words<Word>(count), read_only(ds_), q_over_.from(from), dk_, first > 0);
    }

    // Probabilities of a strip of queries, and the gradients of their scores before the scale.
    void differentiate(int64_t first, int64_t rows, const float* softmax, Matrix<float> p, Matrix<float> ds) {
        for (int64_t r = 0; r < rows; ++r) {
            start_row(s_, first + r, score_bias_, score_of_class_, -__builtin_inff(), p.row(r));
            start_row(s_, first + r, p_bias_, p_of_class_, 0, ds.row(r));
        }
        const int64_t depth = words<Word>(s_.head_dim);
        multiply<false>(rows, s_.score_width, depth, read_only(q_.from(first)), read_only(k_columns_), p, true);
        multiply<false>(rows, s_.score_width, depth, read_only(grad_.from(first)), read_only(v_columns_), ds, true);
        const vfloat factor = splat(call_.scale * kLog2E);
        vfloat total[kLanes] = {};
        for (int64_t r = 0; r < rows; ++r) {
            const vfloat shift = splat(softmax[2 * (first + r)]), inverse = splat(softmax[2 * (first + r) + 1]);
            vfloat row_total = {};
            for (int64_t j = 0; j < s_.score_width; j += kLanes) {
                const vfloat probability = exp2((load(p.row(r) + j) - shift) * factor) * inverse;
                store(p.row(r) + j, probability);
                row_total += probability * load(ds.row(r) + j);
            }
            total[r] = row_total;
        }
        float mean[kLanes];
        store(mean, sum_rows(total));
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = 0; j < s_.score_width; j += kLanes)
                store(ds.row(r) + j, load(p.row(r) + j) * (load(ds.row(r) + j) - splat(mean[r])));
    }

    // Where a strip's floats are computed: in the block itself where its words are floats.
    static Matrix<float> strip_of(Matrix<float> block, Matrix<float>, int64_t start) { return block.from(start); }
    static Matrix<float> strip_of(Matrix<uint32_t>, Matrix<float> strip, int64_t) { return strip; }

    // Puts a strip into the block, in pairs of rows, and returns the score gradients as a left operand.
    Matrix<const Word> pack_strip(int64_t start, int64_t rows, Matrix<float> p, Matrix<float> ds) {
        if constexpr (kPack<Word> == 1) {
            return read_only(ds);
        } else {
            if (rows % 2 != 0)
                for (int64_t j = 0; j < s_.score_width; ++j) p.row(rows)[j] = ds.row(rows)[j] = 0;
            for (int64_t r = 0; r < rows; r += 2) {
                interleave_rows(p.row(r), p.row(r + 1), s_.score_width, p_.row((start + r) / 2));
                interleave_rows(ds.row(r), ds.row(r + 1), s_.score_width, ds_.row((start + r) / 2));
            }
            for (int64_t r = 0; r < rows; ++r) pack_row(ds.row(r), s_.score_width, packed_strip_.row(r));
            return read_only(packed_strip_);
        }
    }

    Matrix<const float> floats_of(const Tokens&, Matrix<float> packed, Matrix<float>) { return read_only(packed); }
    Matrix<const float> floats_of(const Tokens& tokens, Matrix<uint32_t>, Matrix<float> floats) {
        pack_tokens(s_, tokens, nullptr, floats);
        return read_only(floats);
    }

    void add_partial(const Tokens& qkv, const Tokens& grad, const Partial& partial) {
        partial.keys.add(s_, ds_sums_, floats_of(qkv, q_, q_floats_));
        partial.values.add(s_, p_sums_, floats_of(grad, grad_, grad_floats_));
        add_row(dk_.data, 1, s_.width, partial.keys.of_class);
        add_row(q_row_, -first_ds_, s_.width, partial.keys.of_class);
        add_row(dv_.data, 1, s_.width, partial.values.of_class);
        add_row(grad_row_, 1 - first_p_, s_.width, partial.values.of_class);
    }

    const RelativeAttention& call_;
    const Shape s_;
    const Tables<Word>&keys_, &values_;
    const int64_t block_;
    Matrix<Word> q_, k_, grad_, k_columns_, v_columns_, packed_places_, p_, ds_;
    Matrix<float> dq_, dk_, dv_;
    Places score_bias_, p_bias_, ds_sums_, p_sums_;
    float *q_row_, *grad_row_;
    Matrix<Word> q_pairs_ = {}, k_pairs_ = {}, grad_pairs_ = {}, packed_strip_ = {};
    Matrix<float> p_strip_ = {}, ds_strip_ = {}, q_floats_ = {}, grad_floats_ = {};
    Matrix<const Word> q_over_ = {}, k_over_ = {}, grad_over_ = {};
    float score_of_class_ = 0, p_of_class_ = 0, first_p_ = 0, first_ds_ = 0;
};

// The partial sums, one after the other in the workspace.
struct Partials {
    const Shape& s;
    char* base;
    int64_t bytes, count;

    Partials(const Shape& shape, Arena& arena, bool wanted) : s(shape), count(smaller(s.units(), kMaxPartials)) {
        Arena measure(nullptr);
        Partial(s, measure);
        bytes = measure.used();
        base = wanted ? arena.take<char>(count * bytes) : nullptr;
    }

    Partial at(int64_t index) const {
        Arena arena(base == nullptr ? nullptr : base + index * bytes);
        return Partial(s, arena);
    }

    // Sums them, in their order, into the rows of one table. `row` is scratch.
    void fold(bool of_keys, int which, float factor, float* row, const Tensor& target) const {
        const int64_t places = direction_of(s, which).places, reach = target.shape[0] / 2 - 1;
        for (int64_t u = 0; u < target.shape[0]; ++u) {
            read_row(target, 0, 0, s.width, row);
            for (int64_t index = 0; index < count; ++index) {
                const Partial partial = at(index);
                const TableGradients& sums = of_keys ? partial.keys : partial.values;
                if (u == 0) add_row(sums.of_class, 1, s.width, row);
                for (int64_t t = 0; u > 0 && t < 2 * places - 1; ++t)
                    if (table_row(t, places, reach) == u) add_row(sums.rows[which].row(t), 1, s.width, row);
            }
            write_row(row, factor, s.head_dim, target, u * s.head_dim);
        }
    }
};

struct Gradients {
    Tensor softmax, grad_out, grad_qkv;
    const Tensor* tables;
};

// Returns the bytes of workspace; only these, reading and writing nothing, where `measuring`.
template <typename Word>
int64_t backward(const RelativeAttention& call, bool with_tables, const Gradients& grads, void* workspace,
                 bool measuring) {
    const Shape s(call);
    Arena shared(workspace);
    Tables<Word> keys(s, shared), values(s, shared);
    const Partials partials(s, shared, with_tables);
    float* row = shared.take<float>(s.width);
    Arena measure(nullptr);
    BackwardUnit<Word>(call, keys, values, with_tables, measure);
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
        BackwardUnit<Word> work(call, keys, values, with_tables, own);
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < partials.count; ++index) {
            const Partial partial = partials.at(index);
            if (with_tables) partial.clear(s);
            const int64_t end = s.units() * (index + 1) / partials.count;
            for (int64_t unit = s.units() * index / partials.count; unit < end; ++unit)
                work.run(unit, grads.softmax.template as<float>() + 2 * unit * s.tokens, grads.grad_out, grads.grad_qkv,
                         with_tables ? &partial : nullptr);
        }
    }
    for (int table = 0; with_tables && table < 4; ++table)
        partials.fold(table < 2, table % 2, table < 2 ? call.scale : 1, row, grads.tables[table]);
    return bytes;
}

int64_t backward_in_words(const RelativeAttention& call, bool with_tables, const Gradients& grads, void* workspace,
                          bool measuring) {
#if defined(__AVX512BF16__)
    if (call.qkv.dtype == DType::bfloat16) return backward<uint32_t>(call, with_tables, grads, workspace, measuring);
#endif
    return backward<float>(call, with_tables, grads, workspace, measuring);
}

}  // namespace

void relative_attention_backward_bytes(const RelativeAttention& call, bool table_grads, int64_t* bytes) {
    *bytes = backward_in_words(call, table_grads, {}, nullptr, true);
}

void relative_attention_backward(const RelativeAttention& call, const Tensor& softmax, const Tensor& grad_out,
                                 const Tensor& grad_qkv, const Tensor* table_grads, const Tensor& workspace) {
    backward_in_words(call, table_grads != nullptr, {softmax, grad_out, grad_qkv, table_grads}, workspace.data, false);
}

}  // namespace LSWAG_ISA
}  // namespace lswag
