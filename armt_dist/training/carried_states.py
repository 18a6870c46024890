"""Memory states that pass from one optimizer step to the next: which row starts from which, and their way there.

The last rank of an sp group holds the states with which the rows of its group ended, and the first one starts the rows
of the next step from them. Which row starts from which depends on seed and step alone, so that any number of ranks
gives every row the same start.

Shapes: G rows of a global batch, g of them on this rank, F numbers of all states of a row; see `runtime.row_states`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint.load import read_rows
from ..data.sampling import generator
from ..distributed.mesh import Mesh
from ..model.modeling_armt import ARMTForCausalLM
from ..runtime.host_copy import copied
from ..runtime.piece import Totals
from ..runtime.row_states import as_rows, from_rows
from .curriculum import Stage
from .global_batch import Batches, RowLayout
from .run_config import RunConfig, TrainConfig, carry_probability

# Of the tensor in a rank's file in a checkpoint.
NAME = "carried"
# The source of a row that starts from empty states.
EMPTY = -1
Sources = Callable[[int, float], np.ndarray]
"""From the number of a global batch and the stage's probability to int64 [G]: for each row, the row of the step before
from whose last states it starts."""


def shuffled_rows(seed: int, rows: int) -> Sources:
    """Return sources in which a row has, with the given probability, a random row of the step before."""

    def sources(batch: int, probability: float) -> np.ndarray:
        draw = generator("carry", seed, "train", batch)
        return np.where(draw.random(rows) < probability, draw.permutation(rows), EMPTY)

    return sources


def same_rows(rows: int) -> Sources:
    """Return sources in which every row goes on from itself."""
    return lambda batch, probability: np.arange(rows)


class Carrying(NamedTuple):
    """How states pass from step to step; the same throughout a run."""

    config: TrainConfig
    sources: Sources
    layout: RowLayout
    mesh: Mesh
    shapes: Callable[[int], list[tuple]]  # states of so many rows, on any device
    device: torch.device

    @property
    def holds(self) -> bool:
        """Whether this rank runs the last segments, and so has the last states."""
        return self.mesh.sp_rank == self.mesh.sp - 1

    def saved(self, held: Tensor) -> dict[str, Tensor]:
        """Return what this rank adds to its file in a checkpoint."""
        return {NAME: held.cpu()} if self.holds else {}

    def restored(self, folder: Path, saved: RowLayout) -> Tensor:
        """Return what the next step starts from: the states in a checkpoint, spread as `saved` over its files.

        Rows that it does not have, as after a change of the batch, start anew. Not collective.
        """
        if not self.holds:
            return self.none_held()
        rows = np.array(self.layout.rows(self.mesh.dp_rank))
        own = torch.zeros(len(rows), self.none_held().shape[1])
        known = np.flatnonzero(rows < saved.dp * saved.micro * saved.accumulation)
        holders, places = saved.groups(rows[known]) * saved.sp + saved.sp - 1, saved.places(rows[known])
        for holder in np.unique(holders):
            of_it = holders == holder
            own[torch.from_numpy(known[of_it])] = read_rows(folder, int(holder), NAME, places[of_it].tolist())
        return copied(own, self.device)

    def leaving(self, results: Sequence[Totals]) -> Tensor:
        """Return the last states of this rank's rows, float32 [g, F]; [0, F] where it does not run the last segment."""
        if not self.holds:
            return self.none_held()
        return torch.cat([as_rows(states) for totals in results if (states := totals.states) is not None])

    def none_held(self) -> Tensor:
        """Return the states of no row, [0, F]."""
        return torch.zeros(0, as_rows(self.shapes(1)).shape[1], device=self.device)

    def entering(self, held: Tensor | None, batch: int, stage: Stage) -> list[list[tuple]] | None:
        """Return the states that enter each micro-batch of a global batch. Collective, unless nothing is held.

        held: what `leaving` returned after the step before; None: all rows start from empty states. Returns None where
        they do, and on ranks that do not run the first segment.
        """
        if held is None:
            return None
        rows = self.exchange(held, self.sources(batch, carry_probability(self.config, stage)))
        if self.mesh.sp_rank > 0:
            return None
        micro = self.layout.micro
        return [from_rows(part, self.shapes(micro)) for part in rows.split(micro)]

    def exchange(self, held: Tensor, sources: np.ndarray) -> Tensor:
        """Send states from the ranks that hold them to those that start from them; [g, F] there, else [0, F].

        Collective.
        """
        mesh, rows = self.mesh, np.flatnonzero(sources != EMPTY)
        holders, users = self.layout.groups(sources[rows]) * mesh.sp + mesh.sp - 1, self.layout.groups(rows) * mesh.sp
        rank = mesh.dp_rank * mesh.sp + mesh.sp_rank
        # Both ends of a message have its rows in their order.
        sent = rows[holders == rank][np.argsort(users[holders == rank], kind="stable")]
        received = rows[users == rank][np.argsort(holders[users == rank], kind="stable")]
        outbox = held[copied(torch.from_numpy(self.layout.places(sources[sent])), held.device)]
        inbox = held.new_empty(len(received), held.shape[1])
        world = mesh.dp * mesh.sp
        incoming = np.bincount(holders[users == rank], minlength=world).tolist()
        dist.all_to_all_single(inbox, outbox, incoming, np.bincount(users[holders == rank], minlength=world).tolist())
        own = held.new_zeros(len(self.layout.rows(mesh.dp_rank)) if mesh.sp_rank == 0 else 0, held.shape[1])
        own[copied(torch.from_numpy(self.layout.places(received)), held.device)] = inbox
        return own


def carrying_of(config: RunConfig, batches: Batches, model: ARMTForCausalLM) -> Carrying | None:
    """Return how a run's states pass from step to step; None where every row starts from empty ones."""
    rows = batches.sizes.global_batch
    if not config.data.carry_memory and not any(carry_probability(config.train, stage) for stage in config.curriculum):
        return None
    sources = same_rows(rows) if config.data.carry_memory else shuffled_rows(config.train.seed, rows)
    shapes = partial(model.initial_states, device="meta")
    return Carrying(config.train, sources, batches.layout, batches.mesh, shapes, batches.device)
