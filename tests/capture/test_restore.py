from __future__ import annotations

import copy
import random

import networks
import pytest
import torch
from torch import nn

import lswag_fast


class Stubborn(networks.Convolutions):
    """Fails in its real forward pass, not on shapes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = super().forward(images)
        if not images.is_meta and self.armed:
            raise MemoryError("no memory left")
        return out

    armed = False


def state_of(model: nn.Module) -> dict[str, object]:
    return {
        "parameters": {n: (p.detach().clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "identities": {n: id(p) for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "rng": (random.getstate(), torch.get_rng_state()),
        "flags": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
        ),
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key in ("identities", "modes", "hooks", "flags"):
        assert before[key] == after[key], key
    assert before["rng"][0] == after["rng"][0]  # type: ignore[index]
    assert torch.equal(before["rng"][1], after["rng"][1])  # type: ignore[index]
    for name, (value, requires_grad, grad) in before["parameters"].items():  # type: ignore[attr-defined]
        now, now_requires, now_grad = after["parameters"][name]  # type: ignore[index]
        assert torch.equal(value, now)
        assert requires_grad == now_requires
        assert (grad is None) == (now_grad is None), name
        assert grad is None or torch.equal(grad, now_grad)
    for name, value in before["buffers"].items():  # type: ignore[attr-defined]
        assert torch.equal(value, after["buffers"][name])  # type: ignore[index]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(training: bool, fails: bool) -> None:
    torch.manual_seed(3)
    model = Stubborn(norm=True).train(training)
    model.dropout = nn.Dropout(0.5)
    model.stem.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.head.register_forward_hook(lambda module, args, out: None)
    model.armed = fails
    images = torch.randn(4, *networks.IMAGE)
    torch.set_float32_matmul_precision("medium")
    try:
        before = copy.deepcopy(state_of(model))
        before["identities"] = {n: id(p) for n, p in model.named_parameters()}
        with torch.no_grad():
            if fails:
                with pytest.raises(MemoryError):
                    lswag_fast.score(model, images)
            else:
                lswag_fast.score(model, images)
        assert_same(before, state_of(model))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_dropout_is_off_while_scoring() -> None:
    torch.manual_seed(0)
    model = networks.SequenceFirst().train()
    images = torch.randn(4, *networks.IMAGE)
    assert lswag_fast.score(model, images).lswag == lswag_fast.score(model.eval(), images).lswag


def test_frozen_parameters_are_scored_like_the_others() -> None:
    torch.manual_seed(0)
    model = networks.Attention()
    images = torch.randn(4, *networks.IMAGE)
    free = lswag_fast.score(model, images)
    frozen = lswag_fast.score(model.requires_grad_(False), images)
    assert free.layers == frozen.layers
