"""What the score is measured against, ready to be called: plain passes, and other ways to per-sample gradients.

Run as a script with METHOD SAMPLES THREADS, it prints by how many bytes one call raises the peak memory, as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import measure
import per_sample_gradients
import torch
import torch.nn.functional as F
from original_autoformer import original_candidate
from torch import Tensor, nn

import lswag_fast
from lswag_fast import images, spaces

ARCH = {
    "embed_dim": 216,
    "depth": 13,
    "num_heads": [3 + layer % 2 for layer in range(13)],
    "mlp_ratio": [3.5 + 0.5 * (layer % 2) for layer in range(13)],
}
"""The middle candidate of AutoFormer-Tiny."""

BASELINE = "plain pass, published formulation, float32"
SCORES = {"L-SWAG, float32": "float32", "L-SWAG, bfloat16": "bfloat16"}
OWN = {
    "plain pass, space.build, float32": torch.float32,
    "plain pass, space.build, bfloat16": torch.bfloat16,
}
PACKAGES = {
    "torch.func vmap": "torch_func",
    "Opacus": "opacus",
    "BackPACK": "backpack",
    "loop over samples": "loop",
    "loop over samples, all trained": "loop_training_everything",
}
PLAIN = (BASELINE, *OWN)


class Subject:
    """The candidate, its supernet, and a batch of Gaussian images."""

    def __init__(self, samples: int, device: str = "cpu") -> None:
        self.device = device
        self.space = spaces.get("autoformer-tiny", image_size=224, patch_size=16, num_classes=1000)
        self.supernet = self.space.supernet(seed=0).to(device)
        data = images.load("noise", samples, image_size=224, seed=0)
        self.images, self.labels = data.images.to(device), data.labels.to(device)

    def method(self, name: str) -> Callable[[], Any]:
        """Returns one run of a method of that name: a pass, or a score that returns a result or Lambda."""
        if name in SCORES:
            return self._score(SCORES[name])
        if name in OWN:
            return _plain_pass(self._own(OWN[name]), self.images.to(OWN[name]), self.labels)
        if name == BASELINE:
            return _plain_pass(self._published(), self.images, self.labels)
        build = getattr(per_sample_gradients, PACKAGES[name])
        model = per_sample_gradients.with_plain_modules(self._published())
        run: Callable[[], Any] = build(model, self.images, self.labels)
        return run

    def _own(self, dtype: torch.dtype) -> nn.Module:
        return self.space.build(ARCH, seed=0).to(self.device, dtype)

    def _published(self) -> Any:
        return original_candidate(self.space, ARCH, self.supernet.subnet(ARCH).state_dict()).to(self.device)

    def _score(self, dtype: str) -> Callable[[], Any]:
        candidate = self.supernet.subnet(ARCH)

        def run() -> lswag_fast.LswagResult:
            return lswag_fast.score(candidate, self.images, self.labels, dtype=dtype, device=self.device)

        return run


def _plain_pass(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward, cross-entropy, backward to every parameter."""

    def run() -> None:
        F.cross_entropy(model(images).float(), labels).backward()
        model.zero_grad(set_to_none=True)

    return run


def main() -> None:
    name, samples, threads = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(threads))
    # One small product brings in the thread pool and the matrix library, which are no part of any method's need.
    torch.ones(64, 64) @ torch.ones(64, 64)
    run = Subject(int(samples)).method(name)
    print(json.dumps(measure.peak_bytes(run)))


if __name__ == "__main__":
    main()
