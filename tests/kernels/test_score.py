"""A whole candidate scored through the kernels, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; pip install 'lswag-fast[gpu]'")
if torch.cuda.is_available():
    pytest.skip("kernels are not interpreted where there is a CUDA device", allow_module_level=True)

import lswag_fast
from lswag_fast.kernels import (
    gelu,
    gradient_moments_launch,
    layer_norm,
    relative_attention,
    relative_attention_backward,
)
from lswag_fast.spaces.autoformer_module import AutoFormer, draw_parameters, parameter_shapes


def test_an_autoformer_candidate_has_the_score_of_the_cpu(device, monkeypatch):
    monkeypatch.delenv("LSWAG_BACKEND")
    arch = {"embed_dim": 24, "num_heads": [1, 2], "mlp_ratio": [2, 2], "depth": 2}
    size = {"image_size": 16, "patch_size": 8}
    drawn = draw_parameters(parameter_shapes(arch, num_classes=10, **size), seed=0)
    # At the standard deviation of 0.02 that is drawn, these few channels would all but vanish.
    parameters = {
        name: torch.nn.Parameter(5 * value if "table" in name or "weight" in name else value)
        for name, value in drawn.items()
    }
    network = AutoFormer(arch, parameters, **size)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(4)

    called = set()
    for kernel in (gelu, gradient_moments_launch, layer_norm, relative_attention, relative_attention_backward):
        for way in {"forward", "backward", "launch"} & set(vars(kernel)):
            original, name = getattr(kernel, way), f"{kernel.__name__}.{way}"
            monkeypatch.setattr(
                kernel,
                way,
                lambda *given, original=original, name=name, **options: called.add(name) or original(*given, **options),
            )
    expected = lswag_fast.score(network, images, labels, dtype="float32")
    assert not called
    monkeypatch.setenv("LSWAG_BACKEND", "triton")
    got = lswag_fast.score(network, images, labels, dtype="float32")
    assert {name.removeprefix("lswag_fast.kernels.") for name in called} >= {
        "gelu.backward",
        "gradient_moments_launch.launch",
        "layer_norm.forward",
        "layer_norm.backward",
        "relative_attention.forward",
        "relative_attention_backward.backward",
    }
    assert got.expressivity == expected.expressivity
    for a, b in zip(got.layers, expected.layers, strict=True):
        assert a.log_sum_inverse_sigma == pytest.approx(b.log_sum_inverse_sigma, abs=1e-5), a.name
