"""A space of numbers, for scorers that need no networks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from lswag_fast.engine.scorer import Scorer
from lswag_fast.errors import InputError
from lswag_fast.proxies.result import Counts, LayerRow, LswagResult, PatternSaturation

IMAGES = torch.arange(4 * 3 * 2 * 2, dtype=torch.float32).reshape(4, 3, 2, 2)


class NumberSpace:
    """Candidates are numbers from 0 to 999,999; each is its own model."""

    name = "numbers"
    coupled = False
    options: ClassVar = {"name": "numbers", "num_classes": 10}

    def canonical(self, arch: Mapping[str, Any]) -> dict[str, Any]:
        if not 0 <= arch["n"] < 1_000_000:
            raise InputError(f"n must be from 0 to 999999, got {arch['n']}")
        return {"n": int(arch["n"])}

    def encode(self, arch: Mapping[str, Any]) -> str:
        return json.dumps(self.canonical(arch))

    def build(self, arch: Mapping[str, Any], seed: int = 0) -> nn.Module:
        model = nn.Identity()
        model.n = arch["n"]
        return model


def result_of(n: int) -> LswagResult:
    """The score of a number is the number."""
    layer = LayerRow("w", 1, 100, 1, True, 0, 0.5, 0.5, 1.0, 1.0, None)
    sizes = PatternSaturation(0.5, None), Counts(1, 1, 0.0, 1)
    return LswagResult(float(n), 1.0, n, *sizes, (layer,), (1,), (), (), {}, {}, {}, 0.0, {})


def numbers(*values: int) -> Iterator[dict[str, int]]:
    return ({"n": value} for value in values)


def scorer(store: Any = None, **options: Any) -> Scorer:
    return Scorer(NumberSpace(), IMAGES, store=store, **{"device": "cpu", "dtype": "float32", **options})
