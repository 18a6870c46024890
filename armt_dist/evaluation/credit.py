"""How far back a loss reaches: the exact gradient of the last segment's loss with respect to the states before it.

Shapes: B batch rows, those of a state as in `model.memory`.
"""

from collections.abc import Sequence

import torch

from ..data.task import IGNORE, Batch
from ..model.modeling_armt import ARMTForCausalLM
from ..runtime.executor import ScheduledLM
from ..runtime.piece import cut_piece
from ..runtime.segment_bptt import GradientView
from ..schedule.grid import Grid

# Rows whose gradients are followed back, and the most segments of them.
ROWS, SEGMENTS = 8, 256


def credit(model: ARMTForCausalLM, batch: Batch, lengths: Sequence[int]) -> list[list[float]]:
    """Return by layer and lag, from 1 segment, the norm of the gradient of the last segment's loss to the state.

    Exact, from the backward pass of training over the last segments; mean over rows.
    """
    used = list(lengths)[-SEGMENTS:]
    tokens = sum(used)
    ids, labels = (t[:ROWS, -tokens:] for t in (batch.input_ids, batch.labels))
    # Answers may begin before the last segment.
    first = 0 if batch.needed is not None else tokens - used[-1]
    labels = torch.cat([torch.full_like(labels[:, :first], IGNORE), labels[:, first:]], dim=1)
    found: list[list[float]] = [[] for _ in model.layers]

    def see(view: GradientView) -> None:
        A, z = view.gradient[:2]
        norms = (A.flatten(1).square().sum(1) + z.flatten(1).square().sum(1)).sqrt()
        found[view.instruction.layer].append(norms.mean().item())

    starts = None if batch.document_starts is None else batch.document_starts[:ROWS, -tokens:]
    grid = Grid(1, len(found))
    piece = cut_piece(ids.to(model.device), labels, None, model.config, grid, document_starts=starts)
    ScheduledLM(model, states="rebuild")(piece, observe_gradient=see).nll.backward()
    model.zero_grad(set_to_none=True)
    # The first is that of the state which enters the last segment; the state before the first segment is empty.
    return [norms[:-1] for norms in found]
