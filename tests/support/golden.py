"""The golden cases: what the authors' code computes on tiny models, and the tolerances to meet."""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from armt_dist import reference

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(
    path.name
    for path in GOLDEN.glob("*")
    if path.name.startswith(("armt_", "rmt_")) and (path / "io.safetensors").exists()
)
assert CASES, f"no golden cases under {GOLDEN}"

# Largest absolute error for logits and loss; relative to the tensor's largest magnitude for the others.
TOLERANCES = {"logits": 2e-4, "loss": 1e-5, "gradient": 1e-3, "state": 1e-4, "trajectory_loss": 1e-4, "weights": 1e-3}

# Of the trajectory's gradient norms, relative, by step; later steps have the last. Half a float32 ulp on the initial
# weights, run in float64, moves the norm of step 4 by 1.4e-4 to 1.4e-3 and the others by 3e-4 at most, and float32
# rounds at every operation, in an order that the CPU decides.
NORM_TOLERANCES = (1e-3, 1e-3, 1e-3, 5e-3)


def norm_tolerance(step: int) -> float:
    """Return the relative tolerance of the trajectory's gradient norm before the update of `step`."""
    return NORM_TOLERANCES[min(step, len(NORM_TOLERANCES) - 1)]


class Case(NamedTuple):
    """One case. `labels` are as a Hugging Face model takes them: not shifted, -100 where the target is not scored."""

    name: str
    options: dict
    io: dict[str, Tensor]
    grads: dict[str, Tensor]
    labels: Tensor


def load_case(name: str) -> Case:
    """Read a case from its folder."""
    folder = GOLDEN / name
    io = load_file(folder / "io.safetensors")
    options = json.loads((folder / "config.json").read_text())
    return Case(name, options, io, load_file(folder / "grads.safetensors"), hf_labels(io))


def hf_labels(io: dict[str, Tensor]) -> Tensor:
    """Put -100 where the case scores nothing; its mask is indexed by the predicting position, labels by the target."""
    labels = io["labels"].clone()
    labels[:, 1:][io["labels_mask"][:, :-1] == 0] = -100
    return labels


def load_model(name: str):
    """Import the case's model from the authors' checkpoint."""
    options, tensors = reference.read_checkpoint(GOLDEN / name / "config.json", GOLDEN / name / "weights.safetensors")
    return reference.load_model(reference.convert_config(options), tensors)


def load_trajectory_model():
    """Load the model that the AdamW trajectory starts from; its configuration is that of the base case."""
    folder = GOLDEN / "armt_v2_llama_trajectory"
    options = json.loads((GOLDEN / "armt_v2_llama_base" / "config.json").read_text())
    return reference.load_model(reference.convert_config(options), load_file(folder / "weights_initial.safetensors"))


def our_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the authors to our names."""
    return reference.convert_weights(tensors)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float, relative: bool = False) -> None:
    """Fail if the error exceeds the tolerance, naming the tensor and the ratio of the two."""
    scale = expected.abs().max().clamp_min(1e-12) if relative else 1.0
    error = ((actual - expected).abs().max() / scale).item()
    assert error <= tolerance, f"{name}: error {error:.3g} is {error / tolerance:.2f} times the allowed {tolerance:g}"


def assert_gradients(actual: dict[str, Tensor | None], expected: dict[str, Tensor], where: str = "") -> None:
    """Compare every gradient. A parameter that `expected` lacks must have none or zeros; `where` begins the message."""
    for name, gradient in actual.items():
        if name in expected:
            assert gradient is not None, f"{where} d {name} is missing"
            assert_close(f"{where} d {name}", gradient, expected[name], TOLERANCES["gradient"], relative=True)
        else:
            assert gradient is None or not gradient.any(), f"{where} d {name} should be zero"
    assert not set(expected) - set(actual), f"no such parameters: {set(expected) - set(actual)}"


def golden_gradients(case: Case) -> dict[str, Tensor]:
    """Return the case's gradients under our parameter names."""
    return {reference.our_name(name): gradient for name, gradient in case.grads.items()}
