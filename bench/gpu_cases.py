"""The kernels at the shapes that bench/gpu.py times: each with what it multiplies and moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lswag_fast.ops.activation_patterns import activate_and_pack, count_patterns_device, hamming_kernel, pack_signs
from lswag_fast.ops.gelu import activation_backward
from lswag_fast.ops.gradient_moments import Convolution
from lswag_fast.ops.gradient_moments_grouped import MomentProblem, launch_gradient_moments
from lswag_fast.ops.layer_norm import NormalisedSum
from lswag_fast.ops.relative_attention import relative_attention
from lswag_fast.spaces.autoformer_module import HEAD_DIM, mlp_width

MIDDLE = {
    name: {
        "embed_dim": embed,
        "depth": depth,
        "num_heads": [heads[layer % len(heads)] for layer in range(depth)],
        "mlp_ratio": [ratios[layer % len(ratios)] for layer in range(depth)],
    }
    for name, embed, depth, heads, ratios in (
        ("autoformer-tiny", 216, 13, (3, 4), (3.5, 4.0)),
        ("autoformer-small", 384, 13, (5, 6, 7), (3.0, 3.5, 4.0)),
        ("autoformer-base", 576, 15, (9, 10), (3.0, 3.5, 4.0)),
    )
}
"""The middle candidate of each space."""


@dataclass(frozen=True)
class Case:
    """A kernel at one shape; `make` draws operands and returns a call."""

    name: str
    make: Callable[[], Callable[[], Any]]
    flops: float
    bytes: float


def cases(arch: Mapping[str, Any], samples: int, tokens: int = 197) -> Iterator[Case]:
    embed, heads, ratios = arch["embed_dim"], arch["num_heads"], arch["mlp_ratio"]
    rows, wide = samples * tokens, mlp_width(embed, max(ratios))
    narrow, values = rows * embed, rows * wide
    inner = HEAD_DIM * max(heads)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(samples, *shape, device="cuda", dtype=torch.bfloat16)

    def norm() -> NormalisedSum:
        weight, bias = drawn(embed)[0], drawn(embed)[0]
        return NormalisedSum.of(drawn(tokens, embed), drawn(tokens, embed), weight, bias)

    def adding_norm() -> Callable[[], Any]:
        return partial(NormalisedSum.of, drawn(tokens, embed), drawn(tokens, embed), drawn(embed)[0], drawn(embed)[0])

    def attention(*, backward: bool) -> Callable[[], Any]:
        qkv = drawn(tokens, 3 * inner).requires_grad_(backward)
        tables = [torch.randn(30, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        given = {"heads": max(heads), "grid": (14, 14)}
        call = partial(relative_attention, qkv, (tables[0], tables[1]), (tables[2], tables[3]), **given)
        if not backward:
            return call
        return partial(torch.autograd.grad, call(), qkv, drawn(tokens, inner), retain_graph=True)

    yield Case("GELU and packing", lambda: partial(activate_and_pack, drawn(tokens, wide), "gelu"), 0, values * 4.125)
    yield Case(
        "GELU backward",
        lambda: partial(activation_backward, drawn(tokens, wide), drawn(tokens, wide), "gelu"),
        0,
        values * 6,
    )
    yield Case("sum and LayerNorm", adding_norm, 0, narrow * 8)
    yield Case(
        "sum and LayerNorm, backward",
        lambda: partial(norm().backward, drawn(tokens, embed), drawn(tokens, embed)),
        0,
        narrow * 8,
    )
    products = samples * max(heads) * tokens * tokens * HEAD_DIM
    yield Case("attention", partial(attention, backward=False), 4 * products, rows * inner * 8)
    yield Case("attention, backward", partial(attention, backward=True), 10 * products, rows * inner * 16)
    for count in (16, 24, 64):
        positions = sum(tokens * mlp_width(embed, ratio) for ratio in ratios)
        yield Case(f"patterns of {count} samples", partial(_counting, arch, count, tokens), 0, positions * 8)
    yield Case("Hamming kernel", partial(_counting, arch, samples, tokens, hamming=True), 0, positions * 8)
    for asked in ("", ", signed", ", signed, with saliencies"):
        yield moments_case(arch, samples, tokens, asked)


def moments_case(arch: Mapping[str, Any], samples: int, tokens: int = 197, asked: str = "") -> Case:
    """Returns the gradient moments of all Linear layers of a candidate but its head, as one launch."""
    shapes, rows = linear_shapes(arch), samples * tokens

    def drawn(width: int) -> Tensor:
        return torch.randn(samples, tokens, width, device="cuda", dtype=torch.bfloat16)

    def moments() -> Callable[[], Any]:
        problems = []
        for o, i in shapes:
            weight = torch.randn(o, i, device="cuda", dtype=torch.bfloat16) if weighed else None
            problems.append(MomentProblem(drawn(i), drawn(o), samples, signed="signed" in asked, weight=weight))
        return partial(launch_gradient_moments, problems)

    weighed = "saliencies" in asked
    return Case(
        "gradient moments, all Linear layers but the head" + asked,
        moments,
        sum(2 * rows * o * i for o, i in shapes),
        sum(2 * rows * (o + i) + 2 * weighed * o * i for o, i in shapes),
    )


def score_bytes(arch: Mapping[str, Any], samples: int, tokens: int = 197) -> float:
    """Returns what the kernels of one score's blocks read and write in 16 bits, weights and the ends left out.

    Elements a token, in embeddings, in widths of the heads together, and in hidden units:

    - forward: both sums and LayerNorms 4 + 4, qkv 1 and 3, attention 4, projection 1 and 1, the MLP's products 1 and 1,
      1 and 1, GELU 2 and a bit a sample for the words;
    - backward: products 1 and 1, 1 and 1, 1 and 1, 3 and 1, GELU 3, both LayerNorms 4 + 4, attention 8;
    - moments: the inputs and output gradients of four layers, once.
    """
    embed = arch["embed_dim"]
    elements = 0.0
    for heads, ratio in zip(arch["num_heads"], arch["mlp_ratio"], strict=True):
        inner, hidden = HEAD_DIM * heads, mlp_width(embed, ratio)
        forward = 12 * embed + 8 * inner + (4 + 1 / 16) * hidden
        backward = 12 * embed + 12 * inner + 5 * hidden
        elements += forward + backward + sum(o + i for o, i in block_shapes(embed, heads, ratio))
    return 2 * samples * tokens * elements


def linear_shapes(arch: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Returns [O, I] of every Linear layer of a candidate but its head."""
    choices = zip(arch["num_heads"], arch["mlp_ratio"], strict=True)
    return [shape for heads, ratio in choices for shape in block_shapes(arch["embed_dim"], heads, ratio)]


def block_shapes(embed: int, heads: int, ratio: float) -> list[tuple[int, int]]:
    """Returns [O, I] of the Linear layers of a block."""
    inner, hidden = HEAD_DIM * heads, mlp_width(embed, ratio)
    return [(3 * inner, embed), (embed, inner), (hidden, embed), (embed, hidden)]


DEPTHWISE = {
    "depthwise convolutions of ConvNeXt-Tiny, 7 x 7": [(96, 56, 7, 1)] * 3
    + [(192, 28, 7, 1)] * 3
    + [(384, 14, 7, 1)] * 9
    + [(768, 7, 7, 1)] * 3,
    "depthwise convolutions of MobileNetV2, 3 x 3": [(32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 3, 2)]
    + [(192, 28, 3, 1)] * 2
    + [(192, 28, 3, 2)]
    + [(384, 14, 3, 1)] * 4
    + [(576, 14, 3, 1)] * 2
    + [(576, 14, 3, 2)]
    + [(960, 7, 3, 1)] * 3,
}
"""Channels, side of the input plane, kernel and stride of each layer, at 224 x 224."""


def depthwise_cases(samples: int) -> Iterator[Case]:
    def moments(layers: Sequence[tuple[int, int, int, int]]) -> Callable[[], Any]:
        problems = []
        for channels, side, kernel, stride in layers:
            sides = (side, side // stride)
            a, d = (torch.randn(samples, channels, n, n, device="cuda", dtype=torch.bfloat16) for n in sides)
            half = kernel // 2
            convolution = Convolution((kernel, kernel), (stride, stride), (half, half), groups=channels)
            problems.append(MomentProblem(a, d, samples, convolution))
        return partial(launch_gradient_moments, problems)

    for name, layers in DEPTHWISE.items():
        outputs = [samples * channels * (side // stride) ** 2 for channels, side, _, stride in layers]
        yield Case(
            f"gradient moments, {name}",
            partial(moments, layers),
            sum(2 * n * layer[2] ** 2 for n, layer in zip(outputs, layers, strict=True)),
            sum(2 * n * (1 + layer[3] ** 2) for n, layer in zip(outputs, layers, strict=True)),
        )


def _counting(arch: Mapping[str, Any], samples: int, tokens: int, *, hamming: bool = False) -> Callable[[], Any]:
    words = [
        pack_signs(torch.randn(samples, tokens, mlp_width(arch["embed_dim"], ratio), device="cuda"))
        for ratio in arch["mlp_ratio"]
    ]
    return partial(hamming_kernel if hamming else count_patterns_device, words, samples)
