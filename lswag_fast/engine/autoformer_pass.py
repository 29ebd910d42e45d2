"""The forward and backward pass of an AutoFormer candidate on slices of its supernet, written out.

The numbers are those of :class:`lswag_fast.spaces.autoformer_module.AutoFormer`: Chen, Peng, Fu, Ling, AutoFormer:
Searching Transformers for Visual Recognition, ICCV 2021. No weight gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.gelu import activation_backward
from ..ops.layer_norm import NormalisedSum
from ..ops.relative_attention import RelativeAttention
from ..spaces.autoformer_module import HEAD_DIM, mlp_width

LAYERS_BEFORE = 1
LAYERS_A_BLOCK = 4
"""The patch kernel comes first; each block has qkv, proj, fc1 and fc2, and then comes the head."""

Pair = tuple[Tensor, Tensor]
"""Weight and bias, or the vertical and the horizontal table."""
Activate = Callable[[int, Tensor], Tensor]
"""(number of the block, pre-activation [S, T, hidden]) -> GELU of it."""
Deliver = Callable[[int, Tensor, Tensor, Tensor], None]
"""(position of the layer, its inputs [S, ..., I], the gradients at its outputs [S, ..., O], its weight [O, I])."""


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


class AutoFormerPass:
    """One pass of one candidate on one batch.

    Args:
        weights: of the supernet.
        arch: a canonical candidate.
        patches: [S, patches, 3 * size * size], of which the patch convolution is a linear map.
        grid: rows and columns of patches.
    """

    def __init__(self, weights: Weights, arch: Mapping[str, Any], patches: Tensor, grid: tuple[int, int]) -> None:
        self._weights = weights
        self._arch = arch
        self._embed: int = arch["embed_dim"]
        self._patches = patches
        self._grid = grid
        self._blocks: list[_Block] = []
        self._ends = weights.ends(self._embed)

    @torch.no_grad()
    def forward(self, activate: Activate) -> Tensor:
        """Returns the logits [S, classes]."""
        embed, weights, ends = self._embed, self._weights, self._ends
        tokens = F.linear(self._patches, *ends.patches)
        start = ends.class_token.expand(tokens.shape[0], -1, -1)
        x = torch.cat((start, tokens), dim=1) + ends.positions
        change: Tensor | None = None
        for number, choice in enumerate(zip(self._arch["num_heads"], self._arch["mlp_ratio"], strict=True)):
            x, change = self._block(number, x, change, weights.block(number, embed, *choice), activate)
        self._norm = NormalisedSum.of(x, change, *ends.norm)
        self._pooled = self._norm.normalised[:, 1:].mean(dim=1)
        return F.linear(self._pooled, *ends.head)

    def _block(
        self, number: int, x: Tensor, change: Tensor | None, weights: BlockWeights, activate: Activate
    ) -> tuple[Tensor, Tensor]:
        """Takes the tokens as a sum yet to be made, and returns them so: a normalisation makes it on the way."""
        attention_norm = NormalisedSum.of(x, change, *weights.attention_norm)
        qkv = F.linear(attention_norm.normalised, *weights.queries)
        attention = RelativeAttention.of(
            qkv, weights.key_tables, weights.value_tables, heads=weights.heads, grid=self._grid
        )
        change = F.linear(attention.output, *weights.projection)
        mlp_norm = NormalisedSum.of(attention_norm.total, change, *weights.mlp_norm)
        pre = F.linear(mlp_norm.normalised, *weights.widen)
        post = activate(number, pre)
        self._blocks.append(_Block(weights, attention_norm, attention, mlp_norm, pre, post))
        return mlp_norm.total, F.linear(post, *weights.narrow)

    @torch.no_grad()
    def backward(self, grad: Tensor, deliver: Deliver, first: int) -> None:
        """Hands over every layer from the last to the one at position `first`, from the logits' gradient.

        Frees what a block kept as soon as it is through, so that it can run once.
        """
        position = LAYERS_BEFORE + LAYERS_A_BLOCK * len(self._blocks)
        head = self._ends.head[0]
        deliver(position, self._pooled, grad, head)
        if first >= position:
            return
        grad_pooled = torch.matmul(grad, head)
        spread = torch.zeros_like(self._norm.normalised)
        spread[:, 1:] = (grad_pooled / (spread.shape[1] - 1)).unsqueeze(1)
        grad = self._norm.backward(spread)
        while self._blocks and first < position:
            position -= LAYERS_A_BLOCK
            grad = self._backward_of(self._blocks.pop(), grad, deliver, position, first)
        if first < LAYERS_BEFORE:
            deliver(0, self._patches, grad[:, 1:], self._ends.patches[0])

    @staticmethod
    def _backward_of(block: _Block, grad: Tensor, deliver: Deliver, position: int, first: int) -> Tensor:
        """Returns the gradient at the input of a block whose layers begin at `position`; none below `first` counts."""
        queries, projection = block.weights.queries[0], block.weights.projection[0]
        widen, narrow = block.weights.widen[0], block.weights.narrow[0]
        deliver(position + 3, block.post, grad, narrow)
        grad_pre = activation_backward(torch.matmul(grad, narrow), block.pre, "gelu")
        deliver(position + 2, block.mlp_norm.normalised, grad_pre, widen)
        if first >= position + 2:
            return grad
        grad = block.mlp_norm.backward(torch.matmul(grad_pre, widen), grad)
        deliver(position + 1, block.attention.output, grad, projection)
        grad_qkv = block.attention.backward(torch.matmul(grad, projection))
        deliver(position, block.attention_norm.normalised, grad_qkv, queries)
        return block.attention_norm.backward(torch.matmul(grad_qkv, queries), grad)
