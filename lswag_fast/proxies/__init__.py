"""Zero-cost proxies: one file each, all known by name."""

from .proxy import Need, Proxy, UnavailableError
from .registry import get, names

__all__ = ["Need", "Proxy", "UnavailableError", "get", "names"]
