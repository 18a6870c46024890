"""One cell recorded as CUDA graphs, which work on tensors of their own, at fixed addresses.

Shapes: B batch rows, N positions of a segment's row, D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..model.backbone import Context
from ..model.memory_kind import ARMTLayer, MemoryUpdate, apply
from .cells import Cell, add, gradients_of, run_again
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


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors of equal shapes, with few kernels."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def zero(targets: Sequence[Tensor]) -> None:
    """Set tensors to zero, with few kernels."""
    if targets:
        torch._foreach_zero_(list(targets))


def copies(sources: Sequence[Tensor]) -> list[Tensor]:
    """Return new tensors with the same values: one for all sources that are the same, as the input of q, k and v is."""
    keys = [(t.data_ptr(), t.shape, t.stride()) for t in sources]
    distinct = dict(zip(keys, sources, strict=True))
    targets = {key: torch.empty_like(t) for key, t in distinct.items()}
    copy(list(targets.values()), list(distinct.values()))
    return [targets[key] for key in keys]


def generator_states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a cell might use."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
