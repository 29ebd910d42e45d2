"""The forward and backward pass of an AutoFormer candidate on slices of its supernet, written out.

The numbers are those of :class:`lswag_fast.spaces.autoformer_module.AutoFormer`: Chen, Peng, Fu, Ling, AutoFormer:
Searching Transformers for Visual Recognition, ICCV 2021. No weight gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import Empty
from ..ops.gelu import activation_backward
from ..ops.gradient_moments_grouped import PreparedProblem
from ..ops.layer_norm import NormalisedSum
from ..ops.relative_attention import RelativeAttention
from ..proxies.statistics import norm_of
from ..spaces.autoformer_module import HEAD_DIM, mlp_width
from .static_memory import Emit, Memory

LAYERS_BEFORE = 1
LAYERS_A_BLOCK = 4
"""The patch kernel comes first; each block has qkv, proj, fc1 and fc2, and then comes the head."""

Pair = tuple[Tensor, Tensor]
"""Weight and bias, or the vertical and the horizontal table."""
Activate = Callable[[Tensor, bool, Empty], tuple[Tensor, Tensor | None]]
"""(pre-activation [S, T, hidden], whether its patterns are wanted, memory) -> GELU of it, and the packed patterns."""
Packed = Callable[[int, Tensor], None]
"""(number of the block, packed patterns of its activation)."""


@dataclass
class LayerUse:
    """What the backward pass hands over of a layer; a segment that is launched again hands over the same object."""

    inputs: Tensor
    """[S, ..., I]."""
    output_grads: Tensor
    """[S, ..., O]."""
    weight: Tensor
    """[O, I]."""
    problem: PreparedProblem | None = None
    """What its moments are launched by, once somebody has made it."""


Deliver = Callable[[int, LayerUse], None]
"""(position of the layer, its use)."""


@dataclass(frozen=True)
class EndWeights:
    """The slices before and after the blocks that an embedding takes."""

    patches: Pair
    class_token: Tensor
    positions: Tensor
    norm: Pair
    head: Pair


@dataclass(frozen=True)
class BlockWeights:
    """The slices that a block of one embedding, number of heads and ratio takes."""

    heads: int
    attention_norm: Pair
    queries: Pair
    key_tables: Pair
    value_tables: Pair
    projection: Pair
    mlp_norm: Pair
    widen: Pair
    narrow: Pair


class Weights:
    """The parameters of a supernet in one dtype, from which candidates take leading slices."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        patches = "patch_embed_super.proj.weight"
        self._parameters = {**parameters, patches: parameters[patches].flatten(1)}
        self._query_weights: dict[tuple[str, int, int], Tensor] = {}
        self._ends: dict[int, EndWeights] = {}
        self._blocks: dict[tuple[int, int, int, float], BlockWeights] = {}
        self._norms: dict[int, Tensor] = {}  # by the identity of what has the slices, all of which stay

    def norms(self, arch: Mapping[str, Any]) -> Tensor:
        """Returns the norms of the weights of a candidate's layers [layers], computed once for their slices."""
        embed, ends = arch["embed_dim"], self.ends(arch["embed_dim"])
        found = [self._norms_of(ends.patches, ends.patches)]
        for number, (heads, ratio) in enumerate(zip(arch["num_heads"], arch["mlp_ratio"], strict=True)):
            block = self.block(number, embed, heads, ratio)
            found.append(self._norms_of(block, block.queries, block.projection, block.widen, block.narrow))
        return torch.cat([*found, self._norms_of(ends.head, ends.head)])

    def _norms_of(self, owner: object, *layers: Pair) -> Tensor:
        if id(owner) not in self._norms:
            self._norms[id(owner)] = torch.stack([norm_of(weight) for weight, _ in layers])
        return self._norms[id(owner)]

    def ends(self, embed: int) -> EndWeights:
        """Returns the slices before and after the blocks, made once for an embedding."""
        if embed not in self._ends:
            patches, head = "patch_embed_super.proj", "head"
            self._ends[embed] = EndWeights(
                patches=self.linear(patches, embed, self._parameters[patches + ".weight"].shape[1]),
                class_token=self.token("cls_token", embed),
                positions=self.token("pos_embed", embed),
                norm=self.norm("norm", embed),
                head=self.linear(head, self._parameters[head + ".weight"].shape[0], embed),
            )
        return self._ends[embed]

    def block(self, number: int, embed: int, heads: int, ratio: float) -> BlockWeights:
        """Returns the slices of a block, made once: candidates take the same few again and again."""
        key = (number, embed, heads, ratio)
        if key not in self._blocks:
            name, inner, hidden = f"blocks.{number}.", HEAD_DIM * heads, mlp_width(embed, ratio)
            self._blocks[key] = BlockWeights(
                heads,
                attention_norm=self.norm(name + "attn_layer_norm", embed),
                queries=self.queries(name + "attn.qkv", 3 * inner, embed),
                key_tables=self.tables(name, "k"),
                value_tables=self.tables(name, "v"),
                projection=self.linear(name + "attn.proj", embed, inner),
                mlp_norm=self.norm(name + "ffn_layer_norm", embed),
                widen=self.linear(name + "fc1", hidden, embed),
                narrow=self.linear(name + "fc2", embed, hidden),
            )
        return self._blocks[key]

    def view(self, name: str, *shape: int) -> Tensor:
        """Returns the leading slice of this shape of a parameter, a view; every slice starts at 0 along every axis."""
        full = self._parameters[name]
        return full.as_strided(shape, full.stride())

    def linear(self, name: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Returns weight [rows, columns] and bias [rows] of a linear map."""
        return self.view(name + ".weight", rows, columns), self.view(name + ".bias", rows)

    def norm(self, name: str, width: int) -> tuple[Tensor, Tensor]:
        """Returns weight and bias [width] of a layer normalisation."""
        return self.view(name + ".weight", width), self.view(name + ".bias", width)

    def queries(self, name: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Returns `linear` of a query, key and value projection, its interleaved rows put into the order q, k, v."""
        key = (name, rows, columns)
        if key not in self._query_weights:
            interleaved = self.view(name + ".weight", rows, columns).view(-1, 3, columns)
            self._query_weights[key] = interleaved.transpose(0, 1).reshape(rows, columns)
        return self._query_weights[key], self.view(name + ".bias", rows)

    def tables(self, block: str, kind: str) -> tuple[Tensor, Tensor]:
        """Returns the vertical and horizontal table of relative positions of the keys ("k") or values ("v")."""
        prefix = f"{block}attn.rel_pos_embed_{kind}.embeddings_table_"
        return self._parameters[prefix + "v"], self._parameters[prefix + "h"]

    def token(self, name: str, width: int) -> Tensor:
        """Returns a token or position embedding [1, T, width]."""
        return self._parameters[name][..., :width]


@dataclass(frozen=True)
class _Block:
    """What the forward pass of a block leaves for its backward pass."""

    weights: BlockWeights
    attention_norm: NormalisedSum
    attention: RelativeAttention
    mlp_norm: NormalisedSum
    pre: Tensor
    post: Tensor


@dataclass(frozen=True)
class _End:
    """What the forward pass behind the blocks leaves for its backward pass."""

    norm: NormalisedSum
    pooled: Tensor
    logits: Tensor


class AutoFormerPass:
    """One pass of one candidate on one batch.

    Args:
        weights: of the supernet.
        arch: a canonical candidate.
        patches: [S, patches, 3 * size * size], of which the patch convolution is a linear map.
        grid: rows and columns of patches.
        memory: runs the segments of the pass: what precedes the blocks, each block, what follows them.
        activate: in every block.
        packs: whether the patterns of a block's activation are wanted.
    """

    def __init__(
        self,
        weights: Weights,
        arch: Mapping[str, Any],
        patches: Tensor,
        grid: tuple[int, int],
        *,
        memory: Memory,
        activate: Activate,
        packs: Sequence[bool],
    ) -> None:
        self._weights = weights
        self._embed: int = arch["embed_dim"]
        self._choices = list(zip(arch["num_heads"], arch["mlp_ratio"], packs, strict=True))
        self._patches = patches
        self._grid = grid
        self._memory = memory
        self._activate = activate
        self._blocks: list[_Block] = []
        self._ends = weights.ends(self._embed)

    @torch.no_grad()
    def forward(self, packed: Packed) -> Tensor:
        """Returns the logits [S, classes], and hands over the words of the activations that are wanted."""
        run = self._memory.run
        x, change = run("start", self._embed, (), self._start, nothing), None
        for number, (heads, ratio, packs) in enumerate(self._choices):
            weights = self._weights.block(number, self._embed, heads, ratio)
            work = partial(self._block, number, x, change, weights, packs)
            choice = (self._embed, heads, ratio, packs)
            block, change = run(("block", number), choice, _present(x, change), work, packed)
            self._blocks.append(block)
            x = block.mlp_norm.total
        self._end = run("end", self._embed, _present(x, change), partial(self._finish, x, change), nothing)
        return self._end.logits

    def kept(self) -> Iterator[Tensor]:
        """Yields what the forward pass has left for the backward pass."""
        for block in self._blocks:
            yield from (block.attention_norm.normalised, block.attention.output, block.mlp_norm.total, block.post)
        yield from (self._end.norm.normalised, self._end.logits)

    @torch.no_grad()
    def backward(self, grad: Tensor, deliver: Deliver, first: int) -> None:
        """Hands over every layer from the last to the one at position `first`, from the logits' gradient.

        The gradient lies in the memory of the pass. Lets go of what a block kept as soon as it is through, so that it
        can run once.
        """
        position = LAYERS_BEFORE + LAYERS_A_BLOCK * len(self._blocks)
        deliver(position, LayerUse(self._end.pooled, grad, self._ends.head[0]))
        if first >= position:
            return
        work = partial(self._backward_of_end, self._end, grad)
        grad = self._memory.run("end backward", self._embed, (grad, self._end.norm.normalised), work, nothing)
        while self._blocks and first < position:
            position -= LAYERS_A_BLOCK
            block, number = self._blocks.pop(), len(self._blocks)
            left_out = max(first - position, 0)
            choice = (self._embed, *self._choices[number], left_out)
            work = partial(self._backward_of, block, grad, position, left_out)
            grad = self._memory.run(("block backward", number), choice, (grad, block.post), work, deliver)
        if first < LAYERS_BEFORE:
            deliver(0, LayerUse(self._patches, grad[:, 1:], self._ends.patches[0]))

    def _start(self, empty: Empty, _: Emit) -> Tensor:
        """Returns the tokens [S, T, embed] that enter the first block."""
        patches, ends = self._patches, self._ends
        size = (len(patches), 1 + patches.shape[1], self._embed)
        tokens = empty(size, dtype=patches.dtype, device=patches.device)
        torch.add(ends.class_token, ends.positions[:, :1], out=tokens[:1, :1])
        tokens[1:, :1] = tokens[:1, :1]
        torch.add(F.linear(patches, *ends.patches), ends.positions[:, 1:], out=tokens[:, 1:])
        return tokens

    def _block(
        self,
        number: int,
        x: Tensor,
        change: Tensor | None,
        weights: BlockWeights,
        packs: bool,
        empty: Empty,
        emit: Emit,
    ) -> tuple[_Block, Tensor]:
        """Takes the tokens as a sum yet to be made, and leaves them so: as mlp_norm.total and what is returned."""
        attention_norm = NormalisedSum.of(x, change, *weights.attention_norm, empty=empty)
        qkv = _linear(attention_norm.normalised, weights.queries, empty)
        attention = RelativeAttention.of(
            qkv, weights.key_tables, weights.value_tables, heads=weights.heads, grid=self._grid, empty=empty
        )
        change = F.linear(attention.output, *weights.projection)
        mlp_norm = NormalisedSum.of(attention_norm.total, change, *weights.mlp_norm, empty=empty)
        pre = _linear(mlp_norm.normalised, weights.widen, empty)
        post, words = self._activate(pre, packs, empty)
        if words is not None:
            emit(number, words)
        block = _Block(weights, attention_norm, attention, mlp_norm, pre, post)
        return block, _linear(post, weights.narrow, empty)

    def _finish(self, x: Tensor, change: Tensor | None, empty: Empty, _: Emit) -> _End:
        norm = NormalisedSum.of(x, change, *self._ends.norm, empty=empty)
        pooled = empty((len(x), self._embed), dtype=x.dtype, device=x.device)
        torch.mean(norm.normalised[:, 1:], dim=1, out=pooled)
        return _End(norm, pooled, _linear(pooled, self._ends.head, empty))

    def _backward_of_end(self, end: _End, grad: Tensor, empty: Empty, _: Emit) -> Tensor:
        grad_pooled = torch.matmul(grad, self._ends.head[0])
        spread = torch.zeros_like(end.norm.normalised)
        spread[:, 1:] = (grad_pooled / (spread.shape[1] - 1)).unsqueeze(1)
        return end.norm.backward(spread, empty=empty)

    @staticmethod
    def _backward_of(
        block: _Block, grad: Tensor, position: int, left_out: int, empty: Empty, deliver: Deliver
    ) -> Tensor:
        """Returns the gradient at the input of a block whose layers begin at `position`.

        Its first `left_out` layers are not wanted, nor is a gradient further down then.
        """
        queries, projection = block.weights.queries[0], block.weights.projection[0]
        widen, narrow = block.weights.widen[0], block.weights.narrow[0]
        deliver(position + 3, LayerUse(block.post, grad, narrow))
        grad_pre = activation_backward(torch.matmul(grad, narrow), block.pre, "gelu", empty=empty)
        deliver(position + 2, LayerUse(block.mlp_norm.normalised, grad_pre, widen))
        if left_out >= 2:
            return grad
        grad = block.mlp_norm.backward(torch.matmul(grad_pre, widen), grad, empty=empty)
        deliver(position + 1, LayerUse(block.attention.output, grad, projection))
        grad_qkv = block.attention.backward(torch.matmul(grad, projection), empty=empty)
        deliver(position, LayerUse(block.attention_norm.normalised, grad_qkv, queries))
        return block.attention_norm.backward(torch.matmul(grad_qkv, queries), grad, empty=empty)


def _linear(x: Tensor, map_: Pair, empty: Empty) -> Tensor:
    """Returns a linear map of the rows of a contiguous x."""
    weight, bias = map_
    result = empty((*x.shape[:-1], len(weight)), dtype=x.dtype, device=x.device)
    torch.addmm(bias, x.view(-1, x.shape[-1]), weight.t(), out=result.view(-1, len(weight)))
    return result


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def nothing(*_: Any) -> None:
    """Takes what segments hand over that hand over nothing."""
