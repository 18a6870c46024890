"""Where a Hugging Face causal LM keeps its parts, and how one of its decoder layers is called: one row per family.

Shapes: B batch, N positions of a segment row (tokens and memory), D model width.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn


class Context(NamedTuple):
    """What every layer of one segment shares besides hidden states."""

    mask: Tensor | None  # [B or 1, 1, N, keys] additive float; None: plain causal
    position_ids: Tensor  # [1, N] int64
    rotary: tuple[Tensor, Tensor] | None  # cos, sin [1, N, rotary width]
    cache: Any = None  # keys and values that go before the row's own; takes them as a transformers cache layer does
    border: Any = None  # a window.Border where there is a sliding window


class Family(NamedTuple):
    """Attribute names under the causal LM; `core` holds the rest. An empty name: the family has no such part."""

    core: str
    tokens: str
    positions: str
    dropout: str
    layers: str
    norm: str
    rotary: str
    call: Callable[[nn.Module, Tensor, Context], Tensor]


def call_rotary(layer: nn.Module, x: Tensor, context: Context) -> Tensor:
    """A layer that turns its queries and keys by `position_embeddings`. [B, N, D] -> [B, N, D]."""
    named = {"attention_mask": context.mask, "position_embeddings": context.rotary, **cache_of(layer, context)}
    check_named(type(layer), *named)
    return layer(x, position_ids=context.position_ids, use_cache=context.cache is not None, **named)


def call_gpt2(layer: nn.Module, x: Tensor, context: Context) -> Tensor:
    """A layer whose positions are in `x` already. [B, N, D] -> [B, N, D]."""
    named = {"attention_mask": context.mask, **cache_of(layer, context)}
    check_named(type(layer), *named)
    return layer(x, position_ids=context.position_ids, use_cache=context.cache is not None, **named)


# What decoder layers call their cache: GPT-NeoX's, the others' since transformers 5.24, and before.
CACHES_OF_LAYERS = ("layer_past", "cache", "past_key_values")


def cache_of(layer: nn.Module, context: Context) -> dict[str, Any]:
    """The segment's keys and values under the name by which `layer` takes them."""
    known = named_parameters(type(layer))
    # The first one where there is none: `check_named` then says that it is missing.
    return {next((name for name in CACHES_OF_LAYERS if name in known), CACHES_OF_LAYERS[0]): context.cache}


@cache
def named_parameters(kind: type[nn.Module]) -> frozenset[str]:
    """The parameters that `kind.forward` names; what it only collects in **kwargs may be ignored."""
    return frozenset(inspect.signature(kind.forward).parameters)


@cache
def check_named(kind: type[nn.Module], *names: str) -> None:
    """Raises TypeError where a decoder layer would swallow one of `names` in its **kwargs, and be silently wrong."""
    for name in names:
        if name not in named_parameters(kind):
            raise TypeError(
                f"{kind.__name__}.forward of transformers {transformers.__version__} has no parameter {name!r}: it was "
                "renamed; install a version that armt_dist was tested with"
            )


LLAMA = Family("model", "embed_tokens", "", "", "layers", "norm", "rotary_emb", call_rotary)
FAMILIES = {
    "gpt2": Family("transformer", "wte", "wpe", "drop", "h", "ln_f", "", call_gpt2),
    "gpt_neox": Family(
        "gpt_neox", "embed_in", "", "emb_dropout", "layers", "final_layer_norm", "rotary_emb", call_rotary
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}


class Backbone(NamedTuple):
    """A causal LM seen through its family's row; holds no parameters of its own."""

    model: nn.Module
    family: Family

    def part(self, name: str) -> nn.Module | None:
        """The module that the family's field `name` points to, or None."""
        attribute = getattr(self.family, name)
        return getattr(getattr(self.model, self.family.core), attribute) if attribute else None

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] int64 -> [B, T, D], without positions."""
        return self.part("tokens")(input_ids)

    def place(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Add learned positions, if the family has them, and apply the embedding dropout. [B, N, D] -> [B, N, D]."""
        if positions := self.part("positions"):
            x = x + positions(position_ids)
        dropout = self.part("dropout")
        return dropout(x) if dropout else x

    def rotary(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin for `position_ids` in x's dtype, or None."""
        rotary = self.part("rotary")
        # Past the module's hooks, as there is nothing to gather: how often it is called depends on the segments, and
        # ZeRO-3 wants the same order of modules on every rank and in every step.
        return rotary.forward(x, position_ids=position_ids) if rotary else None

    def turn(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """cos and sin that move a rotary key by so many positions, [rotary width] float32, or None."""
        rotary = self.part("rotary")
        if rotary is None:
            return None
        angle = positions * rotary.inv_freq.to(device, torch.float32).repeat(2)
        return angle.cos(), angle.sin()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self.part("layers")

    @property
    def norm(self) -> nn.Module:
        """The norm after the last layer."""
        return self.part("norm")

    @property
    def head(self) -> nn.Module:
        """The language-model head, [.., D] -> [.., V]."""
        return self.model.get_output_embeddings()


def backbone_of(model: nn.Module) -> Backbone:
    """Raises ValueError for a family without a row."""
    return Backbone(model, family_of(model.config.model_type))


def family_of(model_type: str) -> Family:
    """Raises ValueError for a family without a row."""
    if model_type not in FAMILIES:
        raise ValueError(f"base_config.model_type={model_type}: no such backbone; one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def causal_mask(queries: int, attend: Tensor, dtype: torch.dtype, seeing_all: int = 0) -> Tensor:
    """Additive causal mask for the last `queries` of the keys in `attend` [B, keys] (True: a real token).

    The last `seeing_all` queries see every key, padding too.

    Returns [B, 1, queries, keys]. finfo.min rather than -inf, as Hugging Face has it: a row that may see nothing
    stays finite. A float mask is right for eager and sdpa alike; a bool mask under eager is silently wrong.
    """
    keys = attend.shape[-1]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=attend.device).tril(keys - queries)
    mask = torch.zeros(attend.shape[0], 1, queries, keys, dtype=dtype, device=attend.device)
    mask.masked_fill_(~(seen & attend[:, None, None, :]), torch.finfo(dtype).min)
    mask[:, :, queries - seeing_all :] = 0
    return mask
