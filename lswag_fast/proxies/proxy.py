"""What a proxy is: its name and source, what it needs from the shared pass, and how it is reduced to one number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, is_dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from .evidence import Evidence


class Need(Enum):
    """What the shared forward and backward pass can collect for a proxy, and where its evidence then has it.

    MOMENTS: of |g| over the groups, of every weight (`layers[i].moments`).
    SIGNED: of g over the groups, of every weight (`layers[i].moments.signed`).
    GRADIENT: of the batch's mean loss, reduced against the weight itself (`layers[i].gradient`).
    OUTPUTS: the output of every layer against the gradient there (`layers[i].channel_saliency`).
    PATTERNS: the signs of every activation, packed across samples (`words`).
    DISTINCT: the number of distinct patterns among all of these (`distinct_patterns`).
    AGREEMENTS: at how many positions each two samples agree in sign (`agreements`).
    NORMS: the Euclidean norm of every weight (`layers[i].norm`).
    """

    MOMENTS = auto()
    SIGNED = auto()
    GRADIENT = auto()
    OUTPUTS = auto()
    PATTERNS = auto()
    DISTINCT = auto()
    AGREEMENTS = auto()
    NORMS = auto()


OF_PATTERNS = frozenset((Need.PATTERNS, Need.DISTINCT, Need.AGREEMENTS))
"""What the forward pass alone gives."""
OF_GRADIENTS = frozenset((Need.MOMENTS, Need.SIGNED, Need.GRADIENT, Need.OUTPUTS))
"""What the backward pass gives."""


class UnavailableError(Exception):
    """A proxy has no value for a network; the text says why. The result then holds NaN, and a warning with the text."""


def finite(value: float, cause: str) -> float:
    """Returns `value`; raises UnavailableError with `cause` where it is NaN or infinite."""
    if not math.isfinite(value):
        raise UnavailableError(f"its value would be {value}: {cause}")
    return value


class Proxy(ABC):
    """A zero-cost proxy. A subclass is a frozen dataclass, whose fields are the options of the proxy.

    The value is that of the source. Higher is better, except where `lower_is_better` says otherwise. A store knows a
    proxy by name, class and options: give one that you change another name, or its old values are found again.

    Attributes:
        name: by which it is known, in results, stores and tables.
        source: authors, venue, year, and where in it.
        gradient_based: whether a backward pass is needed.
        needs: what to collect for it in the shared pass, of Need; what nobody needs is None (or NaN) in the evidence. A
            proxy that needs nothing runs passes of its own, or none.
        whole: whether it looks at the whole network, whatever the window of the score.
        lower_is_better: whether the source ranks the lowest value first.
        from_pass: whether it reads nothing but numbers of the shared pass: neither `evidence.network` nor what
            `evidence.words` hold, and `distinct_patterns` and `agreements` only where it needs them. On a device such a
            proxy costs no wait, and is evaluated beside the pass of the next candidate. A class derived from such a one
            has to say so again.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    gradient_based: ClassVar[bool]
    needs: ClassVar[frozenset[Need]] = frozenset()
    whole: ClassVar[bool] = True
    lower_is_better: ClassVar[bool] = False
    from_pass: ClassVar[bool] = False

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "from_pass" not in vars(cls):
            cls.from_pass = False

    @abstractmethod
    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network. Raises UnavailableError where it has none."""

    def details(self, evidence: Evidence) -> dict[str, float]:
        """Returns by name what to read the value beside: its conditioning, its parts. Raises as `value` does."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Returns name and options as plain values that JSON can hold, and the class of a proxy of the user's own."""
        from .registry import is_registered

        kind = type(self)
        place = f"{kind.__module__}.{kind.__qualname__}"
        own = {} if is_registered(kind) else {"class": place, "lower_is_better": self.lower_is_better}
        return {"name": self.name, **own, **(asdict(self) if is_dataclass(self) else {})}
