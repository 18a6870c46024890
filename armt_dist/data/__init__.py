"""Tasks: tokens and pre-shifted labels, the same for every world size."""

from .batch import IGNORE, Batch, Difficulty, Split, Task
from .loader import DataConfig, make_task

__all__ = ["IGNORE", "Batch", "DataConfig", "Difficulty", "Split", "Task", "make_task"]
