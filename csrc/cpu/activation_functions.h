// The activation functions in float32, four vectors at a time: their polynomials are chains of dependent operations, of
// which a core must have several under way to be busy. NaN stays NaN; at -inf GELU and SiLU give their limit 0.
#pragma once

#include "lswag/activation_patterns.h"
#include "simd.h"

namespace lswag {
namespace LSWAG_ISA {
namespace {

struct Quad {
    vfloat a, b, c, d;
};

inline Quad operator+(Quad x, Quad y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
inline Quad operator-(Quad x, Quad y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
inline Quad operator*(Quad x, Quad y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
inline Quad operator/(Quad x, Quad y) { return {x.a / y.a, x.b / y.b, x.c / y.c, x.d / y.d}; }

inline Quad quad(float x) { return {splat(x), splat(x), splat(x), splat(x)}; }
inline Quad magnitude(Quad x) { return {abs(x.a), abs(x.b), abs(x.c), abs(x.d)}; }

// less < than ? yes : no, in each lane; NaN is less than nothing.
inline Quad where_less(Quad less, Quad than, Quad yes, Quad no) {
    return {less.a < than.a ? yes.a : no.a, less.b < than.b ? yes.b : no.b, less.c < than.c ? yes.c : no.c,
            less.d < than.d ? yes.d : no.d};
}

// x * 2^n, for n in the low bits of `shifted`.
inline vfloat scale(vfloat x, vfloat shifted) { return float_of(bits_of(x) + (bits_of(shifted) << 23)); }
inline Quad scale(Quad x, Quad shifted) {
    return {scale(x.a, shifted.a), scale(x.b, shifted.b), scale(x.c, shifted.c), scale(x.d, shifted.d)};
}

template <int kTerms>
inline Quad polynomial(const float (&coefficients)[kTerms], Quad x) {
    Quad sum = quad(coefficients[0]);
    for (int i = 1; i < kTerms; ++i) sum = sum * x + quad(coefficients[i]);
    return sum;
}

// Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
constexpr float kRound = 12582912.0f;

// 2^x for -126 <= x <= 127, to 1.4e-7 of itself.
inline Quad exp2_of(Quad x) {
    constexpr float kExp2[] = {1.32764709e-3f, 9.67554209e-3f, 5.55071328e-2f, 2.40221197e-1f, 6.93146967e-1f, 1.0f};
    const Quad shifted = x + quad(kRound);
    return scale(polynomial(kExp2, x - (shifted - quad(kRound))), shifted);
}

// e^x for -87 <= x <= 88 and what it is at these ends beyond them, to 1 ulp (the polynomial of Cephes' expf).
inline Quad exp_of(Quad x) {
    constexpr float kExp[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                              4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    x = where_less(x, quad(-87.0f), quad(-87.0f), x);
    x = where_less(quad(88.0f), x, quad(88.0f), x);
    const Quad shifted = x * quad(1.44269504f) + quad(kRound);
    const Quad n = shifted - quad(kRound);
    const Quad r = x - n * quad(0.693359375f) + n * quad(2.12194440e-4f);
    return scale(polynomial(kExp, r) * (r * r) + r + quad(1.0f), shifted);
}

inline Quad relu(Quad x) { return where_less(x, quad(0.0f), quad(0.0f), x); }

// gelu(x) = max(x, 0) - t * Phi(-t) with t = |x|, so that nothing cancels for negative x, as it does in
// 1 + erf(x / sqrt 2). log2 Phi(-t) is a polynomial on [0, 6], fitted to 6.4e-8 of itself (of 1 where it is below 1);
// beyond, t * Phi(-t) < 6e-9 counts as 0. The largest error of gelu(x) is 2.4e-7, for |x| <= 6.
inline Quad gelu(Quad x) {
    constexpr float kLog2Phi[] = {-1.82235719e-8f, 5.84371519e-7f,  -8.00000922e-6f, 5.90544280e-5f,
                                  -2.19516268e-4f, -1.24707969e-4f, 7.09833815e-3f,  -5.25420873e-2f,
                                  -4.59188584e-1f, -1.15110793f,    -9.99999936e-1f};
    const Quad t = magnitude(x);
    return relu(x) - where_less(quad(6.0f), t, quad(0.0f), t * exp2_of(polynomial(kLog2Phi, t)));
}

// x * sigmoid(z).
inline Quad gated(Quad x, Quad z) {
    return where_less(z, quad(-88.0f), quad(0.0f), x / (quad(1.0f) + exp_of(quad(0.0f) - z)));
}

template <Activation kActivation>
inline Quad activate(Quad x) {
    switch (kActivation) {
        case Activation::relu:
            return relu(x);
        case Activation::relu6:
            return where_less(quad(6.0f), x, quad(6.0f), relu(x));
        case Activation::gelu:
            return gelu(x);
        case Activation::gelu_tanh:
            return gated(x, quad(1.59576912f) * (x + quad(0.044715f) * (x * x * x)));
        case Activation::silu:
            return gated(x, x);
        case Activation::hardswish: {
            const Quad gate = relu(x + quad(3.0f));
            return x * where_less(quad(6.0f), gate, quad(6.0f), gate) / quad(6.0f);
        }
        default:
            return x;
    }
}

}  // namespace
}  // namespace LSWAG_ISA
}  // namespace lswag
