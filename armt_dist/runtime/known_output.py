"""Run a cell again without the last product of its layer: what it would give is known from the forward pass.

In most families the layer ends with a linear map whose result is only added to the hidden states. Its gradients need
what goes into it, not what comes out, and of the cell's output the memory's write alone reads anything: the memory
positions, which are stored. So a cell that is run again leaves that map out, a quarter of a Llama layer's products.
"""

from torch import nn

from ..model.memory_kind import ARMTLayer
from .linear_map import is_plain


def last_product(layer: ARMTLayer) -> nn.Module | None:
    """Return the linear map that a cell may leave out when it is run again; None: there is none."""
    if not layer.last_product:
        return None
    module = layer.layer.get_submodule(layer.last_product)
    # LoRA adds to what its base layer gives.
    module = getattr(module, "base_layer", module)
    return module if is_plain(module) else None
