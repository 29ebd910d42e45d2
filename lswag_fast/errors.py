"""The errors that bad input raises, before any work wherever the host can tell, and how a lack of memory is known."""


class InputError(ValueError):
    """An argument cannot be used; the message says what was given, what is accepted and what to do."""


class StoreError(RuntimeError):
    """A score store cannot be opened, read or written; the message says what to do."""


class ScoreError(RuntimeError):
    """A candidate could not be scored (its loss is not finite, it has no weights); the message says why."""


def is_out_of_memory(error: Exception) -> bool:
    """Tells whether a device had too little memory: torch says so by an error of its own, CUDA and Triton in words."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))
