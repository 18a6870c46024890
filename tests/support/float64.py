"""Run code that asks for float32 in float64, so that rounding explains nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch


@contextmanager
def in_float64() -> Iterator[None]:
    """Make float64 of every float32 that is asked for within the block, in backward passes too."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    wider = {"float32": torch.float64, "float": torch.float64}
    try:
        with patch.multiple(torch, **wider), patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(default)
