"""Cells recorded as CUDA graphs: the host launches a whole cell at once, instead of a hundred kernels one by one.

Layers that are alike share one recording. It works on tensors of its own, at fixed addresses: a layer's parameters are
copied there once a call (ZeRO-3 gathers them anew each time, to other addresses), and a cell's input and state, or
their gradients, once a cell. Without CUDA the same functions are called again in place of a replay, which tests all but
the capture itself.

Shapes: B batch rows, N positions of a segment's row, D model width.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..model.backbone import Context
from ..model.memory_kind import ARMTLayer, MemoryUpdate, apply
from .cells import Cell, Cells, EagerCells, add, draws, gradients_of, run_again
from .known_output import last_product
from .weight_gradients import Put, WeightGradients

# Runs before a capture, in which libraries make their handles and choose their algorithms.
WARM_UPS = 2


class Buffers(NamedTuple):
    """What all recordings of layers that are alike work on."""

    parameters: list[nn.Parameter]
    sums: list[Tensor]  # float32, of the gradients of those that are trained

    @classmethod
    def of(cls, layer: nn.Module) -> "Buffers":
        """Return buffers for a layer, whose parameters need not be whole yet."""
        own = [p for *_, p in places(layer)]
        sums = [torch.zeros(whole_shape(p), device=p.device) for p in own if p.requires_grad]
        values = [torch.zeros(whole_shape(p), dtype=p.dtype, device=p.device) for p in own]
        return cls([nn.Parameter(v, requires_grad=p.requires_grad) for v, p in zip(values, own, strict=True)], sums)

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """The parameters that are trained."""
        return tuple(p for p in self.parameters if p.requires_grad)


class Recorded:
    """A function without arguments that returns tensors: a CUDA graph, or without CUDA the function itself."""

    def __init__(self, work: Callable[[], list[Tensor]], device: torch.device, pool: Any):
        self.graph: torch.cuda.CUDAGraph | None = None
        self.work = work
        if device.type != "cuda":
            self.outputs = work()
            return
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's, may go on calling CUDA during the capture.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = work()

    def replay(self) -> list[Tensor]:
        """Run it on what its inputs hold now. The results are at the same addresses every time."""
        if self.graph is not None:
            self.graph.replay()
        else:
            copy(self.outputs, self.work())
        return self.outputs


class Recording:
    """One cell: forward without a graph, forward with one, and backward, for inputs of given shapes."""

    def __init__(
        self, layer: ARMTLayer, buffers: Buffers, x: Tensor, state: tuple, context: Context, pool: Any, grouped: bool
    ):
        """grouped: whether the backward pass puts weight gradients off."""
        self.layer, self.buffers, self.pool, self.device = layer, buffers, pool, x.device
        self.x, self.state = torch.empty_like(x, memory_format=torch.contiguous_format), like(state)
        self.product = last_product(layer)
        self.later = WeightGradients(layer) if grouped else None
        self.places: list[int] = []
        self.known = None if self.product is None else like(layer.memory_positions(x))
        self.context: Context = like(context)
        self.shown: Context | None = None
        self.live: Cell | None = None
        self.load(x, state, context)
        self.warm_up(trains=False)
        self.forward_graph = Recorded(self.run_forward, self.device, pool)
        self.rerun_graph: Recorded | None = None
        self.back_graph: Recorded | None = None

    def record_backward(self) -> None:
        """Record the two graphs of the backward pass, once."""
        if self.back_graph is not None:
            return
        self.grads = [torch.zeros_like(t) for t in (self.x, *self.state)]
        self.warm_up(trains=True)
        self.rerun_graph = Recorded(self.run_again, self.device, self.pool)
        self.back_graph = Recorded(self.run_back, self.device, self.pool)
        # The recording has its kernels; autograd's graph is needed no more.
        self.live = None

    def load(self, x: Tensor, state: tuple, context: Context) -> None:
        """Copy the inputs of a cell to where the recording reads them; a context that is there already is not."""
        copy([self.x, *self.state], [x, *state])
        if context is not self.shown:
            copy(tensors(self.context), tensors(context))
            self.shown = context

    def warm_up(self, trains: bool) -> None:
        """Run the cell operation by operation. Raises RuntimeError if it draws random numbers: a graph repeats them."""
        before = generator_states(self.device)
        for _ in range(WARM_UPS):
            if trains:
                self.run_again()
                self.run_back()
            else:
                self.run_forward()
            # Its end frees the nodes of the parameters' gradients, which remember the stream that they were made on:
            # a capture, on a stream of its own, must make new ones.
            self.live = None
        if any(not torch.equal(a, b) for a, b in zip(before, generator_states(self.device), strict=True)):
            raise RuntimeError("the cell draws random numbers")

    def run_forward(self) -> list[Tensor]:
        """Return y, the state after the cell, and the update, flat."""
        with recorded_at(self.layer, self.buffers.parameters), torch.no_grad():
            y, update = self.layer.cell(self.x, self.state, self.context)
            self.update_leaves, self.update_shape = tree_flatten(update)
            return [y, *apply(self.state, update), *tensors(update)]

    def run_again(self) -> list[Tensor]:
        """Make the cell's graph."""
        with recorded_at(self.layer, self.buffers.parameters):
            self.live = run_again(self.layer, self.x, self.state, self.context, self.product, self.known, self.later)
        return []

    def run_back(self) -> list[Tensor]:
        """Return the gradients of x and the state, and what is put off; add those of the parameters to the sums."""
        assert self.live is not None, "a cell is run again before its backward pass"
        with recorded_at(self.layer, self.buffers.parameters):
            inputs, own = gradients_of(self.live, tuple(self.grads), self.buffers.trained)
        add(self.buffers.sums, own)
        put = self.later.taken() if self.later else []
        self.places = [each.place for each in put]
        return [*inputs, *(t for each in put for t in each[1:])]

    def forward(self, x: Tensor, state: tuple, context: Context, keep: bool) -> tuple[Tensor, MemoryUpdate, tuple]:
        """Return y, in place; the update, in place unless `keep`; and the state after the cell."""
        self.load(x, state, context)
        y, *rest = self.forward_graph.replay()
        count = len(state)
        after, update = copies(rest[:count]), rest[count:]
        if keep:
            update = copies(update)
        flat = iter(update)
        leaves = [next(flat) if isinstance(leaf, Tensor) else leaf for leaf in self.update_leaves]
        return y, tree_unflatten(leaves, self.update_shape), type(state)(*after)

    def rerun(self, x: Tensor, state: tuple, context: Context, known: Tensor | None) -> Cell:
        """Run the cell so that `back` can follow."""
        self.load(x, state, context)
        if self.known is not None and known is not None:
            self.known.copy_(known)
        assert self.rerun_graph is not None, "recorded by record_backward"
        self.rerun_graph.replay()
        return Cell((x, *state), ())

    def back(self, gradients: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[Put]]:
        """Return the gradients of x, in place, and of the state; and what is put off."""
        assert self.back_graph is not None, "recorded by record_backward"
        copy(self.grads, gradients)
        x, *rest = self.back_graph.replay()
        rest = copies(rest)
        state, put = rest[: len(self.state)], rest[len(self.state) :]
        return (x, *state), list(map(Put, self.places, put[::2], put[1::2]))


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


def places(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return where the layer's parameters are, in their order: modules and names there, and they themselves."""
    return [(module, name, p) for module in layer.modules() for name, p in module.named_parameters(recurse=False)]


@contextmanager
def recorded_at(layer: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put other parameters in the place of the layer's within the block.

    Not by their `data`: autograd's nodes of the layer's own parameters belong to the stream of the training step.
    """
    at = places(layer)
    try:
        # Not by register_parameter, which asks for the old one first: ZeRO-3 would gather it.
        for (module, name, _), parameter in zip(at, parameters, strict=True):
            module._parameters[name] = parameter
        yield
    finally:
        for module, name, own in at:
            module._parameters[name] = own


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of a parameter that ZeRO-3 may have partitioned."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


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


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested tuples."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def like(tree: Any) -> Any:
    """Return nested tuples with contiguous tensors like those of `tree`."""
    leaves, spec = tree_flatten(tree)
    return tree_unflatten(
        [torch.empty_like(t, memory_format=torch.contiguous_format) if isinstance(t, Tensor) else t for t in leaves],
        spec,
    )


def shapes(tree: Any) -> tuple:
    """Return what decides whether inputs fit a recording."""
    leaves, spec = tree_flatten(tree)
    return str(spec), tuple((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves)


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors of equal shapes, with few kernels."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def zero(targets: Sequence[Tensor]) -> None:
    """Set tensors to zero, with few kernels."""
    if targets:
        torch._foreach_zero_(list(targets))


def copies(sources: Sequence[Tensor]) -> list[Tensor]:
    """Return new tensors with the same values."""
    targets = [torch.empty_like(t) for t in sources]
    copy(targets, sources)
    return targets


def generator_states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a cell might use."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
