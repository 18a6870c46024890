"""Copies to a GPU that the host does not wait for."""

import torch
from torch import Tensor


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`. To a GPU it goes through pinned memory: from any other the host would wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
