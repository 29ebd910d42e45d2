"""The errors that bad input raises, always before any work is done."""


class InputError(ValueError):
    """An argument cannot be used; the message says what was given, what is accepted and what to do."""


class StoreError(RuntimeError):
    """A score store cannot be opened, read or written; the message says what to do."""


class ScoreError(RuntimeError):
    """A candidate could not be scored (its loss is not finite, it has no weights); the message says why."""
