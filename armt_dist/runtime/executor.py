"""Run a schedule over a model: this rank's blocks of a batch in, its part of the loss out.

Shapes: B batch rows, N = H + tokens + M positions of a segment's row, D model width, n scored positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..model.backbone import Context
from ..model.configuration_armt import MEMORIES
from ..model.modeling_armt import ARMTForCausalLM
from ..model.rmt import MemoryRows, Nothing, enter, entering
from ..schedule import program as schedule
from ..schedule.grid import Arrow, Grid, rank_blocks
from ..schedule.kept_cells import Keep
from ..schedule.program import Call, Instruction, Op, layer_calls
from .activation_store import STORES
from .cell_graphs import CellGraphs
from .cells import EagerCells
from .handoff import Local, Wire
from .host_copy import copied
from .kept_graphs import NOTHING, KeptGraphs
from .loss import IGNORE, hits, losses_beside, token_nll
from .piece import Piece, Totals, by_segment, packed_labels, scored_positions
from .sections import ParallelConfig
from .segment_bptt import CellView, GradientView, LayerWork, Link, MarkReady, no_engine, segment_bptt
from .teacher import Teacher, Windows, WithoutAdapters
from .trace import Trace


def check_memory(config: ParallelConfig, memory_kind: str) -> None:
    """Raise ConfigError where the memory's arrows forbid the layout."""
    arrows = MEMORIES[memory_kind].arrows
    if Arrow.LAST_LAYER in arrows and config.sp > 1:
        raise ConfigError(
            f"parallel.sp={config.sp}: memory_kind={memory_kind} takes a segment's memory from the last layer of the "
            "segment before, so a sequence stays on one rank; set parallel.sp=1"
        )
    # One segment more than there are blocks, so that the grid is valid whatever the batches are.
    grid = Grid(config.sp * config.rounds + 1, 1, config.sp, config.rounds, config.chunks)
    schedule.fit_grid(config.schedule or schedule.default_schedule(arrows), grid, arrows)


class LossHead(nn.Module):
    """Final norm and head over the scored positions of a rank.

    The parameters belong to the base model; `parts` refers to its modules without owning them. Under ZeRO-3 they are
    registered as this module's external parameters, so that they are gathered around its single call.
    """

    parts: tuple[nn.Module, nn.Linear]

    def __init__(self, model: ARMTForCausalLM):
        super().__init__()
        object.__setattr__(self, "parts", (model.backbone.norm, model.backbone.head))

    def forward(
        self, hidden: Tensor, targets: Tensor, count: bool, taught: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Score positions. hidden [n, D], targets [n] -> nll [n] float32, wrong [n] bool (all False unless `count`).

        taught: the teacher's hidden states [n, D]; the third result is the divergence from it, [n] float32.
        """
        norm, head = self.parts
        hidden = norm(hidden)
        wrong = ~hits(hidden, head, targets) & (targets >= 0) if count else torch.zeros_like(targets, dtype=torch.bool)
        if taught is None:
            return token_nll(hidden, head, targets), wrong, None
        with torch.no_grad():
            taught = norm(taught)
        nll, divergence = losses_beside(hidden, taught, head, targets)
        return nll, wrong, divergence


def joined(chunks: Sequence[tuple]) -> tuple:
    """Return the state [B, ...] of a micro-batch from those of its chunks."""
    return type(chunks[0])(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def rows_of(
    blocks: Sequence[Tensor], rows: Sequence[Sequence[int]], contexts: Sequence[Sequence[Sequence[Context]]]
) -> Iterator[tuple[Tensor, Context]]:
    """Yield the row [b, N, D] of each chunk and segment with its context; blocks [B, sum of N, D]."""
    for x, lengths, by_chunk in zip(blocks, rows, contexts, strict=True):
        for part, of_segments in zip(x.tensor_split(len(by_chunk)), by_chunk, strict=True):
            yield from zip(part.split(list(lengths), dim=1), of_segments, strict=True)


def mask_on(mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Return a segment's attention mask [b, T] on `device`; None: nothing is padded."""
    return None if mask is None else copied(mask, device)


class Around(NamedTuple):
    """What sees the layers of a pass beside the schedule."""

    observers: tuple[Callable[[CellView], None] | None, Callable[[GradientView], None] | None]
    teacher: Teacher | None


class ScheduledLM(nn.Module):
    """The model as the engine wraps it: run layer by layer over this rank's blocks, as the schedule says."""

    def __init__(
        self,
        model: ARMTForCausalLM,
        *,
        states: str = "store",
        keep: Keep = NOTHING,
        offload: bool = False,
        graphs: bool = False,
        grouped: bool = False,
        link: Local | Wire | None = None,
        without_adapters: WithoutAdapters = nullcontext,
    ):
        super().__init__()
        self.model = model
        self.loss_head = LossHead(model)
        self.arrows = model.config.memory_class.arrows
        self.states, self.keep, self.offload = states, keep, offload
        # Bytes of a kept graph, by what they depend on.
        self.graph_bytes: dict[Any, int] = {}
        self.grouped = grouped
        self.graphs = CellGraphs(grouped) if graphs else None
        self.link = Local() if link is None else link
        self.without_adapters = without_adapters
        # One for all passes: torch takes new ones from a pool of 32, in which NCCL's and DeepSpeed's are soon reached.
        self.copy_stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        # Set by the code that puts an engine around this module.
        self.mark_gradients_ready: MarkReady = no_engine
        # Of the last pass; empty before the first.
        self.trace = Trace(torch.device("cpu"))
        self.kept = KeptGraphs(NOTHING, 0, {})

    def at(self) -> Instruction | None:
        """Return the instruction that this rank began last, for messages about a lost or stuck rank."""
        return self.trace.at

    def forward(
        self,
        piece: Piece,
        count: bool = False,
        observe: Callable[[CellView], None] | None = None,
        first: list[tuple] | None = None,
        keep_last: bool = False,
        observe_gradient: Callable[[GradientView], None] | None = None,
        windows: Windows | None = None,
    ) -> Totals:
        """Return sums over this rank's scored positions; the backward pass of `nll` runs the reversed schedule.

        `observe` is shown every cell that this rank runs forward, `observe_gradient` the gradient of the state that
        entered each. `first`: the states that enter the first segment, as `ARMTForCausalLM.initial_states`, without a
        gradient to them; only the rank that runs it uses them; None: empty ones. `keep_last`: whether the result has
        the states after the last segment. `windows`: what the frozen base reads as a teacher; None: there is none.
        """
        teacher = None if windows is None else Teacher(self.model, windows, self.without_adapters)
        rows = [[n + self.model.config.other_rows for n in block] for block in piece.lengths]
        x = self.model.embed_segments(piece.input_ids, [n for block in piece.lengths for n in block])
        around = Around((observe, observe_gradient), teacher)
        outputs, states = self.run_layers(x, rows, piece, around, first, keep_last)
        hidden = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        totals = self.sum_up(hidden, piece, count, teacher)
        return totals._replace(states=states)

    def run_layers(
        self,
        x: Tensor,
        rows: list[list[int]],
        piece: Piece,
        around: Around,
        first: list[tuple] | None,
        keep_last: bool,
    ) -> tuple[list[Tensor], list[tuple] | None]:
        """Run all layers over all blocks. x [B, sum of N, D]; rows: N of each segment, by block.

        Returns the hidden states of each block, and `Totals.states`.
        """
        blocks = list(x.split([sum(block) for block in rows], dim=1))
        layers, trace = self.model.layers, Trace(x.device)
        own = {block: i for i, block in enumerate(rank_blocks(piece.grid, piece.sp_rank))}
        masks, starts = by_segment(piece.attention_mask, piece), by_segment(piece.document_starts, piece)
        shared: dict[tuple, Context] = {}
        contexts = [
            self.contexts(*each, piece.grid.chunks, shared) for each in zip(blocks, rows, masks, starts, strict=True)
        ]
        first_trained = self.first_trained(x) if torch.is_grad_enabled() else len(layers)
        if self.graphs:
            self.graphs.prepare(layers, first_trained, rows_of(blocks, rows, contexts))
        # Without gradients nothing is kept for a backward pass.
        states = self.states if torch.is_grad_enabled() else "recompute"
        cells = self.graphs.cells if self.graphs else partial(EagerCells, grouped=self.grouped)
        calls = layer_calls(piece.schedule, piece.grid, piece.sp_rank, self.arrows, self.grouped)
        trained = sum(len(rows[own[call.gather.block]]) for call in calls if call.gather.layer >= first_trained)
        kept = KeptGraphs(self.keep, trained * piece.grid.chunks, self.graph_bytes)
        store = STORES[self.offload](self.copy_stream)
        link = self.open_link(calls, first_trained, len(x), piece.grid.chunks)
        self.trace, self.kept, learned = trace, kept, None
        final = piece.grid.sp * piece.grid.rounds - 1
        last: list[list[tuple]] | None = [[] for _ in layers] if keep_last and final in own else None
        for gather, forward, backward in calls:
            i = own[gather.block]
            if self.model.carries_rows and gather.layer == 0:
                if learned is None:
                    # Called once a pass, whatever the documents are: ZeRO-3 needs the same calls on every rank.
                    learned = self.model.memory_tokens(len(x))[1]
                before = blocks[i - 1] if i else MemoryRows(*first[-1]) if first else None
                blocks[i] = enter(blocks[i], *self.entering_rows(learned, before, i, *starts[i]))
            layer_rows = rows[i], contexts[i], states
            work = LayerWork(
                forward,
                backward,
                *layer_rows,
                cells,
                kept,
                store,
                link,
                self.mark_gradients_ready,
                trace,
                *around.observers,
            )
            if gather.block == 0 and first:
                work = work._replace(first=first[gather.layer])
            if gather.block == final and last:
                work = work._replace(last=last[gather.layer])
            if gather.layer == first_trained and not blocks[i].requires_grad:
                # All layers below are frozen. ZeRO-3 releases a layer when the gradient of its input is there.
                blocks[i] = blocks[i].detach().requires_grad_()
            trace(gather)
            run: Callable = partial(segment_bptt, work=work)
            if i == 0 and around.teacher:
                # The first of a rank's blocks comes to the layers in their order, under every schedule.
                run = around.teacher.beside(run)
            blocks[i] = layers[gather.layer](blocks[i], run=run)
        trace(None)
        return blocks, [*map(joined, last), self.leaving_rows(blocks[-1])] if last else None

    def entering_rows(
        self, learned: Tensor, before: Tensor | MemoryRows | None, segment: int, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the memory rows [B, M, D] at both ends of a segment (RMT), which is a block of its own.

        They are carried over from the segment `before` [B, N, D], or from an earlier sequence; the `learned` ones
        [B, M, D] enter the first segment of a sequence, and where a document begins: `starts` [B, T] or None.
        """
        config = self.model.config
        if before is None:
            return learned, learned
        if isinstance(before, Tensor):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not (config.k2 and segment % config.k2 == 0)):
                carried = self.model.backbone.norm(before[:, -config.memory_rows :])
        else:
            carried = before.entering(learned)
        return entering(carried, learned, None if starts is None else copied(starts, carried.device))

    @torch.no_grad()
    def leaving_rows(self, hidden: Tensor) -> MemoryRows | Nothing:
        """Return what the last layer hands on after the last segment (RMT), or `Nothing`. hidden [B, N, D]."""
        if not self.model.carries_rows:
            return Nothing()
        memory = self.model.config.memory_rows
        return MemoryRows.of(self.model.backbone.norm(hidden[:, -memory:]), memory)

    def first_trained(self, x: Tensor) -> int:
        """Return the first layer that runs backward: the lowest with trained parameters, or 0 where x has a gradient.

        The number of layers where none is trained.
        """
        layers = self.model.layers
        if x.requires_grad:
            return 0
        return next(
            (i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), len(layers)
        )

    def open_link(self, calls: Sequence[Call], first_trained: int, batch: int, chunks: int) -> Link:
        """Return the link of one pass, which knows what it will receive and in which shapes."""
        receives = [i for call in calls for i in call.forward if i.op is Op.RECV]
        trained = [call for call in reversed(calls) if call.gather.layer >= first_trained]
        receives += [i for call in trained for i in call.backward if i.op is Op.RECV_GRAD]
        rows = [len(chunk) for chunk in torch.empty(batch).tensor_split(chunks)]
        layers = self.model.layers
        return self.link.open(receives, lambda i: layers[i.layer].memory.initial_state(rows[i.chunk], "meta"))

    def contexts(
        self,
        x: Tensor,
        rows: Sequence[int],
        masks: Sequence[Tensor | None],
        starts: Sequence[Tensor | None],
        chunks: int,
        shared: dict[tuple, Context],
    ) -> list[list[Context]]:
        """Return the contexts of a block x [B, sum of N, D] as [chunk][segment].

        masks, starts: of each segment, [B, T] in host memory or None. `shared`: the contexts of this pass so far, by
        what they depend on. A row is padded from one place on, so b rows of a chunk have at most 2b + 1 different masks
        of a length, however many segments there are; where documents begin, a segment has its own.
        """
        result = []
        for chunk in range(chunks):
            row = []
            for x_s, *per_row in zip(x.split(list(rows), dim=1), masks, starts, strict=True):
                mask, begins = (None if each is None else each.tensor_split(chunks)[chunk] for each in per_row)
                # Most segments have none, and need no mask for them.
                if begins is not None and begins.any():
                    row.append(self.model.context(x_s, mask_on(mask, x.device), copied(begins, x.device)))
                    continue
                key = x_s.shape[1], None if mask is None else mask.bool().numpy().tobytes()
                if key not in shared:
                    shared[key] = self.model.context(x_s, mask_on(mask, x.device))
                row.append(shared[key])
            result.append(row)
        return result

    def sum_up(self, hidden: Tensor, piece: Piece, count: bool, teacher: Teacher | None) -> Totals:
        """Compute the loss over the scored positions only. hidden [B, sum of N, D] of all blocks."""
        targets = packed_labels(piece, self.model.config.head_rows, self.model.config.memory_rows)
        scored = scored_positions(targets)
        row = copied(scored // targets.shape[1], hidden.device)
        targets = copied(targets.flatten()[scored], hidden.device)
        scored = copied(scored, hidden.device)
        taught = None if teacher is None else teacher.at(piece.labels)
        nll, wrong, divergence = self.loss_head(hidden.flatten(0, 1)[scored], targets, count, taught)
        per_row = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device).index_add_(0, row, wrong.long())
        total = None if divergence is None else divergence.sum()
        return Totals(nll.sum(), targets.ne(IGNORE).sum(), per_row, divergence=total)


def run_backward(engine: Any, loss: Tensor) -> None:
    """Call `engine.backward(loss)` and end the trace of the pass. Exact for any number of rounds."""
    engine.backward(loss)
    engine.module.trace(None)
