"""How many cells' weight gradients are computed together, and how many of a unit are left for WEIGHT.

What goes into a linear map and the gradient of what comes out stay in memory until the product of both, the weight
gradient, is computed. A unit of many cells computes them in groups while it runs backward, so that memory does not grow
with its length.
"""

PER_CELL, GROUPED = WEIGHT_GRADIENTS = "per_cell", "grouped"
"""Values of bptt.weight_gradients."""
GROUP = 8
"""Cells."""


def left_over(cells: int) -> int:
    """Return how many cells of a unit have their weight gradients computed by WEIGHT, after all others."""
    return (cells - 1) % GROUP + 1
