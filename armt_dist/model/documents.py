"""Documents that share a segment: attention and memory start anew where one begins.

The rows of a segment, `[head | tokens | memory]`, fall into groups: 0 is the document that the incoming state belongs
to, 1, 2, ... are those that begin in the segment. A token belongs to its document, the head to the document of the
first token, and the memory rows to the last document. Rows see their own group only, group 0 alone reads the incoming
state, and where a document begins, the segment writes into an empty state.

Shapes: B batch, T tokens of a segment, N positions of its row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """What a layer needs to know of the documents in a segment."""

    carried: Tensor  # [B, N] bool, rows of the document that the incoming state belongs to
    reset: Tensor  # [B] bool, whether a document begins in the segment


class Reset(NamedTuple):
    """An update of a state that is emptied first, where a document begins."""

    update: Any  # a MemoryUpdate
    reset: Tensor  # [B] bool

    def onto(self, state: Any) -> Any:
        """Return the state after this update."""
        return self.update.onto(emptied(state, self.reset))


def groups(starts: Tensor, head_rows: int, memory_rows: int) -> Tensor:
    """Return the group of every row of a segment. starts [B, T], true where a document begins -> [B, N] int64."""
    group = starts.long().cumsum(1)
    return torch.cat([group[:, :1].expand(-1, head_rows), group, group[:, -1:].expand(-1, memory_rows)], dim=1)


def documents_of(group: Tensor) -> Documents:
    """Return what a layer needs, from the groups [B, N] of all rows so far."""
    return Documents(group == 0, group[:, -1] > 0)


def apart(mask: Tensor, group: Tensor) -> Tensor:
    """Hide from each of the last queries what is of another group. mask [B or 1, 1, queries, keys], group [B, keys]."""
    queries = group[:, group.shape[1] - mask.shape[2] :]
    other = queries[:, None, :, None] != group[:, None, None, :]
    return mask.masked_fill(other, torch.finfo(mask.dtype).min)


def emptied(state: Any, reset: Tensor) -> Any:
    """Return a memory state, zeros where `reset` [B]: an empty state is zeros for every kind of memory."""
    return type(state)(*(t.masked_fill(reset.view(-1, *[1] * (t.dim() - 1)), 0) for t in state))


def check_starts(starts: Tensor, input_ids: Tensor) -> Tensor:
    """Return `document_starts` as bool. Raises ValueError unless there is one for each token."""
    if starts.shape != input_ids.shape:
        raise ValueError(
            f"document_starts of shape {list(starts.shape)}: must be that of input_ids, {list(input_ids.shape)}"
        )
    return starts.bool()
