"""Other ways to the trainability of L-SWAG: whole per-sample gradients, by the packages that people use for them.

Each takes the candidate in the published formulation and returns Lambda with G = S. Biases, norms, tokens and tables
are frozen, which spares work that the score does not need, the scatter of the tables' gradients above all. Only the
last, the loop as published code for such proxies has it, leaves every parameter trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from original_autoformer import AttentionSuper, LinearSuper, PatchEmbedSuper, QkvSuper, VisionTransformerSuper
from torch import Tensor, nn

DEAD = 2.0**-22


class PatchEmbed(nn.Module):
    """Calls the convolution as a module, which is where hooks listen."""

    def __init__(self, proj: nn.Conv2d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def with_plain_modules(candidate: VisionTransformerSuper) -> nn.Module:
    """Returns the candidate with its weights in nn.Linear and nn.Conv2d, the only classes that all packages know.

    All else is frozen.

    The rows of the query, key and value projections are put in the order that a plain Linear computes them in; sums
    over weights do not notice.
    """
    candidate.requires_grad_(False)
    for parent in list(candidate.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LinearSuper):
                setattr(parent, name, _plain_linear(child))
            elif isinstance(child, PatchEmbedSuper):
                setattr(parent, name, PatchEmbed(_trained(child.proj)))
    assert not any(isinstance(m, LinearSuper) for m in candidate.modules())
    assert any(isinstance(m, AttentionSuper) for m in candidate.modules())
    return candidate


def _plain_linear(layer: LinearSuper) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
    weight = torch.cat([layer.weight[i::3] for i in range(3)]) if isinstance(layer, QkvSuper) else layer.weight
    linear.weight, linear.bias = nn.Parameter(weight.detach()), layer.bias
    return _trained(linear)


def _trained(layer: Any) -> Any:
    layer.weight.requires_grad_(True)
    return layer


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def log_sum_inverse_sigma(gradients: Tensor) -> Tensor:
    """Returns a layer's term of Lambda from its per-sample gradients [S, ...], all of them stored."""
    sigma, mean = torch.std_mean(gradients.abs(), dim=0, correction=0)
    return sigma[sigma > DEAD * mean].reciprocal().sum(dtype=torch.float64).log()


def trainability(gradients: Iterable[Tensor]) -> float:
    return float(sum(log_sum_inverse_sigma(g) for g in gradients))


def torch_func(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """torch.func: vmap over the gradient function of one sample."""
    weights = {name: p.detach() for name, p in _weights(model).items()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (image[None],))
        return F.cross_entropy(logits, label[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return lambda: trainability(per_sample(weights, images, labels).values())


def opacus(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """Opacus (Yousefpour et al., 2021): hooks that keep grad_sample on every Parameter."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum")

    def run() -> float:
        F.cross_entropy(wrapped(images), labels, reduction="sum").backward()
        found = trainability(p.grad_sample for p in _weights(model).values())
        for p in _weights(model).values():
            p.grad = p.grad_sample = None
        return found

    return run


def backpack(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """BackPACK (Dangel, Kunstner, Hennig, ICLR 2020): BatchGrad, during the backward pass."""
    from backpack import backpack as extended_backward
    from backpack import extend
    from backpack.extensions import BatchGrad

    model = extend(model)
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> float:
        value = loss(model(images), labels)
        with extended_backward(BatchGrad()):
            value.backward()
        found = trainability(p.grad_batch for p in _weights(model).values())
        for p in _weights(model).values():
            p.grad = None
            del p.grad_batch
        return found

    return run


def loop(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """One forward and backward pass a sample, and Welford's moments of |g|: no per-sample gradient is kept."""
    return _loop(model, list(_weights(model).values()), images, labels)


def loop_training_everything(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """The same with gradients of every parameter, of which those of the weights are used."""
    weights = list(_weights(model).values())
    return _loop(model.requires_grad_(True), weights, images, labels)


def _loop(model: nn.Module, weights: list[nn.Parameter], images: Tensor, labels: Tensor) -> Callable[[], float]:
    def run() -> float:
        mean = [torch.zeros_like(w) for w in weights]
        squares = [torch.zeros_like(w) for w in weights]
        for n in range(len(images)):
            F.cross_entropy(model(images[n : n + 1]), labels[n : n + 1]).backward()
            for w, m, s in zip(weights, mean, squares, strict=True):
                assert w.grad is not None
                g = w.grad.abs_()
                delta = g - m
                m.add_(delta, alpha=1 / (n + 1))
                s.addcmul_(delta, g - m)
            model.zero_grad()
        terms = []
        for m, s in zip(mean, squares, strict=True):
            sigma = (s / len(images)).sqrt_()
            terms.append(sigma[sigma > DEAD * m].reciprocal().sum(dtype=torch.float64).log())
        return float(sum(terms))

    return run
