"""The states of all layers as one row of numbers for each row of a batch: to be sent, saved and mixed by rows.

An empty state is zeros for every kind of memory, so a row of zeros stands for a row that starts anew.

Shapes: B batch rows, F numbers of all states of a row.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor


def as_rows(states: Sequence[tuple]) -> Tensor:
    """Return states, as `ARMTForCausalLM.initial_states`, as float32 [B, F]."""
    return torch.cat([tensor.reshape(len(tensor), -1) for tensor in chain.from_iterable(states)], dim=1)


def from_rows(rows: Tensor, shapes: Sequence[tuple]) -> list[tuple]:
    """Return the states that `as_rows` laid out. rows [B, F]; shapes: states of the same B rows, on any device."""
    sizes = [tensor[0].numel() for tensor in chain.from_iterable(shapes)]
    parts = iter(rows.split(sizes, dim=1))
    # Not views: a kernel may round differently where rows are far apart.
    return [type(state)(*(next(parts).reshape(tensor.shape).contiguous() for tensor in state)) for state in shapes]
