"""The command line, `lswag-fast`.

Exit codes: 0, all is fine; 1, some candidate failed or some line of an arch file could not be read; 2, bad input, or a
store that cannot be used; 130, interrupted (what was finished is in the store).
"""

from __future__ import annotations

import os
import sys

from ..errors import InputError, StoreError
from .app import app

__all__ = ["app", "main"]


def main() -> None:
    """Runs the command line; errors of input and store become one line on stderr."""
    try:
        app()
    except (InputError, StoreError) as error:
        print(f"lswag-fast: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); without this Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
