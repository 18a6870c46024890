"""Build a model from its configuration, partitioned over the ranks as it is made: no rank ever holds all of it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ..config import ConfigError, one_line
from ..distributed.collectives import is_lost_rank
from ..model.backbone import Backbone
from ..model.configuration_armt import ARMTConfig
from ..model.fields import ARMTFields
from ..model.modeling_armt import ARMTForCausalLM
from .communication import start_communication
from .private import secondary_group
from .sections import BaseSection, InitConfig, ModelConfig


def armt_config(config: "ModelConfig", tokens: dict[str, int | None], segment_tokens: int | None) -> ARMTConfig:
    """Return the ARMTConfig that `config` describes; a random base takes its vocabulary from `tokens` (`token_fields`).

    Raises ConfigError where values do not fit or the base cannot be found.
    """
    given = config.model_dump(exclude=set(BaseSection.model_fields), exclude_none=True)
    if segment_tokens is not None:
        if given.get("segment_tokens", segment_tokens) != segment_tokens:
            raise ConfigError(
                f"model.segment_tokens={given['segment_tokens']}: the task's segments have {segment_tokens} tokens; "
                "leave it out"
            )
        given["segment_tokens"] = segment_tokens
    try:
        if config.base is None:
            return ARMTConfig(base_config={**tokens, **(config.base_config or {})}, **given)
        if is_armt(config.base):
            return continue_from(ARMTConfig.from_pretrained(config.base), given)
        base = AutoConfig.from_pretrained(config.base, trust_remote_code=config.trust_remote_code)
        return ARMTConfig(base_config=base, **given)
    except (ValueError, TypeError, OSError, KeyError) as error:
        where = f"model.base={config.base}" if config.base else "model"
        raise ConfigError(f"{where}: {one_line(error, 400)}") from None


def token_fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Return the fields of a base configuration that depend on the tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def continue_from(config: PreTrainedConfig, given: dict) -> ARMTConfig:
    """Return an exported model's configuration with the `given` fields; ConfigError for one that shapes tensors."""
    fixed = ("num_mem_tokens", "sink", "d_mem", "nu", "n_heads", "gating", "memory_kind", "state_decay")
    for name in fixed:
        if name in given and given[name] != getattr(config, name):
            raise ConfigError(f"model.{name}={given[name]}: the base folder has {getattr(config, name)}; leave it out")
    fields = {name: getattr(config, name) for name in ARMTFields.__annotations__}
    return ARMTConfig(base_config=config.base_config, **{**fields, **given})


def build_model(config: "ModelConfig", armt: ARMTConfig, ds_config: dict, seed: int) -> ARMTForCausalLM:
    """Return the partitioned model: a loaded or random base, with fresh memory unless the base is an ARMT already.

    Collective. Raises ConfigError where the base cannot be loaded.
    """
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    start_communication()
    torch.manual_seed(seed)
    # Hugging Face partitions what it makes or loads as long as this object is alive.
    partitioning = HfDeepSpeedConfig(ds_config)
    dtype = torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32
    try:
        if config.base is not None and is_armt(config.base):
            return ARMTForCausalLM.from_pretrained(config.base, config=armt, dtype=dtype)
        if config.base is not None:
            base = AutoModelForCausalLM.from_pretrained(
                config.base, config=armt.base, dtype=dtype, trust_remote_code=config.trust_remote_code
            )
        else:
            base = AutoModelForCausalLM.from_config(armt.base, dtype=dtype)
        init = deepspeed.zero.Init(config_dict_or_path=ds_config, zero_param_parallel_group=secondary_group())
        with no_init_weights(), init:
            model = ARMTForCausalLM(armt, base=base)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_lost_rank(error):
            # Partitioning is collective: the base may be as it should.
            raise
        raise ConfigError(f"model.base={config.base}: cannot be loaded ({one_line(error, 400)})") from None
    del partitioning
    initialise(model, config.init or InitConfig())
    return model


def on_meta(armt: ARMTConfig) -> ARMTForCausalLM:
    """Build the model without values, for the names and shapes of its parameters. Not collective."""
    with torch.device("meta"):
        return ARMTForCausalLM(armt)


def is_armt(base: str) -> bool:
    """Tell whether `base` is an exported ARMT, which our own classes load rather than the code beside its weights."""
    return PreTrainedConfig.get_config_dict(base)[0].get("model_type") == ARMTConfig.model_type


def initialise(model: ARMTForCausalLM, config: InitConfig) -> None:
    """Initialise the memory and the base weights that `config` names. Collective: rank 0 draws, module by module."""
    for layer in model.layers:
        with gathered(layer.memory) as drawing:
            if drawing:
                layer.memory.reset_parameters()
        init_linears(layer.layer, config.linear_std)
    embeddings = model.get_input_embeddings()
    with gathered(embeddings, model.memory_tokens) as drawing:
        if drawing:
            weight = embeddings.get_parameter("weight")
            init_normal(weight, config.embedding_std)
            std = config.memory_std or weight.float().std().item()
            for rows in model.memory_tokens.parameters():
                nn.init.normal_(rows, std=std)
    positions = model.backbone.part("positions")
    if positions is not None and config.position_std:
        with gathered(positions) as drawing:
            if drawing:
                init_normal(positions.get_parameter("weight"), config.position_std)
    if config.linear_std and not model.config.tie_word_embeddings:
        init_linears(Backbone(model.base, model.backbone.family).head, config.linear_std)


@contextlib.contextmanager
def gathered(*modules: nn.Module) -> Iterator[bool]:
    """Make the parameters of some modules whole within the block; true on the rank whose changes count. Collective."""
    import deepspeed

    parameters = [parameter for module in modules for parameter in module.parameters()]
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0), torch.no_grad():
        yield not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def init_linears(module: nn.Module, std: float | None) -> None:
    """Draw normal weights and set zero biases for every linear map below `module`; do nothing without a std.

    Collective: no more than one of them is whole at a time.
    """
    for part in module.modules():
        if std and isinstance(part, nn.Linear | Conv1D):
            with gathered(part) as drawing:
                if drawing:
                    nn.init.normal_(part.weight, std=std)
                    if part.bias is not None:
                        nn.init.zeros_(part.bias)


def init_normal(weight: Tensor, std: float | None) -> None:
    """Draw normal values; do nothing without a std."""
    if std:
        nn.init.normal_(weight, std=std)
