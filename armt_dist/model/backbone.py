"""Where a Hugging Face causal LM keeps its parts, and how its decoder layers are called: one row per family.

Shapes: B batch, N positions of a segment row (tokens and memory), D model width.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .documents import Documents


class Border(NamedTuple):
    """What the layers of one segment share about its two borders; see `sliding_window`."""

    reach: Tensor  # [N] int64 first visible row of the window; W: none is, sliding_window.EVERYTHING: padding is too
    seen: Tensor  # [B or 1, T] float32, what Window.seen says of each token to the next segment
    turn: tuple[Tensor, Tensor] | None  # cos, sin [c or less] of a turn by -T positions; None: no rotary positions


class Context(NamedTuple):
    """What the layers of one segment share besides hidden states."""

    mask: Tensor | None  # [B or 1, 1, N, keys] additive float; None: plain causal
    position_ids: Tensor  # [1, N] int64
    rotary: tuple[Tensor, Tensor] | None  # cos, sin [1, N, rotary width]
    cache: DynamicLayer | None = None  # keys and values that stand before the row's own
    border: Border | None = None  # only with a sliding window
    documents: Documents | None = None  # only where a document begins in the segment


class Family(NamedTuple):
    """Attribute names of a causal LM's parts. An empty name means that the family has no such part."""

    core: str
    """The decoder stack below the causal LM; it holds all other parts."""
    tokens: str
    """Token embeddings."""
    positions: str
    """Learned position embeddings, added to those of the tokens."""
    dropout: str
    """Dropout of the embeddings."""
    layers: str
    """Decoder layers, in order."""
    norm: str
    """The norm after the last layer."""
    rotary: str
    """The module that computes cos and sin from position ids; it rotates the two halves of a head's channels."""
    call: Callable[[nn.Module, Tensor, Context], Tensor]
    """How to call one decoder layer."""
    last_product: str
    """The linear map of a decoder layer whose result is only added to its output, perhaps after dropout; none where a
    norm comes in between."""


def call_rotary(layer: nn.Module, x: Tensor, context: Context) -> Tensor:
    """Call a layer that turns its queries and keys by `position_embeddings`. [B, N, D] -> [B, N, D]."""
    named = {"attention_mask": context.mask, "position_embeddings": context.rotary, **cache_of(layer, context)}
    check_named(layer, *named)
    return layer(x, position_ids=context.position_ids, use_cache=context.cache is not None, **named)


def call_gpt2(layer: nn.Module, x: Tensor, context: Context) -> Tensor:
    """Call a layer whose input already carries its positions. [B, N, D] -> [B, N, D]."""
    named = {"attention_mask": context.mask, **cache_of(layer, context)}
    check_named(layer, *named)
    return layer(x, position_ids=context.position_ids, use_cache=context.cache is not None, **named)


# What decoder layers call their cache: GPT-NeoX's, the others' since transformers 5.24, and before.
CACHES_OF_LAYERS = ("layer_past", "cache", "past_key_values")


def cache_of(layer: nn.Module, context: Context) -> dict[str, Any]:
    """Return the segment's keys and values under the name by which `layer` takes them."""
    known = named_parameters(type(layer).forward)
    # The first name where no name is known: `check_named` then reports it as missing.
    return {next((name for name in CACHES_OF_LAYERS if name in known), CACHES_OF_LAYERS[0]): context.cache}


@cache
def named_parameters(forward: Callable) -> frozenset[str]:
    """Return the parameters that `forward` names; what it collects in **kwargs may have no effect."""
    return frozenset(inspect.signature(forward).parameters)


def check_named(layer: nn.Module, *names: str) -> None:
    """Raise TypeError where a decoder layer would swallow one of `names` in its **kwargs, and be silently wrong."""
    kind = type(layer)
    for name in names:
        if name not in named_parameters(kind.forward):
            raise TypeError(
                f"{kind.__name__}.forward of transformers {transformers.__version__} has no parameter {name!r}: it was "
                "renamed; install a version that armt_dist was tested with"
            )


LLAMA = Family("model", "embed_tokens", "", "", "layers", "norm", "rotary_emb", call_rotary, "mlp.down_proj")
# By `model_type` of the base configuration.
FAMILIES = {
    "gpt2": Family("transformer", "wte", "wpe", "drop", "h", "ln_f", "", call_gpt2, "mlp.c_proj"),
    "gpt_neox": Family(
        "gpt_neox",
        "embed_in",
        "",
        "emb_dropout",
        "layers",
        "final_layer_norm",
        "rotary_emb",
        call_rotary,
        "mlp.dense_4h_to_h",
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "olmo2": LLAMA._replace(last_product=""),
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}


class Backbone(NamedTuple):
    """A causal LM seen through its family's row; holds no parameters of its own."""

    model: PreTrainedModel
    family: Family

    def part(self, name: str) -> nn.Module | None:
        """Return the module that the family's field `name` points to, or None if the family has none."""
        attribute = getattr(self.family, name)
        return getattr(getattr(self.model, self.family.core), attribute) if attribute else None

    def required(self, name: str) -> nn.Module:
        """Return a part that every family has."""
        part = self.part(name)
        assert part is not None, f"the row of {self.model.config.model_type} in FAMILIES names no {name}"
        return part

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up token embeddings, without positions. [B, T] int64 -> [B, T, D]."""
        return self.required("tokens")(input_ids)

    def place(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Add learned positions, if the family has them, and apply the embedding dropout. [B, N, D] -> [B, N, D]."""
        if positions := self.part("positions"):
            x = x + positions(position_ids)
        dropout = self.part("dropout")
        return dropout(x) if dropout else x

    def rotary(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute cos and sin for `position_ids` as the family's layers take them for `x`, or None."""
        rotary = self.part("rotary")
        # Called without the module's hooks, as there is nothing to gather: the number of calls depends on the number of
        # segments, and ZeRO-3 needs the same order of modules on every rank and in every step.
        return rotary.forward(x, position_ids=position_ids) if rotary else None

    def turn(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Compute cos and sin that move a rotary key by `positions`, [rotary width] float32, or None."""
        rotary = self.part("rotary")
        if rotary is None:
            return None
        angle = positions * rotary.get_buffer("inv_freq").to(device, torch.float32).repeat(2)
        return angle.cos(), angle.sin()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        layers = self.required("layers")
        assert isinstance(layers, nn.ModuleList), f"layers are a {type(layers).__name__}, not a ModuleList"
        return layers

    @property
    def norm(self) -> nn.Module:
        """The norm after the last layer."""
        return self.required("norm")

    @property
    def head(self) -> nn.Module:
        """The language-model head, [.., D] -> [.., V]."""
        return self.model.get_output_embeddings()


def backbone_of(model: PreTrainedModel) -> Backbone:
    """Look up the family's row. Raises ValueError for a family without one."""
    return Backbone(model, family_of(model.config.model_type))


def family_of(model_type: str | None) -> Family:
    """Return the row of a model type. Raises ValueError for a family without one."""
    if model_type not in FAMILIES:
        raise ValueError(f"base_config.model_type={model_type}: no such backbone; one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def causal_mask(queries: int, attend: Tensor, dtype: torch.dtype, seeing_all: int = 0) -> Tensor:
    """Build an additive causal mask for the last `queries` of the keys in `attend` [B, keys] (True: a real token).

    The last `seeing_all` queries see every key, padding too. Returns [B, 1, queries, keys]. It holds finfo.min rather
    than -inf, as in Hugging Face, so that a row that may see nothing stays finite. A float mask is right for eager and
    sdpa alike; a bool mask under eager is silently wrong.
    """
    keys = attend.shape[-1]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=attend.device).tril(keys - queries)
    mask = torch.zeros(attend.shape[0], 1, queries, keys, dtype=dtype, device=attend.device)
    mask.masked_fill_(~(seen & attend[:, None, None, :]), torch.finfo(dtype).min)
    mask[:, :, queries - seeing_all :] = 0
    return mask
