"""The associative memory of a layer that also attends to a sliding window: A, z and the window in one state.

Shapes: B batch, N positions of a segment's row, M memory tokens, D model width; those of the state as in `memory` and
        `sliding_window`.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .backbone import Context
from .memory import AssociativeMemory, State, Update
from .sliding_window import SlidingWindow, Window


class WindowState(NamedTuple):
    """The fields of `memory.State` and of `sliding_window.Window`, float32."""

    A: Tensor
    z: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor

    @property
    def window(self) -> Window:
        """The window alone."""
        return Window(self.keys, self.values, self.seen)


class WindowUpdate(NamedTuple):
    """The memory's update, and the window that replaces the old one."""

    memory: Update
    window: Window

    def onto(self, state: WindowState) -> WindowState:
        """Return the state after this update."""
        return WindowState(*self.memory.onto(State(state.A, state.z)), *self.window)


class WindowedMemory(AssociativeMemory[WindowState]):
    """An associative memory whose layer also attends to the window."""

    window: SlidingWindow

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build it as the parent does, with a window."""
        memory = super().from_config(config)
        memory.window = SlidingWindow.from_config(config)
        return memory

    def initial_state(self, batch: int, device: torch.device | str) -> WindowState:
        """Return the empty memory and the empty window: zeros, float32."""
        return WindowState(*self.empty(batch, device), *self.window.empty(batch, device))

    def open(self, context: Context, state: WindowState) -> Context:
        """Let the layer attend to the window."""
        return self.window.open(context, state.window)

    def write(self, m: Tensor, state: WindowState, context: Context) -> WindowUpdate:
        """Return what the memory positions m [B, M, D] add, and the window as the next segment sees it."""
        return WindowUpdate(self.update(m, state), self.window.following(state.window, context))
