"""Small networks, each with one way of using its weights that a capture can get wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5
IMAGE = (3, 8, 8)


class Tokens(nn.Module):
    """[S, 3, 8, 8] -> [S, 16, 12]: an embedding that the networks below share."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.patch(images).flatten(2).transpose(1, 2)


class Base(nn.Module):
    """Tokens, a body that subclasses give, and a head over the mean token."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.tokens = Tokens(width)
        self.head = nn.Linear(width, CLASSES)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.tokens(images)).mean(1))


class Attention(Base):
    """nn.MultiheadAttention, whose out-projection module is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 16, 12))
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))

    def body(self, x: Tensor) -> Tensor:
        x = x + self.position
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class SequenceFirst(Base):
    """nn.TransformerEncoder with tokens on axis 0 and samples on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.3, activation="relu", batch_first=False)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def body(self, x: Tensor) -> Tensor:
        return self.encoder(x.transpose(0, 1)).transpose(0, 1)


class Tied(Base):
    """One matrix used forwards and transposed, as x W and as linear(x, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 12) / 4)

    def body(self, x: Tensor) -> Tensor:
        hidden = F.silu(F.linear(x, self.weight))
        return hidden @ self.weight + F.linear(hidden, self.weight.t())


class Repeated(Base):
    """One layer used twice, at different numbers of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(F.relu(self.layer(x))[:, ::3]))


class TokenMixing(Base):
    """A weight on the left of a product: W [16, 16] @ x [S, 16, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(16, 16) / 4)
        self.channel = nn.Parameter(torch.randn(12, 12) / 4)

    def body(self, x: Tensor) -> Tensor:
        return torch.matmul(F.gelu(self.mix @ x, approximate="tanh"), self.channel)


class Batched(Base):
    """A matrix a head in bmm, in einsum and in an addition in place: no fused rule."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.randn(3, 4, 4) / 2)
        self.out = nn.Parameter(torch.randn(12, 12) / 4)
        self.last = nn.Parameter(torch.randn(12, 12) / 4)

    def body(self, x: Tensor) -> Tensor:
        folded = x.unflatten(-1, (3, 4)).permute(2, 0, 1, 3).flatten(1, 2)
        y = torch.bmm(folded, self.heads).unflatten(1, (x.shape[0], 16)).permute(1, 2, 0, 3).flatten(2)
        y = torch.einsum("stc,oc->sto", F.hardswish(y), self.out)
        return torch.zeros_like(y).flatten(0, 1).addmm_(y.flatten(0, 1), self.last).view_as(y)


class SharedTable(Base):
    """A matrix that is also looked up as an embedding: only part of its gradient passes the linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 12)

    def body(self, x: Tensor) -> Tensor:
        x = x + self.table(torch.arange(16, device=x.device))
        return F.relu(F.linear(x, self.table.weight)) @ self.table.weight


class Derived(Base):
    """Weights computed from parameters: masked, normalised, of low rank, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.masked = nn.Parameter(torch.randn(12, 12) / 4)
        self.wide = nn.Parameter(torch.randn(12, 20) / 4)
        self.register_buffer("mask", (torch.rand(12, 12) > 0.3).float())
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))
        self.down = nn.Parameter(torch.randn(3, 12) / 2)
        self.up = nn.Parameter(torch.randn(12, 3) / 2)
        self.first = nn.Parameter(torch.randn(6, 12) / 4)
        self.second = nn.Parameter(torch.randn(6, 12) / 4)

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.masked * self.mask)) + (x @ self.wide.tanh())[..., 4:16]
        x = F.gelu(self.normed(x)) + F.linear(x, self.up @ self.down)
        return F.linear(x, torch.cat([self.first, self.second]))


class Interleaved(Base):
    """A weight whose rows are reordered by a copy, and one of which only a slice is used."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(36, 12) / 4)
        self.wide = nn.Parameter(torch.randn(20, 16) / 4)

    def body(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.view(-1, 3, 12).transpose(0, 1).reshape(-1, 12)).chunk(3, -1)
        return F.linear(F.scaled_dot_product_attention(q, k, v).relu(), self.wide[:12, :12])


class Windows(Base):
    """Windows folded into the batch, samples outermost; then tokens folded with the samples innermost."""

    def __init__(self) -> None:
        super().__init__()
        self.window = nn.Linear(12, 12)
        self.inner = nn.Linear(12, 12)

    def body(self, x: Tensor) -> Tensor:
        x = F.gelu(self.window(x.unflatten(1, (4, 4)).flatten(0, 1)))
        x = x.unflatten(0, (-1, 4)).flatten(1, 2)
        y = x.transpose(0, 1).reshape(-1, 12)
        y = F.relu(self.inner(y))
        return y.view(16, -1, 12).transpose(0, 1)


class Folded(Base):
    """Tokens folded with the samples outermost, or innermost: the same calls, of the same shapes."""

    def __init__(self, sample_major: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.sample_major = sample_major

    def body(self, x: Tensor) -> Tensor:
        if self.sample_major:
            return F.gelu(self.inner(x.flatten(0, 1))).unflatten(0, (-1, 16))
        return F.gelu(self.inner(x.transpose(0, 1).flatten(0, 1))).unflatten(0, (16, -1)).transpose(0, 1)


class Between(Base):
    """Tokens folded with the samples in their midst: neither order."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def folded(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def body(self, x: Tensor) -> Tensor:
        y = self.folded(x.unflatten(1, (4, 4)).transpose(0, 1).flatten(0, 2))
        return F.gelu(y.unflatten(0, (4, -1, 4)).transpose(0, 1).flatten(1, 2))


class BetweenActivation(Between):
    """An activation there too, which is then left out of the count."""

    def folded(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x))


class NoSampleAxis(Base):
    """A weight whose input is a constant table."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 12, bias=False))
        self.register_buffer("grid", torch.randn(16, 2))

    def body(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.bias_mlp(self.grid))


class Convolutions(nn.Module):
    """Grouped, depthwise, strided, padded, dilated, "same" and one-dimensional convolutions."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4)
        self.same = nn.Conv2d(12, 8, 2, padding="same")
        self.line = nn.Conv1d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)
        self.act = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(images)))
        x = F.relu6(self.grouped(F.silu(self.depthwise(x)))).relu_()
        x = F.hardswish(self.same(x))
        return self.head(self.line(x.flatten(2)).mean(-1))


class Dilations(nn.Module):
    """One kernel at two dilations, with outputs of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 3, 3) / 5)
        self.act = nn.ReLU6()
        self.head = nn.Linear(192, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(F.conv2d(images, self.kernel, padding=1))
        x = F.hardtanh(F.conv2d(x, self.kernel, padding=2, dilation=2))
        return self.head(x.flatten(1))


class Recurrent(Base):
    """A recurrent layer, which hands its weights over in a list and keeps them in another, and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 8, batch_first=True)
        self.cell = nn.GRUCell(8, 12)

    def body(self, x: Tensor) -> Tensor:
        states = self.lstm(x)[0]
        return F.relu(self.cell(states[:, -1], x[:, 0]))[:, None]


class Cached(Base):
    """Keeps what its first forward pass computed: by device in a dict, and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: Tensor | None = None
        self.biases: dict[str, Tensor] = {}
        self.table = nn.Parameter(torch.randn(4))

    def body(self, x: Tensor) -> Tensor:
        if self.positions is None:
            self.positions = torch.linspace(0, 1, 16, device=x.device, dtype=x.dtype)[:, None]
        bias = self.biases.setdefault(str(x.device), self.table[torch.arange(16, device=x.device) % 4][:, None])
        return F.gelu(x + self.positions + bias)


class Unused(Base):
    """A head that is computed and not returned, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(12, 7)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)

    def body(self, x: Tensor) -> Tensor:
        self.aside(x)
        return F.relu(self.frozen(x))


class Queries(Base):
    """Learned queries and a token: left out by definition, though they enter products."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.query = nn.Parameter(torch.randn(1, 2, 12))
        self.key = nn.Linear(12, 12)

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        scores = self.query.expand(x.shape[0], -1, -1) @ self.key(x).transpose(1, 2)
        return F.gelu(scores.softmax(-1) @ x)


class RelativeTable(Base):
    """Relative positions looked up in a table and multiplied with the tokens: a table, not a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(31, 12) / 4)
        self.value = nn.Linear(12, 12)

    def body(self, x: Tensor) -> Tensor:
        place = torch.arange(16, device=x.device)
        relative = self.table[place[:, None] - place[None, :] + 15]
        scores = torch.einsum("sic,ijc->sij", x, relative)
        return scores.softmax(-1) @ F.gelu(self.value(x))
