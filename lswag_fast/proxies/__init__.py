"""Zero-cost proxies: one file each, all known by name."""

from .evidence import Evidence, LayerEvidence
from .proxy import Need, Proxy, UnavailableError
from .registry import get, names

__all__ = ["Evidence", "LayerEvidence", "Need", "Proxy", "UnavailableError", "get", "names"]
