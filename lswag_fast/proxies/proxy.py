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
    """What the shared forward and backward pass can collect for a proxy, layer by layer."""

    MOMENTS = auto()  # of |g| over the groups, of every weight
    SIGNED = auto()  # of g over the groups, of every weight
    GRADIENT = auto()  # of the batch's mean loss, reduced against the weight itself
    OUTPUTS = auto()  # the output of every layer against the gradient there
    PATTERNS = auto()  # the signs of every activation, packed across samples
    DISTINCT = auto()  # the number of distinct patterns among all of these
    AGREEMENTS = auto()  # at how many positions each two samples agree in sign
    NORMS = auto()  # the Euclidean norm of every weight


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

    The value is that of the source. Higher is better, except where `lower_is_better` says otherwise.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """Authors, venue, year, and where in it."""
    gradient_based: ClassVar[bool]
    """Whether a backward pass is needed."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What to collect in the shared pass; a proxy that needs nothing of it runs passes of its own, or none."""
    whole: ClassVar[bool] = True
    """Whether it looks at the whole network, whatever the window of the score."""
    lower_is_better: ClassVar[bool] = False
    """Whether the source ranks the lowest value first."""
    from_pass: ClassVar[bool] = False
    """Whether it reads nothing but numbers of the shared pass: neither `network` nor what `words` hold, and
    `distinct_patterns` and `agreements` only where it `needs` them. On a device such a proxy costs no wait, and is
    evaluated beside the pass of the next candidate. A class derived from such a one has to say so again."""

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
