"""Scoring many candidates of one search space into a store."""

from __future__ import annotations

from .scorer import Scorer

__all__ = ["Scorer"]
