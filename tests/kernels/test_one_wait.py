"""A score on a device waits for it once: shown on the CPU, whose tensors tell when the host reads their values."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")
if torch.cuda.is_available():
    pytest.skip("on a CUDA device torch itself tells what waits", allow_module_level=True)

import networks

import lswag_fast
from lswag_fast import spaces, value_checks
from lswag_fast.engine.autoformer import AutoFormerEngine
from lswag_fast.options import ScoreOptions
from lswag_fast.proxies import statistics
from lswag_fast.spaces.autoformer_module import AutoFormer, draw_parameters, parameter_shapes

READS = {"item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "equal", "allclose", "unique", "masked_select"}
READS |= {"__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__", "bincount"}
ARCH = {"embed_dim": 24, "num_heads": [1, 2], "mlp_ratio": [2, 2], "depth": 2}


class OnHost(Tensor):
    """A tensor that has come to the host, and whatever is computed from it."""


class Reads(TorchFunctionMode):
    """Notes where the host reads values of tensors that it has not been brought."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        indexed = func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
        if (func.__name__ in READS or indexed) and not isinstance(args[0], OnHost):
            frame: Any = sys._getframe(1)
            files = []
            while frame is not None:
                files.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {func.__name__}")
                frame = frame.f_back
            # The interpreter of Triton reads what a kernel on a device would.
            if not any("/triton/" in file for file in files):
                self.places.append(next((file for file in files if "lswag_fast" in file), files[0]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The names of the tensors that each copy to the host brought."""
    made: list[set[str]] = []

    class Copies:
        def __init__(self, tensors: Mapping[str, Tensor]) -> None:
            if tensors:
                made.append(set(tensors))
            self.copies = {name: t.clone().as_subclass(OnHost) for name, t in tensors.items()}

        def wait(self) -> dict[str, Tensor]:
            return self.copies

    monkeypatch.setattr(statistics, "HostCopies", Copies)
    return made


FROM_PASS = ("lambda", "psi", "zico", "swap", "reg_swap", "nwot", "grad_norm", "snip", "plain", "gradsign", "gsnr")
FROM_PASS = (*FROM_PASS, "l2_norm", "params", "flops", "az_nas_complexity")


@pytest.mark.parametrize(
    ("proxies", "window", "others"),
    [
        (("lswag",), (0, 100), set()),
        (FROM_PASS, (0, 100), {"agreements", "norms"}),
        (("lswag", "swap"), (0, 50), {"distinct"}),
    ],
    ids=["L-SWAG alone", "with others", "inside a window"],
)
def test_a_candidate_is_launched_without_a_wait_and_read_after_one(
    proxies: tuple[str, ...],
    window: tuple[int, int],
    others: set[str],
    device: torch.device,
    brought: list[set[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = spaces.get("autoformer-tiny", image_size=32, num_classes=10)
    options = ScoreOptions(device="cpu", dtype="float32", proxies=proxies, window=window).resolved(4)
    scored = AutoFormerEngine(space.supernet(seed=0), images(32), torch.arange(4), None, options)
    # The interpreter takes a minute for a candidate of the space; this one is outside it.
    monkeypatch.setattr(scored, "_space", SimpleNamespace(macs=lambda arch: 1, params=lambda arch: 1))
    with Reads() as reads:
        pending = scored.launch(ARCH)
    assert not reads.places
    with Reads() as reads:
        result = pending.finish()
    assert not reads.places
    assert len(brought) == 1
    assert brought[0] == {"losses", "counts", "moments", *others}
    assert result.expressivity > 0
    assert all(row.log_sum_inverse_sigma is not None for row in result.layers if row.in_window)
    assert set(result.proxies) == set(proxies)
    assert all(map(math.isfinite, result.proxies.values()))


@pytest.mark.parametrize(
    ("apart", "reads_in", "checked"),
    [(True, [], {"images", "labels"}), (False, ["losses.py", "scoring.py"], set())],
    ids=["on a device", "on the CPU"],
)
def test_any_module_is_read_after_one_wait_with_the_checks_of_what_a_device_was_given(
    apart: bool,
    reads_in: list[str],
    checked: set[str],
    device: torch.device,
    brought: list[set[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(value_checks, "computes_apart", lambda tensor: apart)
    size = {"image_size": 16, "patch_size": 8}
    drawn = draw_parameters(parameter_shapes(ARCH, num_classes=10, **size), seed=0)
    network = AutoFormer(ARCH, {name: torch.nn.Parameter(value) for name, value in drawn.items()}, **size)
    with Reads() as reads:
        lswag_fast.score(network, images(16), torch.arange(4), dtype="float32")
    assert sorted(place.rpartition("/")[2].partition(":")[0] for place in reads.places) == reads_in
    assert brought == [{"losses", "counts", "moments", *checked}]


@pytest.mark.parametrize(
    ("network", "passes"),
    [
        (networks.Attention, 1),
        (networks.SequenceFirst, 1),
        (networks.Windows, 1),
        (partial(networks.Folded, True), 1),
        (partial(networks.Folded, False), 1),
        (networks.Between, 2),
    ],
    ids=["attention", "sequence first", "windows", "samples outermost", "samples innermost", "neither"],
)
def test_folded_samples_are_told_without_a_wait(
    network: Callable[[], torch.nn.Module],
    passes: int,
    device: torch.device,
    brought: list[set[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, labels = network(), torch.arange(4)
    at_once = lswag_fast.score(model, images(8), labels, dtype="float32")
    brought.clear()
    monkeypatch.setattr(value_checks, "computes_apart", lambda tensor: True)
    with Reads() as reads:
        late = lswag_fast.score(model, images(8), labels, dtype="float32")
    assert not reads.places
    assert len(brought) == passes
    assert brought[0] == {"losses", "counts", "moments", "images", "labels", "orders"}
    assert (late.lswag, late.layers, late.warnings) == (at_once.lswag, at_once.layers, at_once.warnings)


def images(size: int) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
