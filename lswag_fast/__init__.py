"""lswag_fast: zero-cost proxies at search-space scale, by fused native kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops, proxies, spaces
    from .engine.scorer import Scorer
    from .ensembles.libra import libra
    from .ensembles.libra_plus import libra_plus
    from .errors import InputError, StoreError
    from .proxies.result import LswagResult
    from .scoring import score

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "LswagResult",
    "Scorer",
    "StoreError",
    "libra",
    "libra_plus",
    "ops",
    "proxies",
    "score",
    "spaces",
]

_HOMES = {
    "InputError": "errors",
    "LswagResult": "proxies.result",
    "Scorer": "engine.scorer",
    "StoreError": "errors",
    "libra": "ensembles.libra",
    "libra_plus": "ensembles.libra_plus",
    "score": "scoring",
}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, which keeps `import lswag_fast` light."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
