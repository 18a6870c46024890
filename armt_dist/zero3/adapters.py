"""Low-rank adapters (LoRA, arXiv 2106.09685) on the base, by the library `peft`; the memory is trained as ever."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import ConfigError, one_line
from ..model.memory_kind import is_memory
from ..model.modeling_armt import ARMTForCausalLM
from .partitioned_model import gathered
from .private import secondary_group
from .sections import LoraSection

# The attribute of peft's layers (0.21) that leaves their adapters out.
DISABLED = "_disable_adapters"


def add_adapters(model: ARMTForCausalLM, config: LoraSection) -> None:
    """Put adapters without values beside the base's linear maps that `config` names, and freeze the rest of the base.

    Raises ConfigError for a target that names none, and without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"model.lora: the package peft cannot be imported ({one_line(error)}); install it with: pip install "
            "'peft>=0.21,<0.22'"
        ) from None
    targets = find_targets(model, config.targets)
    transposed = any(isinstance(model.base.get_submodule(name), Conv1D) for name in targets)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
        # They are partitioned as soon as they are made.
        init_lora_weights=False,
    )
    inject_adapter_in_model(lora, model.base)
    # peft has frozen the layers' memories with the base.
    model.freeze()


def find_targets(model: ARMTForCausalLM, targets: Sequence[str]) -> list[str]:
    """Return the names, in the base, of its linear maps whose names end with a target. Raises ConfigError."""
    linear = [
        name
        for name, module in model.base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not is_memory(f"base.{name}.")
    ]
    for target in targets:
        if not any(ends_with(name, target) for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ConfigError(
                f"model.lora.targets={target}: no linear map of the base has this name; there are: {known}"
            )
    return [name for name in linear if any(ends_with(name, target) for target in targets)]


def ends_with(name: str, target: str) -> bool:
    """Tell whether a dotted name ends with a target, as peft does."""
    return name == target or name.endswith(f".{target}")


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Leave the adapters below a module out within the block. What is trained stays as it is.

    peft's own `enable_adapters` would also make every adapter trained.
    """
    adapted = [part for part in module.modules() if getattr(part, DISABLED, None) is False]
    for part in adapted:
        setattr(part, DISABLED, True)
    try:
        yield
    finally:
        for part in adapted:
            setattr(part, DISABLED, False)


def add_partitioned_adapters(model: ARMTForCausalLM, config: LoraSection, ds_config: dict, seed: int) -> None:
    """Put adapters on a partitioned model, partitioned as they are made, and initialise them. Collective.

    The values depend on the seed alone, not on the number of ranks. Raises ConfigError as `add_adapters`.
    """
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=ds_config, zero_param_parallel_group=secondary_group()):
        add_adapters(model, config)
    initialise_adapters(model, seed)


def initialise_adapters(model: ARMTForCausalLM, seed: int) -> None:
    """Draw A as `nn.Linear` does, and set B to zero, so that training starts from the base. Collective."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if ".lora_" not in name or not isinstance(module, nn.Linear):
            continue
        with gathered(module) as drawing:
            if not drawing:
                continue
            if ".lora_B." in name:
                nn.init.zeros_(module.weight)
                continue
            drawn = torch.empty(module.weight.shape).uniform_(-1, 1, generator=generator)
            module.weight.copy_(drawn / math.sqrt(module.in_features))
