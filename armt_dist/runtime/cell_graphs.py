"""Cells recorded as CUDA graphs: the host launches a whole cell at once, instead of a hundred kernels one by one.

Layers that are alike share one recording. It works on tensors of its own, at fixed addresses: a layer's parameters are
copied there once a call (ZeRO-3 gathers them anew each time, to other addresses), and a cell's input and state, or
their gradients, once a cell. Without CUDA the same functions are called again in place of a replay, which tests all but
the capture itself.

Shapes: B batch rows, N positions of a segment's row, D model width.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..model.backbone import Context
from ..model.memory_kind import ARMTLayer, MemoryUpdate
from .cells import Cell, Cells, EagerCells, draws
from .recording import Buffers, Recording, copy, places, whole_shape, zero


class CellGraphs:
    """All recordings of one model on one device."""

    def __init__(self, grouped: bool = False):
        """grouped: whether backward passes put weight gradients off."""
        self.grouped = grouped
        # Layers of several kinds, such as one in training and in evaluation, have the same buffers.
        self.buffers: dict[tuple, Buffers] = {}
        self.kinds: dict[tuple, int] = {}
        self.known: dict[tuple[nn.Module, bool], tuple[int, Buffers]] = {}
        self.recordings: dict[tuple, Recording] = {}
        self.refused = False
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def cells(self, layer: ARMTLayer, trains: bool) -> Cells:
        """Return the cells of a layer; those that cannot be recorded run operation by operation."""
        eager = EagerCells(layer, trains, self.grouped)
        return eager if eager.draws or self.refused else GraphedCells(layer, eager, self, trains)

    def kind(self, layer: ARMTLayer) -> tuple[int, Buffers]:
        """Return the number of a layer's kind, and its buffers."""
        if (layer, layer.training) not in self.known:
            kind = kind_of(layer)
            _, parameters, own = kind
            if (parameters, own) not in self.buffers:
                self.buffers[parameters, own] = Buffers.of(layer)
            number = self.kinds.setdefault(kind, len(self.kinds))
            self.known[layer, layer.training] = number, self.buffers[parameters, own]
        return self.known[layer, layer.training]

    def recording(self, layer: ARMTLayer, x: Tensor, state: tuple, context: Context, trains: bool) -> Recording:
        """Return the recording for inputs like these, made at their first use.

        Raises RuntimeError where the cell cannot be recorded.
        """
        kind, buffers = self.kind(layer)
        key = (kind, shapes((x, state)), shapes(context))
        if key not in self.recordings:
            self.recordings[key] = Recording(layer, buffers, x, state, context, self.pool, self.grouped)
        if trains:
            self.recordings[key].record_backward()
        return self.recordings[key]

    def prepare(self, layers: Sequence[ARMTLayer], first_trained: int, rows: Iterable[tuple[Tensor, Context]]) -> None:
        """Record the cells of a pass before it begins: rows x [B, N, D] of all segments, with their contexts.

        first_trained: the first of the layers that will run backward.

        A capture waits for the device. Within a pass of several ranks the device may be waiting for a state that
        another rank cannot send before this one takes part in its next gather.
        """
        kinds: dict[tuple[int, bool], ARMTLayer] = {}
        for i, layer in enumerate(layers):
            if not draws(layer):
                kinds.setdefault((self.kind(layer)[0], i >= first_trained), layer)
        different = {(x.shape, id(context)): (x, context) for x, context in rows}
        for (_, trains), layer in kinds.items():
            for x, context in different.values():
                if self.refused:
                    return
                self.try_recording(layer, x, layer.memory.initial_state(len(x), x.device), context, trains)

    def try_recording(
        self, layer: ARMTLayer, x: Tensor, state: tuple, context: Context, trains: bool
    ) -> Recording | None:
        """Return the recording for inputs like these; None where the cell cannot be recorded."""
        try:
            return self.recording(layer, x, state, context, trains)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.refuse(error)
            return None

    def refuse(self, error: RuntimeError) -> None:
        """Run all cells operation by operation from now on, and say why."""
        self.refused = True
        why = str(error).splitlines()[0]
        warnings.warn(f"cells are not recorded as CUDA graphs, which makes them slower ({why})", stacklevel=2)


class GraphedCells:
    """The cells of one layer during one call, as recordings; see `Cells`."""

    draws = False

    def __init__(self, layer: ARMTLayer, eager: EagerCells, graphs: CellGraphs, trains: bool):
        self.layer, self.eager, self.graphs, self.trains = layer, eager, graphs, trains
        # By shape and context: contexts live as long as the call.
        self.seen: dict[tuple, Recording | None] = {}
        self.current: Recording | None = None

    def begin(self) -> None:
        """Copy the parameters to where the recordings read them, and set the sums of their gradients to zero."""
        _, buffers = self.graphs.kind(self.layer)
        copy([p.data for p in buffers.parameters], [p.data for *_, p in places(self.layer)])
        self.sums = buffers.sums
        zero(self.sums)
        # What is not recorded adds to the same sums.
        self.eager.sums = self.sums

    def of(self, x: Tensor, state: tuple, context: Context) -> Recording | None:
        """Return the recording for inputs like these; None where there is none."""
        key = (x.shape, id(context))
        if key not in self.seen and self.graphs.refused:
            self.seen[key] = None
        if key not in self.seen:
            # Made before the pass began.
            self.seen[key] = self.graphs.try_recording(self.layer, x, state, context, self.trains)
        return self.seen[key]

    def forward(self, x: Tensor, state: tuple, context: Context, keep: bool) -> tuple[Tensor, MemoryUpdate, tuple]:
        """Run a cell without a graph."""
        cells = self.of(x, state, context) or self.eager
        return cells.forward(x, state, context, keep)

    def keep(self, x: Tensor, state: tuple, context: Context) -> tuple[Tensor, tuple, Cell]:
        """Run a cell and keep its graph: operation by operation, as a recording has room for one graph only."""
        return self.eager.keep(x, state, context)

    def graph_bytes(self, x: Tensor, state: tuple, context: Context) -> int:
        """Return what a kept graph holds."""
        return self.eager.graph_bytes(x, state, context)

    def to_store(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the memory positions of the cells' outputs."""
        return self.eager.to_store(outputs)

    def rerun(self, x: Tensor, state: tuple, context: Context, known: Tensor | None) -> Cell:
        """Run a cell so that `back` can follow."""
        self.current = self.of(x, state, context)
        return (self.current or self.eager).rerun(x, state, context, known)

    def back(self, cell: Cell, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the gradients of the cell's inputs."""
        if cell.outputs:
            return self.eager.back(cell, gradients)
        assert self.current is not None, "a recorded cell is run again before its backward pass"
        if self.eager.later:
            self.eager.later.add_full_group(self.sums)
        inputs, put = self.current.back(gradients)
        if self.eager.later:
            self.eager.later.put += put
        return inputs

    def add_weights(self) -> None:
        """Add up the weight gradients that were put off."""
        self.eager.add_weights()

    def gradients(self) -> tuple[Tensor, ...]:
        """Return one gradient per parameter, which the next layer's do not overwrite."""
        return tuple(total.to(p.dtype, copy=True) for p, total in zip(self.eager.parameters, self.sums, strict=True))


def kind_of(layer: nn.Module) -> tuple:
    """Return what layers that are alike have in common: modules, their settings, and shapes of parameters.

    A layer with buffers is like itself alone.
    """
    settings = tuple(
        (name, type(module), tuple(sorted((k, v) for k, v in vars(module).items() if is_setting(k, v))))
        for name, module in layer.named_modules()
    )
    parameters = tuple((name, whole_shape(p), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return settings, parameters, id(layer) if any(True for _ in layer.buffers()) else 0


def is_setting(name: str, value: object) -> bool:
    """Tell whether a module's attribute decides what it computes: not its number, nor what DeepSpeed keeps there."""
    return isinstance(value, int | float | str | None) and not name.startswith(("_", "ds_")) and name != "layer_idx"


def shapes(tree: Any) -> tuple:
    """Return what decides whether inputs fit a recording."""
    leaves, spec = tree_flatten(tree)
    return str(spec), tuple((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves)
