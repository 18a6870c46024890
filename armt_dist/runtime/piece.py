"""Cut one rank's part out of a micro-batch and lay its labels out like the hidden states.

Shapes: B batch rows, N = H + tokens + M positions of a segment's row.
"""

from collections.abc import Sequence
from itertools import accumulate, islice
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ConfigError
from ..model.configuration_armt import ARMTConfig
from ..model.segment_rows import segment_lengths
from ..schedule.grid import Grid, block_range, check_grid, rank_blocks
from ..schedule.program import default_schedule, fit_grid
from .loss import IGNORE


class Piece(NamedTuple):
    """One rank's part of a micro-batch: the segments of its blocks, in order."""

    input_ids: Tensor  # [B, tokens of the blocks] int64
    # [B, the same] token to predict at each position, IGNORE where not scored; in host memory, so that picking the
    # scored positions does not wait for the device
    labels: Tensor
    # [B, the same], 1 at real tokens, in host memory, which tells the segments that are padded alike; None: nothing is
    attention_mask: Tensor | None
    # [B, the same] bool, where a document begins, in host memory; None where none does
    document_starts: Tensor | None
    lengths: tuple[tuple[int, ...], ...]  # tokens of each segment, by block
    grid: Grid  # of the schedule: its rounds are those of the program
    sp_rank: int
    schedule: str  # name of the schedule that cut the blocks
    tokens: tuple[range, ...]  # of the sequence, by block


class Totals(NamedTuple):
    """Sums over the rank's scored positions."""

    nll: Tensor  # scalar float32
    scored: Tensor  # scalar int64
    wrong: Tensor  # [B] int64, scored tokens that were not the most likely ones; zeros unless counted
    # after the last segment, as ARMTForCausalLM.initial_states, without a graph; None unless they were asked for, and
    # on ranks that do not run the last block
    states: list[tuple] | None = None
    divergence: Tensor | None = None  # scalar float32, KL(teacher || model) in nats; None without a teacher


def cut_piece(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None,
    model_config: ARMTConfig,
    grid: Grid,
    sp_rank: int = 0,
    schedule_name: str | None = None,
    document_starts: Tensor | None = None,
) -> Piece:
    """Cut the blocks of `sp_rank` out of a micro-batch [B, tokens], in the blocks that the schedule numbers.

    `grid.segments` is set from the length of the batch. The schedule left out is the default of the memory kind.
    Raises ConfigError as `fit_grid`, when there are fewer segments than sp x rounds, and for padding unless segments
    are filled from the left: elsewhere, the cuts of a padded row depend on its batch.
    """
    if attention_mask is not None and model_config.segment_alignment != "left":
        raise ConfigError(
            f"model.segment_alignment={model_config.segment_alignment}: cuts a padded row by the length of its batch; "
            "train on samples without padding, or set left"
        )
    lengths = segment_lengths(input_ids.shape[1], model_config.segment_tokens, model_config.segment_alignment)
    grid = grid._replace(segments=len(lengths), chunks=min(grid.chunks, len(input_ids)))
    check_grid(grid)
    arrows = model_config.memory_class.arrows
    name = schedule_name or default_schedule(arrows)
    grid = fit_grid(name, grid, arrows)
    starts = list(accumulate(lengths, initial=0))
    ranges = [block_range(grid, block) for block in rank_blocks(grid, sp_rank)]
    tokens = tuple(range(starts[r.start], starts[r.stop]) for r in ranges)

    def own(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:, r.start : r.stop] for r in tokens], 1)

    starts_here = None if document_starts is None else own(document_starts)
    by_block = tuple(tuple(lengths[r.start : r.stop]) for r in ranges)
    mask = None if attention_mask is None else own(attention_mask)
    return Piece(own(input_ids), own(labels), mask, starts_here, by_block, grid, sp_rank, name, tokens)


def by_segment(rows: Tensor | None, piece: Piece) -> list[Sequence[Tensor | None]]:
    """Split the tokens [B, tokens of the blocks] into the segments of each of the piece's blocks; None: Nones."""
    if rows is None:
        return [[None] * len(block) for block in piece.lengths]
    # All at once: splitting for each block would take the square of their number.
    parts = iter(rows.split([n for block in piece.lengths for n in block], dim=1))
    return [list(islice(parts, len(block))) for block in piece.lengths]


def scored_positions(labels: Tensor) -> Tensor:
    """Return where labels [B, N] in host memory are scored, as flat int64 [n]; the first position if nowhere.

    Norm and head must have a gradient on every rank; a position that is not scored gives zeros.
    """
    scored = labels.flatten().ne(IGNORE).nonzero().squeeze(1)
    return scored if len(scored) else torch.zeros(1, dtype=torch.int64)


def packed_labels(piece: Piece, before: int, behind: int) -> Tensor:
    """Lay the labels out like the hidden states: `before` and `behind` rows around each segment are not scored.

    Returns [B, sum of N], on the labels' device.
    """
    head, tail = (piece.labels.new_full((len(piece.labels), rows), IGNORE) for rows in (before, behind))
    lengths = [n for block in piece.lengths for n in block]
    return torch.cat([part for labels in piece.labels.split(lengths, 1) for part in (head, labels, tail)], dim=1)
