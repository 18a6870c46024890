"""The frozen base as a teacher of the model with memory: it reads more of a text than a segment, without memory.

It runs beside the model, inside the same calls of the layers, so that ZeRO-3 gathers the embedding once more for it and
nothing else, in the same order on every rank. What is kept of it are the hidden states of its last layer at the scored
positions; `loss.losses_beside` makes distributions of them, chunk by chunk.

Shapes: B batch rows, N tokens of a sequence, w tokens of a window, n scored positions, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..model.backbone import Context, causal_mask
from ..model.memory_kind import ARMTLayer
from ..model.modeling_armt import ARMTForCausalLM
from .host_copy import copied
from .piece import Piece, scored_positions

WithoutAdapters = Callable[[nn.Module], AbstractContextManager]
"""Leaves low-rank adapters below a module out within a block; see `zero3.adapters`."""


class Windows(NamedTuple):
    """What the teacher of one rank reads, and where it finds the rank's tokens in that."""

    input_ids: list[Tensor]  # [B, w] of each window
    overlaps: list[int]  # first tokens of each window that are only read, as they belong to the window before
    places: Tensor  # int64 [tokens of the blocks], in host memory: the place of each among the tokens that are kept


def spans(tokens: int, window: int) -> list[tuple[range, int]]:
    """Return the windows of a sequence, each with its overlap with the one before.

    Every token is in one window behind the overlap, with at least window // 2 tokens before it, or all there are.
    """
    overlap = window // 2
    starts = range(0, max(1, tokens - overlap), window - overlap)
    return [(range(start, min(start + window, tokens)), overlap if start else 0) for start in starts]


def cut_windows(input_ids: Tensor, document_starts: Tensor | None, piece: Piece, window: int) -> Windows:
    """Cut the windows that a rank's piece needs out of a micro-batch [B, N]; on the piece's device.

    Which windows a sequence has does not depend on the ranks. Raises ConfigError for packed documents.
    """
    if document_starts is not None:
        raise ConfigError(
            "loss.distill: the base would read documents that do not see each other as one text; set data.text.pack="
            "false or data.text.cross_documents=true"
        )
    found, kept = [], []
    for span, overlap in spans(input_ids.shape[1], window):
        tokens = range(span.start + overlap, span.stop)
        if any(tokens.start < block.stop and block.start < tokens.stop for block in piece.tokens):
            found.append((copied(input_ids[:, span.start : span.stop], piece.input_ids.device), overlap))
            kept.append(torch.arange(tokens.start, tokens.stop))
    own = torch.cat([torch.arange(block.start, block.stop) for block in piece.tokens])
    places = torch.searchsorted(torch.cat(kept), own)
    return Windows([ids for ids, _ in found], [overlap for _, overlap in found], places)


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Leave dropout below a module out within the block."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


class Teacher:
    """The base's hidden states in all windows of one pass, as far as the layers have been called."""

    def __init__(self, model: ARMTForCausalLM, windows: Windows, without_adapters: WithoutAdapters):
        """Embed the windows, all in one call, because the ranks of an sp group may have different numbers of them."""
        self.windows, self.without_adapters = windows, without_adapters
        backbone, lengths = model.backbone, [ids.shape[1] for ids in windows.input_ids]
        ids = torch.cat(windows.input_ids, dim=1)
        positions = [torch.arange(n, device=ids.device)[None] for n in lengths]
        dropout = backbone.part("dropout")
        with torch.no_grad(), without_dropout(dropout or nn.Identity()):
            x = backbone.place(backbone.embed(ids), torch.cat(positions, dim=1))
            contexts = {n: plain_context(model, x, n) for n in lengths}
        self.hidden = list(x.split(lengths, dim=1))
        self.contexts = [contexts[n] for n in lengths]

    def beside(self, run: Callable[[ARMTLayer, Tensor], Tensor]) -> Callable[[ARMTLayer, Tensor], Tensor]:
        """Return a `run` for `ARMTLayer.forward` that takes the teacher through the layer first."""

        def both(layer: ARMTLayer, x: Tensor) -> Tensor:
            self.advance(layer)
            return run(layer, x)

        return both

    @torch.no_grad()
    def advance(self, layer: ARMTLayer) -> None:
        """Run the base's own layer over all windows, one at a time."""
        with without_dropout(layer.layer), self.without_adapters(layer.layer):
            for i, context in enumerate(self.contexts):
                self.hidden[i] = layer.call(layer.layer, self.hidden[i], context)

    def at(self, labels: Tensor) -> Tensor:
        """Return the hidden states of the scored positions [n, D], row by row; where there is none, of the first one.

        labels: [B, tokens of the blocks], in host memory.
        """
        scored = scored_positions(labels)
        parts = zip(self.hidden, self.windows.overlaps, strict=True)
        kept = torch.cat([x[:, overlap:] for x, overlap in parts], dim=1)
        rows, places = scored // labels.shape[1], self.windows.places[scored % labels.shape[1]]
        return kept[copied(rows, kept.device), copied(places, kept.device)]


def plain_context(model: ARMTForCausalLM, x: Tensor, tokens: int) -> Context:
    """Return what the base's layers share in a window of so many tokens; `x` gives device and dtype."""
    positions = torch.arange(tokens, device=x.device)[None]
    mask = None
    # Eager attention without a mask would not be causal.
    if model.config._attn_implementation == "eager":
        mask = causal_mask(tokens, torch.ones(1, tokens, dtype=torch.bool, device=x.device), x.dtype)
    return Context(mask, positions, model.backbone.rotary(x, positions))
