"""Checks of values that a device may still be computing while it is given the work that hangs on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor


@dataclass(frozen=True)
class ValueCheck:
    """A check of the values of a tensor by a few numbers, to which they are reduced on their own device.

    Attributes:
        name: of the tensor, among all that are checked.
        values: the tensor.
        numbers: what its values were reduced to, where it is.
        refuse: takes the numbers, from anywhere; raises InputError where they speak against the values.
        mended: returns values that pass, the same wherever they are good; waits for nothing.
    """

    name: str
    values: Tensor
    numbers: Tensor
    refuse: Callable[[Tensor], None]
    mended: Callable[[], Tensor]

    def passed(self, late: LateChecks | None) -> Tensor:
        """Returns the values, once they have passed.

        Where a device has them and `late` is given, nothing waits: `late` gets the check, and the values returned are
        mended, so that no work on them fails before it is judged. Raises InputError where they do not pass now.
        """
        if late is None or not computes_apart(self.values):
            self.refuse(self.numbers)
            return self.values
        late.add(self.name, self.numbers, self.refuse)
        return self.mended()


class LateChecks:
    """Checks whose numbers come to the host with the results of the work that they are about; each is judged once.

    As a context manager it judges them ahead of any error inside, which what they find may have caused.
    """

    def __init__(self) -> None:
        self._checks: dict[str, tuple[Tensor, Callable[[Tensor], None]]] = {}

    def add(self, name: str, numbers: Tensor, judge: Callable[[Tensor], None]) -> None:
        """Takes one more check: `judge` takes the numbers, from anywhere, and raises where the work is in vain."""
        self._checks[name] = (numbers, judge)

    def numbers(self) -> dict[str, Tensor]:
        """Returns what is to be brought to the host, by name."""
        return {name: numbers for name, (numbers, _) in self._checks.items()}

    def judge(self, numbers: Mapping[str, Tensor]) -> None:
        """Takes the numbers of all checks by name; raises the error of the first, in the order added, that fails."""
        checks, self._checks = self._checks, {}
        for name, (_, judge) in checks.items():
            judge(numbers[name])

    def __enter__(self) -> LateChecks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.judge(self.numbers())


def computes_apart(tensor: Tensor) -> bool:
    """Whether the host, to read a value of `tensor`, waits for a device that computes on its own."""
    return tensor.is_cuda
