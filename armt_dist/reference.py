"""Turn a checkpoint of the authors' code into a Hugging Face folder, value by value.

python -m armt_dist.reference --config CASE/config.json --weights CASE/weights.safetensors --out DIR
"""

import argparse
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging

from . import files
from .config import ConfigError, one_line, run_main
from .model.configuration_armt import ARMTConfig
from .model.modeling_armt import ARMTForCausalLM

# The authors' names -> ours, tried in order.
RENAMES = (
    (re.compile(r"^memory_cell\.memory$"), "memory_tokens.weight"),
    (re.compile(r"^memory_cell\.sink$"), "memory_tokens.sink"),
    (
        re.compile(r"^memory_cell\.model\.(.*layers\.\d+|.*h\.\d+)\.(W_m[qkvb])\.(weight|bias)$"),
        r"base.\1.memory.\2.\3",
    ),
    # RMT does not wrap the layers.
    (re.compile(r"^memory_cell\.model\.(.*layers\.\d+|.*h\.\d+)\.(?!layer\.)(.*)$"), r"base.\1.layer.\2"),
    (re.compile(r"^memory_cell\.model\.(.*)$"), r"base.\1"),
)
# transformers 4 used another name for GPT-NeoX's head.
HEADS = (("base.embed_out.", "base.lm_head."),)
# The wrapper lists its layers a second time under this name.
ALIASES = "memory_cell.layers."
# The authors' option -> ours.
OPTIONS = {
    "num_mem_tokens": "num_mem_tokens",
    "d_mem": "d_mem",
    "dpfp_nu": "nu",
    "segment_size": "segment_tokens",
    "segment_alignment": "segment_alignment",
    "n_heads_memory": "n_heads",
    "correction": "correction",
    "use_denom": "use_denom",
    "gating": "gating",
    "freeze_mem": "freeze_mem",
    "wrap_pos": "wrap_pos",
}
# The authors' model_family -> our memory_kind, and the options that must be given, as a default would be a guess.
KINDS = {
    "ARMT": ("armt", ("num_mem_tokens", "d_mem", "segment_size")),
    "RMT": ("rmt", ("num_mem_tokens", "segment_size")),
}


def our_name(name: str) -> str:
    """Translate a parameter name of the authors. Raises ConfigError for a name of no known form."""
    for pattern, replacement in RENAMES:
        if pattern.match(name):
            new = pattern.sub(replacement, name)
            for old_head, new_head in HEADS:
                new = new.replace(old_head, new_head)
            return new
    raise ConfigError(f"weights: unknown tensor {name!r}; expected the authors' names (memory_cell.…)")


def convert_config(options: dict) -> ARMTConfig:
    """Translate the authors' options into an ARMTConfig; `hf_config` holds the base model's. Raises ConfigError."""
    family = options.get("model_family", "ARMT")
    if family not in KINDS:
        raise ConfigError(f"model_family={family}: only {' and '.join(KINDS)} checkpoints can be imported")
    kind, required = KINDS[family]
    for name in required:
        if options.get(name) is None:
            raise ConfigError(f"{name}: missing; give the value that the checkpoint was trained with")
    if not isinstance(options.get("hf_config"), dict):
        raise ConfigError("hf_config: missing; the config needs the base model's configuration under this key")
    base = {k: v for k, v in options["hf_config"].items() if k not in ("transformers_version", "torch_dtype", "dtype")}
    fields = {ours: options[theirs] for theirs, ours in OPTIONS.items() if options.get(theirs) is not None}
    fields |= {"memory_kind": kind, "sink": int(bool(options.get("use_sink")))}
    fields["maths"] = "paper" if options.get("l2_normalised_features") is False else "default"
    if options.get("sliding_window"):
        # The authors' window is the whole previous segment, detached.
        fields |= {"sliding_window": fields["segment_tokens"], "window_positions": "restart", "detach_window": True}
    try:
        if fields.get("wrap_pos") and "n_positions" in base:
            # The authors add rows to the base model's table, M behind it and for RMT M before it too. Here they are
            # part of it.
            base["n_positions"] += fields["num_mem_tokens"] * (2 if kind == "rmt" else 1)
        return ARMTConfig(base_config=base, **fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config: {one_line(error, 300)}") from None


def convert_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors, and leave out the wrapper's second listing of the layers. Values stay as they are."""
    return {our_name(name): tensor for name, tensor in tensors.items() if not name.startswith(ALIASES)}


def load_model(config: ARMTConfig, tensors: dict[str, torch.Tensor]) -> ARMTForCausalLM:
    """Build a model with exactly these values.

    Raises ConfigError for a tensor that is missing, unknown, of another shape or of a wider dtype.
    """
    model = ARMTForCausalLM(config)
    weights = convert_weights(tensors)
    expected = model.state_dict()
    tied = model.all_tied_weights_keys
    for name in expected:
        if name not in weights and tied.get(name) not in weights:
            raise ConfigError(f"weights: tensor {name} is missing; the file does not fit the config")
    for name, tensor in weights.items():
        if name not in expected or expected[name].shape != tensor.shape:
            shape = list(expected[name].shape) if name in expected else "no such tensor"
            raise ConfigError(f"weights: {name} {list(tensor.shape)} does not fit the config ({shape})")
        if torch.promote_types(tensor.dtype, expected[name].dtype) != expected[name].dtype:
            raise ConfigError(f"weights: {name} is {tensor.dtype}; {expected[name].dtype} cannot hold its values")
    for target, source in tied.items():
        if target in weights and source in weights and not torch.equal(weights[target], weights[source]):
            raise ConfigError(f"weights: {target} and {source} differ, but the config ties them")
    model.load_state_dict(weights, strict=False)
    return model


def read_checkpoint(config_file: Path, weights_file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read both files. Raises ConfigError naming the one that cannot be read."""
    try:
        options = files.read_json(config_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"config={config_file}: not a readable JSON file ({one_line(error)})") from None
    if not isinstance(options, dict):
        raise ConfigError(f"config={config_file}: expected a JSON object")
    try:
        return options, load_file(weights_file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"weights={weights_file}: not a readable safetensors file ({one_line(error)})") from None


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the authors' options as JSON, hf_config nested")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors under the authors' names")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist or be empty")
    args = parser.parse_args()
    # Errors of this command are one line on stderr; Hugging Face's warnings would drown them.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"out={args.out}: exists and is not an empty folder; give another one")
    options, tensors = read_checkpoint(args.config, args.weights)
    model = load_model(convert_config(options), tensors)
    try:
        model.save_pretrained(args.out)
    except OSError as error:
        raise ConfigError(f"out={args.out}: cannot be written ({one_line(error)})") from None
    print(f"wrote {args.out}: AutoModelForCausalLM.from_pretrained({str(args.out)!r}, trust_remote_code=True)")


if __name__ == "__main__":
    run_main(main, rank=0)
