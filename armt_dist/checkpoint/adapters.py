"""Low-rank adapters in a checkpoint: merged into the weights of the base, one tensor at a time.

Beside a linear map of the base, DeepSpeed has stored `NAME.lora_A.default.weight` [r, in], `NAME.lora_B.default.weight`
[out, r], and the map's own weight as `NAME.base_layer.weight` (peft 0.21). What is added to it is alpha / r · B A.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import ConfigError, one_line, read_yaml
from ..records import RUN_CONFIG
from .zero_shards import StoredParameter

A, B, OWN = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


class MergedParameter(NamedTuple):
    """A weight of the base with its adapter; computed where it is used."""

    own: StoredParameter
    a: StoredParameter
    b: StoredParameter
    scale: float
    transposed: bool  # whether the weight is [in, out]

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the weight."""
        return self.own.shape

    @property
    def pieces(self) -> tuple[Tensor]:
        """Return the merged weight, flat, float32."""
        added = self.scale * (whole(self.b) @ whole(self.a))
        return ((whole(self.own) + (added.T if self.transposed else added)).flatten(),)


Parameter = StoredParameter | MergedParameter


def whole(parameter: Parameter) -> Tensor:
    """Return a parameter in its shape, float32."""
    return torch.cat([piece.float() for piece in parameter.pieces]).view(parameter.shape)


def read_lora(run: Path) -> dict[str, Any] | None:
    """Return `model.lora` of a run, None where it has no adapters. Raises ConfigError for values that no run has."""
    if not (run / RUN_CONFIG).is_file():
        return None
    model = read_yaml(run / RUN_CONFIG).get("model")
    lora = model.get("lora") if isinstance(model, dict) else None
    if lora is None:
        return None
    fields = lora if isinstance(lora, dict) else {}
    counts, targets = (fields.get("r"), fields.get("alpha")), fields.get("targets")
    if not all(type(count) is int and count > 0 for count in counts) or not isinstance(targets, list):
        raise ConfigError(f"run={run}: model.lora={one_line(lora)} in {RUN_CONFIG}: is no run's; give an undamaged run")
    return lora


def merged(stored: dict[str, StoredParameter], model: nn.Module, prefix: str, lora: dict) -> dict[str, Parameter]:
    """Return a checkpoint's parameters with adapters merged, under the names of `model` behind `prefix`.

    Raises ValueError, and other exceptions, where an adapter does not fit its weight.
    """
    found: dict[str, Parameter] = {n.replace(OWN, "."): p for n, p in stored.items() if ".lora_" not in n}
    for name in (n.removesuffix(A) for n in stored if n.endswith(A)):
        own, a, b = (stored[name + leaf] for leaf in (f"{OWN}weight", A, B))
        transposed = isinstance(model.get_submodule(name.removeprefix(prefix)), Conv1D)
        shape = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        if own.shape != shape or not a.shape[0] == b.shape[1] == lora["r"]:
            raise ValueError(f"{name}: {list(own.shape)} with {list(b.shape)} x {list(a.shape)}, r={lora['r']}")
        found[f"{name}.weight"] = MergedParameter(own, a, b, lora["alpha"] / lora["r"], transposed)
    return found
