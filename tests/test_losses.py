"""The default loss and its gradient."""

from __future__ import annotations

import pytest
import torch

from lswag_fast.losses import CrossEntropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 300.0, 6e4])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_gradient_has_the_bits_of_autograd(dtype: torch.dtype, scale: float, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = (scale * torch.randn(7, classes, generator=generator)).clamp(-6e4, 6e4).to(dtype)
    labels = torch.randint(classes, (7,), generator=generator)
    leaf = logits.clone().requires_grad_()
    expected = CrossEntropy()(leaf, labels)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    losses, found = CrossEntropy.with_gradient(logits, labels, torch.empty)
    assert torch.equal(losses, expected)
    assert losses.dtype == torch.float32
    assert found.dtype == dtype
    assert torch.equal(found, gradient)


def test_logits_that_are_not_finite_stay_so() -> None:
    logits = torch.tensor([[1.0, float("nan"), 0.0], [float("inf"), 0.0, 0.0]])
    losses, gradient = CrossEntropy.with_gradient(logits, torch.tensor([0, 0]), torch.empty)
    assert torch.isnan(losses).all()
    assert torch.isnan(gradient).all()
