"""Writes what a run with adapters has trained, and no more: a folder of peft's for the base, and the memory beside it.

- `adapter_model.safetensors`, `adapter_config.json`: the adapters, as `PeftModel.from_pretrained(base, FOLDER)` reads
  them. They alone are the base without memory.
- `memory.safetensors`: memory rows, sinks and the layers' memories, by their names in an export.
- `armt_config.json`: the configuration of the ARMT model; `load_adapted` puts all of it together.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import ConfigError, one_line, read_object, read_yaml
from ..model.configuration_armt import ARMTConfig
from ..model.memory_kind import ARMTLayer, is_memory
from ..model.modeling_armt import ARMTForCausalLM
from ..records import RUN_CONFIG, write_json
from .adapters import A, B, Parameter, read_lora
from .export import PREFIX, Source, copy_weights, damage_first, lay_out, open_source, skeleton
from .folder import building
from .published import without_code
from .zero_shards import StoredParameter, open_checkpoint

MEMORY, MEMORY_CONFIG, WEIGHTS = "memory.safetensors", "armt_config.json", "adapter_model.safetensors"
# Before a name in the base, in peft's files.
PEFT_PREFIX = "base_model.model."


def export_adapter(source: Path, out: Path, tag: str | None = None, dtype: str = "float32") -> Source:
    """Write adapters and memory of checkpoint `tag` to the new folder `out`; as `export`, but without the base.

    Raises ConfigError where `export` does, and for a run without adapters or with a base that is no model of its own.
    """
    found = open_source(Path(source), Path(out), tag)
    lora = read_lora(found.run)
    if lora is None:
        raise ConfigError(f"run={found.run}: has no adapters (model.lora); export it without --adapter")
    check_base(found.run)
    with damage_first(found.checkpoint):
        model = skeleton(found.run / "model", dtype)
        stored, addresses = open_checkpoint(found.checkpoint)
        adapters, memory = adapter_parameters(model, stored), memory_parameters(model, stored)
        if not adapters or len(memory) < len(memory_names(model)):
            raise ConfigError(f"checkpoint={found.checkpoint}: lacks adapters or memory; choose another --tag")
    try:
        with building(Path(out)) as folder:
            files = {WEIGHTS: adapters, MEMORY: memory}
            laid_out = [lay_out(folder / name, held, getattr(torch, dtype)) for name, held in files.items()]
            copy_weights(found.checkpoint, addresses, sum(laid_out, []))
            write_configs(model, lora, folder)
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({one_line(error)}); give another folder") from None
    return found


def check_base(run: Path) -> None:
    """Check that the run's base is a model that others have too. Raises ConfigError."""
    base = read_yaml(run / RUN_CONFIG)["model"].get("base")
    own = Path(str(base)) / "config.json"
    if base is None or (own.is_file() and read_object(own, "base").get("model_type") == ARMTConfig.model_type):
        what = "random" if base is None else f"the ARMT {base}"
        raise ConfigError(f"run={run}: its base is {what}, which no adapter can be put on; export it without --adapter")


def memory_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that ARMT adds to its base."""
    return [name for name, _ in model.named_parameters() if is_memory(name)]


def memory_parameters(model: nn.Module, stored: dict[str, StoredParameter]) -> dict[str, Parameter]:
    """Return the memory's parameters by their names in an export."""
    return {name: stored[PREFIX + name] for name in memory_names(model) if PREFIX + name in stored}


def adapter_parameters(model: ARMTForCausalLM, stored: dict[str, StoredParameter]) -> dict[str, Parameter]:
    """Return the adapters by peft's names, in which the base's layers stand without ours around them."""
    around = [f"{name}." for name, module in model.base.named_modules() if isinstance(module, ARMTLayer)]
    found: dict[str, Parameter] = {}
    for name, parameter in stored.items():
        if name.endswith((A, B)):
            inside = name.removeprefix(f"{PREFIX}base.").replace(".default.", ".")
            for layer in around:
                if inside.startswith(f"{layer}layer."):
                    inside = layer + inside.removeprefix(f"{layer}layer.")
            found[PEFT_PREFIX + inside] = parameter
    return found


def write_configs(model: ARMTForCausalLM, lora: dict[str, Any], folder: Path) -> None:
    """Write peft's configuration, and the model's."""
    from peft import LoraConfig

    fields = {"r": lora["r"], "lora_alpha": lora["alpha"], "lora_dropout": lora.get("dropout", 0.0)}
    ends = tuple(f".{target}" for target in lora["targets"])
    named = [module for name, module in model.base.named_modules() if name.endswith(ends)]
    transposed = any(isinstance(module, Conv1D) for module in named)
    config = LoraConfig(
        **fields, target_modules=list(lora["targets"]), fan_in_fan_out=transposed, task_type="CAUSAL_LM"
    )
    config.inference_mode = True
    config.save_pretrained(str(folder))
    write_json(folder / MEMORY_CONFIG, without_code(model.config.to_dict()), sort_keys=True)


def load_adapted(folder: Path, base: PreTrainedModel) -> ARMTForCausalLM:
    """Return the model of a folder of `export_adapter` on its plain `base`, which is changed: adapters are merged.

    Raises ConfigError for a folder that does not fit the base.
    """
    from peft import PeftModel

    try:
        config = ARMTConfig(**read_object(folder / MEMORY_CONFIG, "adapter"))
        with warnings.catch_warnings():
            # peft 0.21 asks transformers for a name that is deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
        model = ARMTForCausalLM(config, base=merged)
        memory = load_file(folder / MEMORY)
        if set(memory) != set(memory_names(model)):
            raise ValueError(f"{MEMORY} has other parameters than the model")
        model.load_state_dict(memory, strict=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(f"adapter={folder}: does not fit the base ({one_line(error, 300)})") from None
    return model
