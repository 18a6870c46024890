"""The random generators of a process (torch, CUDA, NumPy, Python) as tensors.

`torch.utils.checkpoint.get_device_states` covers one of the four, so it would not shorten this. The names are those in
checkpoint files.
"""

import random

import numpy as np
import torch


def generators() -> dict[str, torch.Tensor]:
    """Return the states of all random generators of this process."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_rest = [numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]]
    states = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_rest": torch.tensor(numpy_rest, dtype=torch.float64),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states: dict[str, torch.Tensor]) -> None:
    """Restore what `generators` returned."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy_rest"].tolist()
    np.random.set_state(
        ("MT19937", states["numpy_keys"].numpy().astype(np.uint32), int(position), int(has_gauss), gauss)
    )
    random.setstate((3, tuple(states["python"].tolist()), None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
