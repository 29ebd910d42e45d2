"""The correlation laboratory: which proxy ranks which task, how sure that is, and what it knows beyond counts."""

from __future__ import annotations

from .joining import Scores, joined, own_tasks
from .study import Estimate, Row, Task, TaskStudy, study
from .tables import Table, read

__all__ = ["Estimate", "Row", "Scores", "Table", "Task", "TaskStudy", "joined", "own_tasks", "read", "study"]
