"""The forward and backward pass of an AutoFormer candidate on slices of its supernet, written out.

The numbers are those of :class:`lswag_fast.spaces.autoformer_module.AutoFormer`: Chen, Peng, Fu, Ling, AutoFormer:
Searching Transformers for Visual Recognition, ICCV 2021. No weight gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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

Activate = Callable[[int, Tensor], Tensor]
"""(number of the block, pre-activation [S, T, hidden]) -> GELU of it."""
Deliver = Callable[[int, Tensor, Tensor, Tensor], None]
"""(position of the layer, its inputs [S, ..., I], the gradients at its outputs [S, ..., O], its weight [O, I])."""


class Weights:
    """The parameters of a supernet in one dtype, from which candidates take leading slices."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        patches = "patch_embed_super.proj.weight"
        self._parameters = {**parameters, patches: parameters[patches].flatten(1)}
        self._query_weights: dict[tuple[str, int, int], Tensor] = {}

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


@dataclass
class _Block:
    """What the forward pass of a block leaves for its backward pass."""

    attention_norm: NormalisedSum
    query_weight: Tensor
    attention: RelativeAttention
    projection: Tensor
    mlp_norm: NormalisedSum
    widen: Tensor
    pre: Tensor
    post: Tensor
    narrow: Tensor


class AutoFormerPass:
    """One pass of one candidate on one batch.

    Args:
        weights: of the supernet.
        arch: a canonical candidate.
        patches: [S, patches, 3 * size * size], of which the patch convolution is a linear map.
        grid: rows and columns of patches.
        classes: of the head.
    """

    def __init__(
        self, weights: Weights, arch: Mapping[str, Any], patches: Tensor, grid: tuple[int, int], classes: int
    ) -> None:
        self._weights = weights
        self._arch = arch
        self._embed: int = arch["embed_dim"]
        self._patches = patches
        self._grid = grid
        self._blocks: list[_Block] = []
        self._head, self._head_bias = weights.linear("head", classes, self._embed)

    @torch.no_grad()
    def forward(self, activate: Activate) -> Tensor:
        """Returns the logits [S, classes]."""
        embed, weights = self._embed, self._weights
        tokens = F.linear(self._patches, *weights.linear("patch_embed_super.proj", embed, self._patches.shape[2]))
        start = weights.token("cls_token", embed).expand(len(tokens), -1, -1)
        x = torch.cat((start, tokens), dim=1) + weights.token("pos_embed", embed)
        change: Tensor | None = None
        for number, (heads, ratio) in enumerate(zip(self._arch["num_heads"], self._arch["mlp_ratio"], strict=True)):
            x, change = self._block(number, x, change, heads, mlp_width(embed, ratio), activate)
        self._norm = NormalisedSum.of(x, change, *weights.norm("norm", embed))
        self._pooled = self._norm.normalised[:, 1:].mean(dim=1)
        return F.linear(self._pooled, self._head, self._head_bias)

    def _block(
        self, number: int, x: Tensor, change: Tensor | None, heads: int, hidden: int, activate: Activate
    ) -> tuple[Tensor, Tensor]:
        """Takes the tokens as a sum yet to be made, and returns them so: a normalisation makes it on the way."""
        name, embed, weights = f"blocks.{number}.", self._embed, self._weights
        inner = HEAD_DIM * heads
        attention_norm = NormalisedSum.of(x, change, *weights.norm(name + "attn_layer_norm", embed))
        query_weight, query_bias = weights.queries(name + "attn.qkv", 3 * inner, embed)
        qkv = F.linear(attention_norm.normalised, query_weight, query_bias)
        attention = RelativeAttention.of(
            qkv, weights.tables(name, "k"), weights.tables(name, "v"), heads=heads, grid=self._grid
        )
        projection, bias = weights.linear(name + "attn.proj", embed, inner)
        change = F.linear(attention.output, projection, bias)
        mlp_norm = NormalisedSum.of(attention_norm.total, change, *weights.norm(name + "ffn_layer_norm", embed))
        widen, bias = weights.linear(name + "fc1", hidden, embed)
        pre = F.linear(mlp_norm.normalised, widen, bias)
        post = activate(number, pre)
        narrow, bias = weights.linear(name + "fc2", embed, hidden)
        self._blocks.append(
            _Block(attention_norm, query_weight, attention, projection, mlp_norm, widen, pre, post, narrow)
        )
        return mlp_norm.total, F.linear(post, narrow, bias)

    @torch.no_grad()
    def backward(self, grad: Tensor, deliver: Deliver, first: int) -> None:
        """Hands over every layer from the last to the one at position `first`, from the logits' gradient.

        Frees what a block kept as soon as it is through, so that it can run once.
        """
        position = LAYERS_BEFORE + LAYERS_A_BLOCK * len(self._blocks)
        deliver(position, self._pooled, grad, self._head)
        if first >= position:
            return
        grad_pooled = torch.matmul(grad, self._head)
        spread = torch.zeros_like(self._norm.normalised)
        spread[:, 1:] = (grad_pooled / (spread.shape[1] - 1)).unsqueeze(1)
        grad = self._norm.backward(spread)
        while self._blocks and first < position:
            position -= LAYERS_A_BLOCK
            grad = self._backward_of(self._blocks.pop(), grad, partial(_from, deliver, position), first - position)
        if first < LAYERS_BEFORE:
            patches = self._weights.view("patch_embed_super.proj.weight", self._embed, self._patches.shape[2])
            deliver(0, self._patches, grad[:, 1:], patches)

    @staticmethod
    def _backward_of(block: _Block, grad: Tensor, deliver: Deliver, first: int) -> Tensor:
        """Returns the gradient at the input of a block, whose layers are 0 to 3; those below `first` are not needed."""
        deliver(3, block.post, grad, block.narrow)
        grad_pre = activation_backward(torch.matmul(grad, block.narrow), block.pre, "gelu")
        deliver(2, block.mlp_norm.normalised, grad_pre, block.widen)
        if first >= 2:
            return grad
        grad = block.mlp_norm.backward(torch.matmul(grad_pre, block.widen), grad)
        deliver(1, block.attention.output, grad, block.projection)
        grad_qkv = block.attention.backward(torch.matmul(grad, block.projection))
        deliver(0, block.attention_norm.normalised, grad_qkv, block.query_weight)
        return block.attention_norm.backward(torch.matmul(grad_qkv, block.query_weight), grad)


def _from(deliver: Deliver, position: int, layer: int, inputs: Tensor, output_grads: Tensor, operand: Tensor) -> None:
    deliver(position + layer, inputs, output_grads, operand)
