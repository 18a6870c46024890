"""The fields of an ARMT's configuration beside its base model, with defaults and least values. Needs no torch."""

from dataclasses import dataclass

# Least values. None passes, where the field allows it.
LEAST = {"sink": 0, "num_mem_tokens": 0} | dict.fromkeys(("segment_tokens", "d_mem", "nu", "n_heads"), 1)
LEAST |= {"sliding_window": 1, "k2": 1}
# The value of `state_decay` that makes it a parameter.
LEARNED = "learned"


def check_decay(decay: float | str | None, name: str = "state_decay") -> None:
    """Raise ValueError for a `state_decay` that is no factor above 0 and up to 1."""
    if isinstance(decay, str) and decay != LEARNED or isinstance(decay, float | int) and not 0 < decay <= 1:
        raise ValueError(f"{name}={decay}: above 0 and at most 1, or {LEARNED}")


@dataclass(kw_only=True, repr=False, eq=False)
class ARMTFields:
    """Memory and segments; the docstring below a field says what it means."""

    memory_kind: str = "armt"
    """Kind of memory: armt (associative, in every layer), rmt (recurrent memory tokens) or transformer_xl (none, but a
    window of the segment before)."""
    segment_tokens: int = 512
    """T, tokens of a segment. Example: 1024"""
    num_mem_tokens: int | None = None
    """M, learned memory rows appended to every segment; null: 16, or 0 under transformer_xl. Example: 32"""
    d_mem: int = 64
    """Width of the associative memory's keys and queries. Example: 128"""
    nu: int = 3
    """Order of the feature map DPFP, which makes 2 nu d_mem features. Example: 1"""
    n_heads: int = 1
    """Heads of the associative memory; divides d_mem and hidden_size. Example: 4"""
    maths: str = "default"
    """Variant of the memory's arithmetic; paper: no normalisation of features, as in the first published code."""
    state_decay: float | str | None = None
    """λ, by which the associative memory is multiplied before each segment, so that what is old fades; learned: one for
    each layer, from 0.99 on; null: 1. Example: 0.99"""
    use_denom: bool = True
    """Whether a read is divided by the normaliser z·q."""
    correction: bool = True
    """Whether the normaliser counts only what is new in a key (the paper's gamma)."""
    gating: bool = False
    """Whether the write strength beta is a gate for each channel in place of one for each head."""
    freeze_mem: bool = False
    """Whether the memory projections W_m* stay as initialised, as in the authors' code."""
    wrap_pos: bool = False
    """Whether the memory tokens behind a segment take the last M rows of GPT-2's position table, not those after it."""
    segment_alignment: str = "left"
    """Place of the short segment where T does not divide the length; center: all of nearly equal length."""
    sink: int = 0
    """Learned rows before the tokens of every segment. Example: 1"""
    sliding_window: int | None = None
    """Tokens before it that a token sees across the border of its segment (under rmt all see the same ones, the last
    before the border); null: none, or segment_tokens under transformer_xl. Example: 512"""
    window_positions: str = "relative"
    """Positions in the window: as in the text (relative), or restarted in every segment, as in the authors' code."""
    detach_window: bool = False
    """Whether gradients stop at the window, as in the authors' code; under transformer_xl they always do."""
    k2: int | None = None
    """Interval in segments at which gradients through the memory rows are cut; null: never. Example: 4"""
