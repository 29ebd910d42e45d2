"""The neural tangent kernel of a network on its batch, without a gradient a sample of the whole network in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capture import Layer
from ..capture.run import CaptureMode
from ..ops.gradient_moments import Convolution
from .network import Network
from .spectator import Spectator

_HELD = 2**25  # values of gradients held at once: 128 MiB in float32
_PAIRED = 2**11  # rows above which a matrix of all pairs of rows is not formed


def tangent_kernel(network: Network) -> Tensor:
    """Returns K [S, S] float64 on the CPU: K[m, n] = <g_m, g_n>; computed once a network.

    g_n is the gradient of the sum of sample n's logits with respect to the weights of all layers. The passes are in
    float32 whatever the dtype of the score, and so is each g_n; products of two of them are summed in float64.

    One forward and backward pass gives the inputs a [S, T, I] and output gradients d [S, T, O] of every layer that
    capture covers: its g_n = d_n^T a_n, formed for one layer (or part of it) at a time, or, where that takes fewer
    operations, <g_m, g_n> = sum over t, u of (a_m[t] . a_n[u]) (d_m[t] . d_n[u]). Elsewhere, and where the samples are
    coupled, each g_n takes a backward pass of its own.

    Raises:
        UnavailableError: the model returns no logits.
    """
    kernel: Tensor = network.once("tangent kernel", lambda: _tangent_kernel(network))
    return kernel


def _tangent_kernel(network: Network) -> Tensor:
    grams = _Grams(len(network.images), network.images.device)
    covered: set[str] = set()
    if network.plan.coupled is None:
        mode = CaptureMode(network.plan, grams, len(network.images), fused=True)
        with mode:
            output = network.run(network.images.float(), dtype=torch.float32)
        total = network.logits(output).float().sum()
        if total.requires_grad:
            torch.autograd.grad(total, mode.anchor, allow_unused=True)
        covered = {network.plan.layers[position].name for position in mode.delivered}
    rest = [layer for layer in network.plan.layers if layer.name not in covered]
    for names in _parts(rest, len(network.images)):
        rows = _gradient_rows(network, names)
        for columns in torch.split(rows, max(1, _HELD // (2 * len(rows))), dim=1):
            grams.kernel += columns.double() @ columns.double().t()
    return grams.kernel.cpu()


class _Grams(Spectator):
    """Adds up the inner products of per-sample gradients, layer by layer, as a backward pass hands them over."""

    def __init__(self, samples: int, device: torch.device) -> None:
        self.kernel = torch.zeros(samples, samples, dtype=torch.float64, device=device)

    def weight(
        self,
        layer: Layer,
        inputs: list[Tensor],
        output_grads: list[Tensor],
        convolution: Convolution | None,
        operand: Tensor | None = None,
    ) -> None:
        """Adds the inner products of one weight's gradients, which are sums over its uses."""
        forms = [_matrix_form(a, d, convolution) for a, d in zip(inputs, output_grads, strict=True)]
        self.kernel += _gram(torch.cat([a for a, _ in forms], -1), torch.cat([d for _, d in forms], -1))


def _matrix_form(inputs: Tensor, grads: Tensor, convolution: Convolution | None) -> tuple[Tensor, Tensor]:
    """Returns a [S, G, I, T] and d [S, G, O, T] with the gradient of sample n, group g of channels, d a^T [O, I]."""
    samples = len(inputs)
    if convolution is None:
        a, d = (t.reshape(samples, 1, -1, t.shape[-1]).transpose(-1, -2) for t in (inputs, grads))
        return a.float(), d.float()
    c = convolution
    unfolded = F.unfold(inputs.float(), c.kernel_size, c.dilation, c.padding, c.stride)
    places = unfolded.shape[-1]
    return unfolded.view(samples, c.groups, -1, places), grads.float().reshape(samples, c.groups, -1, places)


def _gram(inputs: Tensor, grads: Tensor) -> Tensor:
    """Returns [S, S] float64: the inner products of the gradients d a^T of a [S, G, I, T] and d [S, G, O, T]."""
    samples, groups, width, places = inputs.shape
    height = grads.shape[2]
    paired = samples * places**2 * (width + height) < width * height * (places + samples)
    if groups == 1 and paired and samples * places <= _PAIRED:
        a, d = (t[:, 0].transpose(1, 2).reshape(samples * places, -1).double() for t in (inputs, grads))
        return ((a @ a.t()) * (d @ d.t())).view(samples, places, samples, places).sum((1, 3))
    total = torch.zeros(samples, samples, dtype=torch.float64, device=inputs.device)
    for part in torch.split(grads, max(1, _HELD // (samples * groups * width)), dim=2):
        rows = (part @ inputs.transpose(-1, -2)).flatten(1).double()
        total += rows @ rows.t()
    return total


def _parts(layers: Sequence[Layer], samples: int) -> Iterator[list[str]]:
    """Yields the layers' names in parts whose gradients of all samples can be held at once (or one by one)."""
    names: list[str] = []
    held = 0
    for layer in layers:
        if names and held + samples * layer.numel > _HELD:
            yield names
            names, held = [], 0
        names.append(layer.name)
        held += samples * layer.numel
    if names:
        yield names


def _gradient_rows(network: Network, names: Sequence[str]) -> Tensor:
    """Returns g [S, P] float32 of some weights, from a backward pass a sample."""
    parameters = network.parameters(torch.float32)
    leaves = {name: parameters[name].detach().requires_grad_() for name in names}
    images = network.images.float()

    def totals(batch: Tensor) -> Tensor:
        return network.logits(network.run(batch, leaves, dtype=torch.float32)).float().sum(1)

    coupled = totals(images) if network.plan.coupled is not None else None
    rows = []
    for n in range(len(images)):
        total = coupled[n] if coupled is not None else totals(images[n : n + 1])[0]
        rows.append(_flat_gradient(total, leaves, keep=coupled is not None))
    return torch.stack(rows)


def _flat_gradient(total: Tensor, leaves: dict[str, Tensor], *, keep: bool) -> Tensor:
    wanted = list(leaves.values())
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if total.requires_grad:
        found = torch.autograd.grad(total, wanted, retain_graph=keep, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(wanted, found, strict=True)])
