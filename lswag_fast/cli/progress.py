"""How far a run is, on stderr: a bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich import progress as bars
from rich.console import Console
from rich.text import Text

QUIET_SECONDS = 30.0
"""Without a terminal, a line is written at most this often."""


class _Rate(bars.ProgressColumn):
    def render(self, task: bars.Task) -> Text:
        return Text(_rate(task.speed), style="cyan") if task.speed else Text("")


class Progress:
    """Counts candidates of a run of `total`."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = self._scored = 0
        self._started = self._told = time.monotonic()
        self._bar: bars.Progress | None = None
        if sys.stderr.isatty():
            columns = (
                bars.TextColumn("scoring"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                _Rate(),
                bars.TimeRemainingColumn(),
            )
            self._bar = bars.Progress(*columns, console=Console(stderr=True), speed_estimate_period=60.0)
            self._task = self._bar.add_task("scoring", total=total)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def advance(self, *, reused: bool) -> None:
        """Counts one candidate."""
        self._done += 1
        self._scored += not reused
        if self._bar:
            self._bar.advance(self._task)
        elif time.monotonic() - self._told >= QUIET_SECONDS:
            self._told = time.monotonic()
            self.tell(self._line())

    def tell(self, text: str) -> None:
        """Writes a line without garbling the bar."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Ends the display."""
        if self._bar:
            self._bar.stop()

    def _line(self) -> str:
        speed = self._scored / (time.monotonic() - self._started)
        left = f", about {(self._total - self._done) / speed / 60:.1f} min left" if speed else ""
        return f"{self._done} of {self._total} candidates, {_rate(speed)}{left}"


def _rate(per_second: float) -> str:
    return f"{per_second:.1f} a second" if per_second >= 1 else f"{60 * per_second:.1f} a minute"
