"""One rank's part of a micro-batch, cut out of it and laid out like the hidden states.

Shapes: B batch rows, N = H + tokens + M positions of a segment's row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..model.modeling_armt import segment_lengths
from ..schedule.grid import Grid, block_segments, check_grid, rank_blocks


class Piece(NamedTuple):
    """One rank's part of a micro-batch: the segments of its blocks, in order."""

    input_ids: Tensor  # [B, tokens of the blocks] int64
    # [B, the same] the token to predict at each position, -100 where not scored; in host memory, so that picking the
    # scored positions does not wait for the device
    labels: Tensor
    attention_mask: Tensor | None  # the same, 1 at real tokens; None when nothing is padded
    lengths: tuple[tuple[int, ...], ...]  # tokens of each segment, by block
    grid: Grid
    sp_rank: int


class Totals(NamedTuple):
    """Sums over the rank's scored positions."""

    nll: Tensor  # scalar float32
    scored: Tensor  # scalar int64
    wrong: Tensor  # [B] int64, scored tokens that were not the most likely ones; zeros unless asked for


IGNORE = -100


def cut_piece(
    input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None, model_config, grid: Grid, sp_rank: int = 0
) -> Piece:
    """The blocks of `sp_rank` of a micro-batch [B, tokens]. `grid.segments` is set from the length of the batch.

    Raises ConfigError when there are fewer segments than sp x rounds.
    """
    lengths = segment_lengths(input_ids.shape[1], model_config.segment_tokens, model_config.segment_alignment)
    grid = grid._replace(segments=len(lengths), chunks=min(grid.chunks, len(input_ids)))
    check_grid(grid)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    ranges = [block_segments(grid)[b] for b in rank_blocks(grid, sp_rank)]

    def own(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor[:, starts[r.start] : starts[r.stop]] for r in ranges], 1)

    by_block = tuple(tuple(lengths[r.start : r.stop]) for r in ranges)
    return Piece(own(input_ids), own(labels), own(attention_mask), by_block, grid, sp_rank)


def fitted(piece: Piece, grid: Grid) -> Piece:
    """The piece in the blocks of `grid`, as the schedule cuts it."""
    if grid == piece.grid:
        return piece
    assert grid.sp == 1, f"{grid}: only a rank that holds the whole sequence can cut it otherwise"
    lengths = [n for block in piece.lengths for n in block]
    blocks = tuple(tuple(lengths[r.start : r.stop]) for r in block_segments(grid))
    return piece._replace(grid=grid, lengths=blocks)


def packed_labels(piece: Piece, before: int, behind: int) -> Tensor:
    """The labels laid out like the hidden states, so many rows around a segment not scored. [B, sum of N], on the
    labels' device."""
    head, tail = (piece.labels.new_full((len(piece.labels), rows), IGNORE) for rows in (before, behind))
    lengths = [n for block in piece.lengths for n in block]
    return torch.cat([part for labels in piece.labels.split(lengths, 1) for part in (head, labels, tail)], dim=1)
