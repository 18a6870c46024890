"""Every random generator of a process as tensors, and back."""

import random

import numpy as np
import torch


def generators() -> dict[str, torch.Tensor]:
    """Every random generator of this process."""
    numpy_state = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(numpy_state[1].astype(np.int64)),
        "numpy_rest": torch.tensor([numpy_state[2], numpy_state[3], numpy_state[4]], dtype=torch.float64),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states: dict[str, torch.Tensor]) -> None:
    """The inverse of `generators`."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy_rest"].tolist()
    np.random.set_state(
        ("MT19937", states["numpy_keys"].numpy().astype(np.uint32), int(position), int(has_gauss), gauss)
    )
    random.setstate((3, tuple(states["python"].tolist()), None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
