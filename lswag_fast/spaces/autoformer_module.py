"""The candidate network of the AutoFormer space: a vision transformer with 2-D relative positions.

Chen, Peng, Fu, Ling: AutoFormer: Searching Transformers for Visual Recognition, ICCV 2021. Head dimension 64, relative
positions in every layer, global average pooling over the patch tokens. Parameters have the names and layouts
of the published supernet, so that any candidate's are leading slices of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops.layer_norm import add_layer_norm, layer_norm
from ..ops.relative_attention import relative_attention

HEAD_DIM = 64
MAX_DISTANCE = 14
TABLE_ROWS = 2 * MAX_DISTANCE + 2
IMAGE_CHANNELS = 3

Parameters = Mapping[str, nn.Parameter]


def mlp_width(embed_dim: int, mlp_ratio: float) -> int:
    """Returns the hidden width of an MLP, cut to an integer as the published code does."""
    return int(embed_dim * mlp_ratio)


def parameter_shapes(
    arch: Mapping[str, Any], *, image_size: int, patch_size: int, num_classes: int
) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every parameter of a candidate, in the order of the forward pass."""
    embed = arch["embed_dim"]
    tokens = (image_size // patch_size) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed_super.proj.weight": (embed, IMAGE_CHANNELS, patch_size, patch_size),
        "patch_embed_super.proj.bias": (embed,),
        "cls_token": (1, 1, embed),
        "pos_embed": (1, tokens, embed),
    }
    for layer, (heads, ratio) in enumerate(zip(arch["num_heads"], arch["mlp_ratio"], strict=True)):
        inner, hidden = HEAD_DIM * heads, mlp_width(embed, ratio)
        block: dict[str, tuple[int, ...]] = {
            "attn_layer_norm.weight": (embed,),
            "attn_layer_norm.bias": (embed,),
            "attn.qkv.weight": (3 * inner, embed),
            "attn.qkv.bias": (3 * inner,),
            "attn.rel_pos_embed_k.embeddings_table_v": (TABLE_ROWS, HEAD_DIM),
            "attn.rel_pos_embed_k.embeddings_table_h": (TABLE_ROWS, HEAD_DIM),
            "attn.rel_pos_embed_v.embeddings_table_v": (TABLE_ROWS, HEAD_DIM),
            "attn.rel_pos_embed_v.embeddings_table_h": (TABLE_ROWS, HEAD_DIM),
            "attn.proj.weight": (embed, inner),
            "attn.proj.bias": (embed,),
            "ffn_layer_norm.weight": (embed,),
            "ffn_layer_norm.bias": (embed,),
            "fc1.weight": (hidden, embed),
            "fc1.bias": (hidden,),
            "fc2.weight": (embed, hidden),
            "fc2.bias": (embed,),
        }
        shapes.update((f"blocks.{layer}.{name}", shape) for name, shape in block.items())
    shapes |= {
        "norm.weight": (embed,),
        "norm.bias": (embed,),
        "head.weight": (num_classes, embed),
        "head.bias": (num_classes,),
    }
    return shapes


def draw_parameters(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Draws fresh float32 parameters on the CPU, without touching torch's global generator.

    Linear weights, tokens and tables are normal with standard deviation 0.02 (the published truncation at -2 and 2
    lies a hundred standard deviations away), their biases 0; norms are 1 and 0; the patch convolution has PyTorch's
    default. No distribution depends on the candidate's widths, so a slice of a drawn supernet is a fresh draw.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        value = torch.empty(shape)
        if name.startswith("patch_embed_super."):
            _, channels, height, width = shapes["patch_embed_super.proj.weight"]
            bound = (channels * height * width) ** -0.5
            value.uniform_(-bound, bound, generator=generator)
        elif name.endswith("norm.weight"):
            value.fill_(1.0)
        elif name.endswith(".bias"):
            value.zero_()
        else:
            value.normal_(0.0, 0.02, generator=generator)
        drawn[name] = value
    return drawn


class AutoFormer(nn.Module):
    """A candidate: images [S, 3, image_size, image_size] to logits [S, classes].

    `parameters` maps every name of :func:`parameter_shapes` to a Parameter, used as it is: a view stays a view.
    """

    def __init__(self, arch: Mapping[str, Any], parameters: Parameters, *, image_size: int, patch_size: int) -> None:
        super().__init__()
        self.arch = arch
        self.image_size = image_size
        self.patch_embed_super = _PatchEmbed(parameters, patch_size)
        self.cls_token = parameters["cls_token"]
        self.pos_embed = parameters["pos_embed"]
        side = image_size // patch_size
        self.blocks = nn.ModuleList(
            _Block(parameters, f"blocks.{layer}.", heads, (side, side)) for layer, heads in enumerate(arch["num_heads"])
        )
        self.norm = _LayerNorm(parameters, "norm")
        self.head = _Linear(parameters, "head")

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits, [S, classes]."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (IMAGE_CHANNELS, self.image_size, self.image_size):
            raise InputError(
                f"expected images [S, {IMAGE_CHANNELS}, {self.image_size}, {self.image_size}], "
                f"got {list(images.shape)}; resize them, or get the space with another image_size"
            )
        patches = self.patch_embed_super(images)
        tokens = torch.cat((self.cls_token.expand(images.shape[0], -1, -1), patches), dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens)[:, 1:].mean(dim=1))
        return logits


class _Block(nn.Module):
    def __init__(self, parameters: Parameters, prefix: str, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.attn_layer_norm = _LayerNorm(parameters, prefix + "attn_layer_norm")
        self.attn = _Attention(parameters, prefix + "attn.", heads, grid)
        self.ffn_layer_norm = _LayerNorm(parameters, prefix + "ffn_layer_norm")
        self.fc1 = _Linear(parameters, prefix + "fc1")
        self.activation = nn.GELU()
        self.fc2 = _Linear(parameters, prefix + "fc2")

    def forward(self, tokens: Tensor) -> Tensor:
        tokens, normalised = self.ffn_layer_norm.after_adding(self.attn(self.attn_layer_norm(tokens)), tokens)
        mixed: Tensor = tokens + self.fc2(self.activation(self.fc1(normalised)))
        return mixed


class _Attention(nn.Module):
    def __init__(self, parameters: Parameters, prefix: str, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.heads = heads
        self.grid = grid
        self.qkv = _InterleavedLinear(parameters, prefix + "qkv")
        self.rel_pos_embed_k = _RelativePosition(parameters, prefix + "rel_pos_embed_k.")
        self.rel_pos_embed_v = _RelativePosition(parameters, prefix + "rel_pos_embed_v.")
        self.proj = _Linear(parameters, prefix + "proj")

    def forward(self, tokens: Tensor) -> Tensor:
        context = relative_attention(
            self.qkv(tokens),
            self.rel_pos_embed_k.tables,
            self.rel_pos_embed_v.tables,
            heads=self.heads,
            grid=self.grid,
        )
        mixed: Tensor = self.proj(context)
        return mixed


class _RelativePosition(nn.Module):
    def __init__(self, parameters: Parameters, prefix: str) -> None:
        super().__init__()
        self.embeddings_table_v = parameters[prefix + "embeddings_table_v"]
        self.embeddings_table_h = parameters[prefix + "embeddings_table_h"]

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.embeddings_table_v, self.embeddings_table_h


class _PatchEmbed(nn.Module):
    def __init__(self, parameters: Parameters, patch_size: int) -> None:
        super().__init__()
        weight = parameters["patch_embed_super.proj.weight"]
        self.proj = nn.Conv2d(weight.shape[1], weight.shape[0], patch_size, stride=patch_size, device="meta")
        self.proj.weight = weight
        self.proj.bias = parameters["patch_embed_super.proj.bias"]

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(images)
        return patches.flatten(2).transpose(1, 2)


class _Linear(nn.Linear):
    """nn.Linear over given parameters; its own constructor would draw weights only to throw them away."""

    def __init__(self, parameters: Parameters, name: str) -> None:
        nn.Module.__init__(self)
        self.weight = parameters[name + ".weight"]
        self.bias = parameters[name + ".bias"]
        self.out_features, self.in_features = self.weight.shape


class _InterleavedLinear(_Linear):
    """The query, key and value projection; weight row 3 * m + j is row m of q, k or v (j = 0, 1, 2).

    Interleaved rows make a candidate with fewer heads a leading slice of the supernet. The bias is not interleaved:
    it belongs to the outputs [q | k | v], as in the published supernet.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.view(-1, 3, self.in_features).transpose(0, 1).reshape(-1, self.in_features)
        return F.linear(input, weight, self.bias)


class _LayerNorm(nn.LayerNorm):
    """nn.LayerNorm (eps 1e-5) over given parameters."""

    def __init__(self, parameters: Parameters, name: str) -> None:
        nn.Module.__init__(self)
        self.weight = parameters[name + ".weight"]
        self.bias = parameters[name + ".bias"]
        self.normalized_shape = (self.weight.shape[0],)
        self.eps = 1e-5
        self.elementwise_affine = True

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.weight, self.bias, eps=self.eps)

    def after_adding(self, change: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens + change, and that normalised."""
        return add_layer_norm(tokens, change, self.weight, self.bias, eps=self.eps)
