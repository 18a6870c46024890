"""How many operations one cell launches, forward, run again and backward: of the decoder layer and of our memory.

    python benchmarks/cell_kernels.py [--shape 1b] [--names]

On the meta device, which needs neither a GPU nor memory for the weights. Attention is one operation, as on a GPU, views
are none. What the decoder layer launches by itself is transformers'; the rest of a cell is ours, and the additions to
the sums of gradients. Prints a table and one JSON line last.
"""

import argparse
import json
from collections import Counter

import torch
from ranks import table
from shapes import SHAPES, build

from armt_dist.model.backbone import LLAMA
from armt_dist.model.memory_kind import ARMTLayer, apply
from armt_dist.runtime.cells import Cell, EagerCells, gradients_of

# ranks.py has put tests/ on the path.
from support.operations import Operations, attention_in_one  # isort: skip

META = torch.device("meta")
PARTS = ("forward", "again", "backward")


class LayerAlone(ARMTLayer):
    """A cell without a memory."""

    def __init__(self, of: ARMTLayer):
        super().__init__(of.layer, of.memory, 0, LLAMA)

    def attend(self, x, state, context):
        return self.call(self.layer, x, context), context

    def write(self, m, state, context):
        return Unchanged()


class Unchanged:
    """An update that changes nothing."""

    def onto(self, state):
        return state


def counts(shape: str, dtype: torch.dtype) -> dict[str, dict[str, Counter]]:
    """Operations by name, of a cell and of its decoder layer alone, in each part of the work."""
    model = build(shape, META, dtype, {"num_hidden_layers": 1})
    layer = model.backbone.layers[0]
    rows = model.config.segment_tokens + model.config.other_rows
    x = torch.empty(1, rows, model.config.hidden_size, device=META, dtype=dtype)
    return {"cell": counted(layer, x, model), "decoder layer": counted(LayerAlone(layer), x, model)}


def counted(layer: ARMTLayer, x: torch.Tensor, model) -> dict[str, Counter]:
    """Operations by name of one cell of `layer`."""
    context, state = model.context(x, None), layer.memory.initial_state(1, META)
    alone = isinstance(layer, LayerAlone)
    cells = EagerCells(layer, trains=True)
    if alone:
        cells.parameters = tuple(layer.layer.parameters())
    found: dict[str, Counter] = {}
    with attention_in_one():
        with torch.no_grad(), Operations() as forward:
            y, update = layer.cell(x, state, context)
            apply(state, update)
        known, *_ = cells.to_store([y])
        with Operations() as again:
            cell = cells.rerun(x, state, context, known)
    found |= {"forward": forward.names, "again": again.names}
    # The state of a layer alone is its input.
    outputs = cell.outputs[:1] if alone else cell.outputs
    cell = Cell(cell.inputs, outputs)
    gradients = tuple(map(torch.empty_like, outputs))
    # The first cell makes the sums.
    cells.sums = [torch.empty_like(p, dtype=torch.float32) for p in cells.parameters]
    with Operations() as backward:
        if alone:
            gradients_of(cell, gradients, cells.parameters)
        else:
            cells.back(cell, gradients)
    return found | {"backward": backward.names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--names", action="store_true", help="print our operations by name")
    args = parser.parse_args()
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        found = counts(args.shape, dtype)
        name = str(dtype).removeprefix("torch.")
        ours = {part: found["cell"][part] - found["decoder layer"][part] for part in PARTS}
        found["ours"] = ours
        result[name] = {who: {part: each[part].total() for part in PARTS} for who, each in found.items()}
        print(table([name, *PARTS], [[who, *each.values()] for who, each in result[name].items()]), end="\n\n")
        if args.names:
            for part in PARTS:
                print(f"ours {part}:", ", ".join(f"{n} {name}" for name, n in ours[part].most_common()), end="\n\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
