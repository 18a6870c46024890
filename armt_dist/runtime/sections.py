"""The sections of the run configuration that choose the schedule and the backward pass. Need no torch."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from ..config import ConfigError, Section
from ..schedule.kept_cells import parse_keep


class BPTTConfig(Section):
    """How the backward pass recovers the state that entered each segment."""

    states: Literal["store", "rebuild", "recompute"] = "store"
    """store: all states are kept. rebuild: only the rank-M updates are kept, about 20 times smaller, and applied again.
    recompute: from the block's first state, at the cost of one more forward pass of the block."""
    keep: float | str = 0
    """Cells that keep the graph of their forward pass and are not run again in the backward pass, which takes memory
    and saves up to a quarter of the time: a share of them from 0 to 1, what their graphs may hold (12GB), or auto: what
    is free on the fullest rank. On GPUs they run operation by operation, not as CUDA graphs. Example: auto"""
    weight_gradients: Literal["per_cell", "grouped"] = "per_cell"
    """per_cell: with the gradients of a cell's inputs. grouped: after them, for up to 8 cells at once, so that no other
    rank waits for them; takes the memory of what goes into and comes out of the linear maps of those cells."""
    graphs: bool | None = None
    """Whether cells are recorded as CUDA graphs, so that the host launches a cell at once; null: on GPUs. Layers with
    dropout are not recorded. Example: false"""

    @field_validator("keep")
    @classmethod
    def keep_can_be_read(cls, value: float | str) -> float | str:
        """Refuse what is neither a share, nor bytes, nor auto."""
        try:
            parse_keep(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value


class ParallelConfig(Section):
    """How the work on one sequence is spread and ordered; see `schedule`. world = dp x sp."""

    sp: int = Field(1, ge=1)
    """Ranks that share one sequence. Example: 8"""
    rounds: int = Field(1, ge=1)
    """Blocks of segments on each rank; every block costs one more gather of each layer. Example: 2"""
    chunks: int = Field(1, ge=1)
    """Parts of the micro-batch that are handed to the next rank separately. Example: 4"""
    schedule: Literal["wavefront", "layer_major", "segment_major"] | None = None
    """Order of the work; null: what the memory allows, wavefront for ARMT and segment_major for RMT."""
    prefetch: int | None = Field(None, ge=1)
    """Layers that are gathered ahead of use; null: as many as the wavefront wants, (sp - 1) / chunks + 1, or fewer if
    the device has no room for them. With fewer, ranks wait for each other. Example: 4"""
    timeout_s: float = Field(600, gt=0)
    """Seconds that a rank waits for another one before the run ends with an error. Example: 1200"""

    @model_validator(mode="after")
    def schedule_takes_them(self) -> Self:
        """Refuse ranks and rounds under a schedule that has neither."""
        if self.schedule not in (None, "wavefront") and max(self.sp, self.rounds) > 1:
            raise ValueError(
                f"parallel.schedule={self.schedule} runs a sequence on one rank in its own blocks; "
                f"parallel.sp={self.sp} and parallel.rounds={self.rounds} need parallel.schedule=wavefront"
            )
        return self
