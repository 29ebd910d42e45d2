"""The published formulation of AutoFormer, kept as slow as it is: the baseline and the oracle of equivalence tests.

After Vision_TransformerSuper of Chen et al., ICCV 2021 (github.com/microsoft/Cream, AutoFormer), in the setting of
its experiments: change_qkv, relative_position, gp, pre_norm, abs_pos, no dropout. Each attention gathers an
N x N x 64 table of relative positions for keys and one for values, and multiplies by them token by token; everything
else is left to autograd. One difference: GELU runs in the dtype of its input, where the published code goes through
float32, so that float64 comparisons mean something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lswag_fast.spaces import AutoFormerSpace

HEAD_DIM = 64
MAX_RELATIVE_POSITION = 14


class LinearSuper(nn.Linear):
    """A Linear that can be restricted to its leading rows and columns."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.sample_in, self.sample_out = in_features, out_features

    def set_sample_config(self, sample_in: int, sample_out: int) -> None:
        self.sample_in, self.sample_out = sample_in, sample_out

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, : self.sample_in][: self.sample_out, :], self.bias[: self.sample_out])


class QkvSuper(LinearSuper):
    """The projection to q, k, v: rows taken interleaved, the bias from the front."""

    def forward(self, x: Tensor) -> Tensor:
        columns = self.weight[:, : self.sample_in]
        rows = torch.cat([columns[i : self.sample_out : 3, :] for i in range(3)], dim=0)
        return F.linear(x, rows, self.bias[: self.sample_out])


class LayerNormSuper(nn.LayerNorm):
    """A LayerNorm that can be restricted to its leading features."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim)
        self.sample_embed_dim = embed_dim

    def set_sample_config(self, sample_embed_dim: int) -> None:
        self.sample_embed_dim = sample_embed_dim

    def forward(self, x: Tensor) -> Tensor:
        width = self.sample_embed_dim
        return F.layer_norm(x, (width,), self.weight[:width], self.bias[:width], self.eps)


class PatchEmbedSuper(nn.Module):
    """The patch convolution, restricted to its leading output channels."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.sample_embed_dim = embed_dim

    def set_sample_config(self, sample_embed_dim: int) -> None:
        self.sample_embed_dim = sample_embed_dim

    def forward(self, x: Tensor) -> Tensor:
        width = self.sample_embed_dim
        x = F.conv2d(x, self.proj.weight[:width], self.proj.bias[:width], stride=self.proj.stride)
        return x.flatten(2).transpose(1, 2)


class RelativePosition2D(nn.Module):
    """Gathers an embedding for every pair of tokens, [N, N, 64]; row 0 of a table belongs to the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings_table_v = nn.Parameter(torch.zeros(2 * MAX_RELATIVE_POSITION + 2, HEAD_DIM))
        self.embeddings_table_h = nn.Parameter(torch.zeros(2 * MAX_RELATIVE_POSITION + 2, HEAD_DIM))

    def forward(self, tokens: int) -> Tensor:
        patches = torch.arange(tokens - 1, device=self.embeddings_table_v.device)
        side = int((tokens - 1) ** 0.5)
        rows, columns = patches // side, patches % side
        distance_v = rows[None, :] - rows[:, None]
        distance_h = columns[None, :] - columns[:, None]
        limit = MAX_RELATIVE_POSITION
        index_v = F.pad(distance_v.clamp(-limit, limit) + limit + 1, (1, 0, 1, 0))
        index_h = F.pad(distance_h.clamp(-limit, limit) + limit + 1, (1, 0, 1, 0))
        return self.embeddings_table_v[index_v] + self.embeddings_table_h[index_h]


class AttentionSuper(nn.Module):
    """Multi-head attention with relative positions added to the keys and to the values."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.qkv = QkvSuper(embed_dim, 3 * HEAD_DIM * num_heads)
        self.rel_pos_embed_k = RelativePosition2D()
        self.rel_pos_embed_v = RelativePosition2D()
        self.proj = LinearSuper(HEAD_DIM * num_heads, embed_dim)
        self.sample_heads = num_heads
        self.scale = HEAD_DIM**-0.5

    def set_sample_config(self, embed_dim: int, num_heads: int) -> None:
        self.sample_heads = num_heads
        self.qkv.set_sample_config(embed_dim, 3 * HEAD_DIM * num_heads)
        self.proj.set_sample_config(HEAD_DIM * num_heads, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = self.sample_heads
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        attn = (q @ k.transpose(-2, -1)) * self.scale

        keys = self.rel_pos_embed_k(tokens)
        by_token = q.permute(2, 0, 1, 3).reshape(tokens, heads * batch, -1) @ keys.transpose(2, 1)
        attn = attn + by_token.transpose(1, 0).reshape(batch, heads, tokens, tokens) * self.scale
        attn = attn.softmax(dim=-1)

        x = (attn @ v).transpose(1, 2).reshape(batch, tokens, -1)
        values = self.rel_pos_embed_v(tokens)
        by_token = attn.permute(2, 0, 1, 3).reshape(tokens, batch * heads, -1) @ values
        by_sample = by_token.transpose(1, 0).reshape(batch, heads, tokens, -1).transpose(2, 1)
        x = x + by_sample.reshape(batch, tokens, -1)
        return self.proj(x)


class TransformerEncoderLayer(nn.Module):
    """One pre-norm layer; the identity where a sampled candidate is shallower."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(embed_dim * mlp_ratio)
        self.attn = AttentionSuper(embed_dim, num_heads)
        self.attn_layer_norm = LayerNormSuper(embed_dim)
        self.ffn_layer_norm = LayerNormSuper(embed_dim)
        self.fc1 = LinearSuper(embed_dim, hidden)
        self.activation = nn.GELU()
        self.fc2 = LinearSuper(hidden, embed_dim)
        self.is_identity_layer = False

    def set_sample_config(self, embed_dim: int, num_heads: int, mlp_ratio: float) -> None:
        hidden = int(embed_dim * mlp_ratio)
        self.attn.set_sample_config(embed_dim, num_heads)
        self.attn_layer_norm.set_sample_config(embed_dim)
        self.ffn_layer_norm.set_sample_config(embed_dim)
        self.fc1.set_sample_config(embed_dim, hidden)
        self.fc2.set_sample_config(hidden, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_identity_layer:
            return x
        x = x + self.attn(self.attn_layer_norm(x))
        return x + self.fc2(self.activation(self.fc1(self.ffn_layer_norm(x))))


class VisionTransformerSuper(nn.Module):
    """The supernet; `set_sample_config` restricts it to one candidate. Without it, the network at its full size.

    `num_heads` and `mlp_ratio` have one entry a layer, so that a candidate can also stand alone at its own size.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        embed_dim: int,
        num_heads: Sequence[int],
        mlp_ratio: Sequence[float],
    ) -> None:
        super().__init__()
        self.patch_embed_super = PatchEmbedSuper(patch_size, embed_dim)
        self.blocks = nn.ModuleList(
            TransformerEncoderLayer(embed_dim, heads, ratio) for heads, ratio in zip(num_heads, mlp_ratio, strict=True)
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.norm = LayerNormSuper(embed_dim)
        self.head = LinearSuper(embed_dim, num_classes)
        self.sample_embed_dim = embed_dim

    def set_sample_config(self, arch: Mapping[str, Any]) -> None:
        """Restricts the supernet to a candidate in its canonical form."""
        width = self.sample_embed_dim = arch["embed_dim"]
        self.patch_embed_super.set_sample_config(width)
        for layer, block in enumerate(self.blocks):
            block.is_identity_layer = layer >= arch["depth"]
            if not block.is_identity_layer:
                block.set_sample_config(width, arch["num_heads"][layer], arch["mlp_ratio"][layer])
        self.norm.set_sample_config(width)
        self.head.set_sample_config(width, self.head.out_features)

    def forward(self, images: Tensor) -> Tensor:
        width = self.sample_embed_dim
        x = self.patch_embed_super(images)
        x = torch.cat((self.cls_token[..., :width].expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.pos_embed[..., :width]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(torch.mean(x[:, 1:], dim=1))


def original_supernet(space: AutoFormerSpace, state_dict: Mapping[str, Tensor]) -> VisionTransformerSuper:
    """Returns the published supernet of a space with the given parameters."""
    choices = space.choices
    depth = max(choices.depth)
    supernet = _with_sizes(
        space, choices.supernet_embed_dim, [max(choices.num_heads)] * depth, [max(choices.mlp_ratio)] * depth
    )
    return _loaded(supernet, state_dict)


def original_candidate(
    space: AutoFormerSpace, arch: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> VisionTransformerSuper:
    """Returns a candidate of a space alone, at its own size, in the published formulation.

    `state_dict` is that of `space.build(arch)` or of a subnet.
    """
    arch = space.canonical(arch)
    candidate = _with_sizes(space, arch["embed_dim"], arch["num_heads"], arch["mlp_ratio"])
    return _loaded(candidate, state_dict)


def _with_sizes(
    space: AutoFormerSpace, embed_dim: int, num_heads: Sequence[int], mlp_ratio: Sequence[float]
) -> VisionTransformerSuper:
    return VisionTransformerSuper(
        image_size=space.options["image_size"],
        patch_size=space.options["patch_size"],
        num_classes=space.options["num_classes"],
        embed_dim=embed_dim,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
    )


def _loaded(model: VisionTransformerSuper, state_dict: Mapping[str, Tensor]) -> VisionTransformerSuper:
    model.to(next(iter(state_dict.values())).dtype)
    model.load_state_dict(state_dict)
    return model
