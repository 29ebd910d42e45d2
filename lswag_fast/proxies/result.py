"""What a score is made of, as plain data: reading a store needs this and not torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Counts:
    """What a network is by size alone; scores are shown beside these because they follow them closely."""

    parameters: int
    multiply_adds: int  # of one image
    sum_log_numel: float  # sum over the layers in the window of log(number of weights)
    positions: int  # of the activations that Psi counts, for one sample


@dataclass(frozen=True)
class PatternSaturation:
    """How much of its range Psi uses: patterns / min(2^S, positions), and the bound that is within 5 %."""

    ratio: float
    bound: str | None  # "samples" (2^S), "positions", or None below 0.95


@dataclass(frozen=True)
class LayerRow:
    """One weight (a Parameter used as the matrix or kernel of a linear map or convolution)."""

    name: str
    index: int  # 1 to L, by first use in the forward pass
    percentile: int  # 10 * int((index / L * 100) // 10)
    numel: int
    in_window: bool  # outside it nothing is computed, and all below is None
    dead: int | None
    log_sum_inverse_sigma: float | None  # None: every weight is dead
    log_sum_mean_over_sigma: float | None
    mean_sigma: float | None
    mean_abs_gradient: float | None
    slow: str | None  # why this weight took one forward and backward pass a group; None: it did not


@dataclass(frozen=True)
class LswagResult:
    """The L-SWAG score of one network, its two factors, and what to read it beside."""

    lswag: float  # trainability * expressivity
    trainability: float  # Lambda
    expressivity: int  # Psi
    pattern_saturation: PatternSaturation
    counts: Counts
    layers: tuple[LayerRow, ...]
    patterns_by_activation: tuple[int, ...] | None  # with pooling "sum"
    uncovered: tuple[str, ...]
    warnings: tuple[str, ...]
    proxies: dict[str, float]  # those asked for, by name; NaN where a proxy has no value, with a warning that says why
    proxy_seconds: dict[str, float]  # what each would take alone, the part of the shared pass that it needs included
    proxy_details: dict[str, dict[str, float]]  # what a proxy tells beside its value, such as its conditioning
    seconds: float
    options: dict[str, Any]  # resolved

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain values that JSON can hold."""
        return asdict(self)
