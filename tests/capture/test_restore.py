from __future__ import annotations

import copy
import os
import random

import networks
import pytest
import torch
from torch import nn

import lswag_fast
from lswag_fast import value_checks
from lswag_fast.capture import sandbox
from lswag_fast.capture.sandbox import torch_settings

SAMPLES = 4


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


def test_everything_is_as_before_a_pass_that_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(networks.Between):
        """Counts its real passes over a whole batch, and keeps the last one's tokens."""

        calls = 0
        kept: torch.Tensor | None = None

        def body(self, x: torch.Tensor) -> torch.Tensor:
            if not x.is_meta and len(x) == SAMPLES:
                self.calls, self.kept = self.calls + 1, x
                counted.append(self.calls)
            return super().body(x)

    counted: list[int] = []
    torch.manual_seed(3)
    model = Counting().train()
    model.dropout = nn.Dropout(0.5)
    model.register_buffer("steps", torch.zeros(3))
    model.head.weight.grad = torch.ones_like(model.head.weight)
    images = torch.randn(SAMPLES, *networks.IMAGE)
    before = copy.deepcopy(state_of(model))
    before["identities"] = {n: id(p) for n, p in model.named_parameters()}
    monkeypatch.setattr(value_checks, "computes_apart", lambda tensor: True)
    lswag_fast.score(model, images)
    assert counted == [1, 1]
    assert (model.calls, model.kept) == (0, None)
    assert_same(before, state_of(model))


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


def test_what_a_forward_pass_keeps_is_put_back() -> None:
    torch.manual_seed(0)
    model = networks.Cached()
    images = torch.randn(4, *networks.IMAGE)
    lswag_fast.score(model, images, dtype="bfloat16")
    assert model.positions is None
    assert model.biases == {}
    model(images)
    assert model.biases.keys() == {"cpu"}


def test_recurrent_layers_go_on_with_their_own_weights() -> None:
    torch.manual_seed(0)
    model = networks.Recurrent()
    lswag_fast.score(model, torch.randn(4, *networks.IMAGE))
    assert all(a is b for a, b in zip(model.lstm._flat_weights, model.lstm.parameters(), strict=True))


def test_images_and_loss_keep_their_gradients() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.scale * (output.mean(1) - labels).square()

    loss = Scaled()
    images = torch.randn(4, *networks.IMAGE, requires_grad=True)
    lswag_fast.score(networks.Attention(), images, torch.zeros(4), loss=loss)
    assert images.grad is None
    assert loss.scale.grad is None


def test_a_model_that_works_in_place_on_its_input_leaves_the_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(inplace=True), networks.Attention())
    images = torch.randn(4, *networks.IMAGE)
    before = images.clone()
    result = lswag_fast.score(model, images, dtype="float32")
    assert torch.equal(images, before)
    model[0].inplace = False
    assert lswag_fast.score(model, images, dtype="float32").lswag == pytest.approx(result.lswag, rel=1e-6)


def test_inference_mode_outside_changes_nothing() -> None:
    torch.manual_seed(0)
    model, images, labels = networks.Attention(), torch.randn(4, *networks.IMAGE), torch.tensor([0, 1, 2, 3])
    expected = lswag_fast.score(model, images, labels).lswag
    with torch.inference_mode():
        assert lswag_fast.score(model, images.clone(), labels.clone()).lswag == expected
        assert torch.is_inference_mode_enabled()


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has one precision for all")
def test_precision_set_for_one_backend_is_lifted_and_put_back() -> None:
    seen: list[str] = []

    class Watch(networks.Attention):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.mkldnn.conv.fp32_precision)
            return super().forward(images)

    convolutions = torch.backends.mkldnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "bf16"
    try:
        lswag_fast.score(Watch(), torch.randn(4, *networks.IMAGE))
        assert set(seen) == {"ieee"}
        assert convolutions.fp32_precision == "bf16"
    finally:
        convolutions.fp32_precision = before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_older_and_newer_settings_of_precision_agree_inside(precision: str) -> None:
    """Where they contradict each other, torch's operations on CUDA raise."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch_settings():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("asked_for", [True, False])
@pytest.mark.parametrize("before", [None, ":16:8"])
def test_the_workspace_of_cublas_is_named_only_where_torch_asks_for_it(
    asked_for: bool, before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch reads the variable at every product, and may have given cuBLAS less memory than it then says."""
    monkeypatch.setattr(sandbox, "_CUBLAS_IS_ASKED_FOR", asked_for)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if before is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
    with torch_settings():
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (before or (":4096:8" if asked_for else None))
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == before
