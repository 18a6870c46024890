"""ARMT as an ordinary Hugging Face causal LM. Its plain loops over segments and layers are what every faster path is
tested against.

Shapes: B batch, T tokens of a segment, M memory tokens, D model width, V vocabulary, L layers,
        H + T + M = N positions of a segment's row; see `segment_rows`.
"""

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .backbone import Context
from .cache import ARMTCache, ARMTOutput, the_cache
from .configuration_armt import ARMTConfig
from .documents import check_starts
from .generation import ARMTGeneration, check_cacheable, check_others
from .memory_kind import LAST_LAYER, ARMTLayer, apply
from .rmt import MemoryRows, enter
from .segment_rows import IGNORE, MemoryTokens, segment_lengths
from .tested import warn_if_untested


def one_cell(layer: ARMTLayer, x: Tensor, state: tuple, context: Context) -> tuple[Tensor, tuple]:
    """Run one cell under autograd and return its output and the next state. `x` [B, N, D]."""
    y, update = layer.cell(x, state, context)
    return y, apply(state, update)


class ARMTForCausalLM(ARMTGeneration):
    """An associative recurrent memory transformer around a causal LM of any family in `backbone.FAMILIES`.

    `base`: a loaded causal LM to wrap. The caller then initialises the memory, as parameters may be partitioned:
    with `reset_memory`, or under ZeRO-3 with `zero3.partitioned_model.initialise`.
    """

    config_class = ARMTConfig
    _no_split_modules = ["ARMTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: ARMTConfig, base: PreTrainedModel | None = None):
        if config.sliding_window and "flash" in str(config._attn_implementation):
            raise ValueError(
                f"attn_implementation={config._attn_implementation}: takes no mask, which sliding_window="
                f"{config.sliding_window} needs; use sdpa or eager"
            )
        super().__init__(config)
        # As Hugging Face does for nested models: the inner one takes the outer one's choice of attention.
        config.base._attn_implementation = config._attn_implementation
        self.base = AutoModelForCausalLM.from_config(config.base) if base is None else base
        self.memory_tokens = MemoryTokens(config.memory_rows, config.hidden_size, config.sink)
        kind = config.memory_class
        self.carries_rows = LAST_LAYER in kind.arrows
        layers = self.backbone.layers
        for i, layer in enumerate(layers):
            memory = kind.from_config(config)
            layers[i] = ARMTLayer(layer, memory, config.memory_rows, self.backbone.family)
        self.post_init()
        # Under ZeRO-3 the parameters are partitioned by now; whoever builds the model there initialises or loads them.
        if base is None and any(rows.numel() for rows in self.memory_tokens.parameters()):
            self.reset_memory()
        self.freeze()

    @torch.no_grad()
    def reset_memory(self) -> None:
        """Initialise what ARMT adds to the base: projections, and memory rows with the embeddings' std."""
        for layer in self.layers:
            layer.memory.reset_parameters()
        embeddings = self.get_input_embeddings().get_parameter("weight")
        for rows in self.memory_tokens.parameters():
            rows.normal_().mul_(embeddings.float().std().to(embeddings.dtype))

    def freeze(self) -> None:
        """Exclude the memory projections from training where the config says so, else include them."""
        for layer in self.layers:
            layer.memory.requires_grad_(not self.config.freeze_mem)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load as PreTrainedModel.from_pretrained does, and freeze again, as it makes every parameter trainable.

        Raises ValueError for a device_map of several devices.
        """
        warn_if_untested()
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
        if len(places) > 1:
            named = ", ".join(sorted(places))
            raise ValueError(
                f"device_map={kwargs.get('device_map')}: puts layers on {named}, but an ARMT's memory is on one; "
                'give device_map={"": 0}'
            )
        model.freeze()
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the base initialises its own modules, and `reset_memory` what ARMT adds."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the base model's token embeddings."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the base model's head."""
        return self.base.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the base model's token embeddings."""
        self.base.set_input_embeddings(value)

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the base model's head."""
        self.base.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as PreTrainedModel does, and tell the base configuration, from which a saved model is built again."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.base.vocab_size = self.config.vocab_size
        return embeddings

    def segment(
        self,
        input_ids: Tensor,
        states: list[tuple],
        attention_mask: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple]]:
        """Read one segment. input_ids [B, T] -> normed hidden states [B, T, D] and the next states.

        document_starts [B, T] bool, true where a document begins. Called for one segment after another, it streams a
        sequence of any length in constant memory.
        """
        x = self.embed_segments(input_ids, [input_ids.shape[1]])
        *states, carried = states
        if self.carries_rows:
            x = enter(x, *self.rows_around(carried, len(x), document_starts))
        context = self.context(x, attention_mask, document_starts)
        following = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, run=partial(one_cell, state=state, context=context))
            following.append(state)
        hidden = self.backbone.norm(x)
        if self.carries_rows:
            carried = MemoryRows.of(hidden, self.config.memory_rows)
        first = self.config.head_rows
        return hidden[:, first : first + input_ids.shape[1]], [*following, carried]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: ARMTCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        past_key_values: ARMTCache | None = None,
        document_starts: Tensor | None = None,
        **others: Any,
    ) -> ARMTOutput | tuple:
        """Compute logits, and the loss where labels are given. input_ids, attention_mask, labels [B, N].

        labels equal input_ids, with -100 where the target is not scored. They are shifted here, over the whole
        sequence, so that the first token of every segment but the first is predicted by the segment before it.
        num_items_in_batch: what the sum of losses is divided by; None: the number of scored targets.
        document_starts [B, N], nonzero where a document begins: attention and memory start anew there, and the document
        before it does not predict its first token.
        cache, or by its older name past_key_values: what a forward with use_cache=True returned.
        others: `position_ids` and `cache_position` are accepted where they change nothing.
        Raises TypeError for any other keyword, ValueError for a value that ARMT cannot honour.
        """
        cache = the_cache(cache, past_key_values)
        check_others(others, input_ids.shape[1], cache.get_seq_length() if cache else 0, attention_mask)
        attention_mask = right_padding(attention_mask)
        if document_starts is not None:
            document_starts = check_starts(document_starts, input_ids)
            labels = None if labels is None else labels.masked_fill(document_starts, IGNORE)
        if use_cache and cache is None:
            cache = ARMTCache(self.initial_states(input_ids.shape[0]))
        if cache is not None:
            check_cacheable(self.config)
            if attention_mask is not None:
                raise ValueError("attention_mask with padding: segments would shift; batch prompts of equal length")
            hidden = self.extend(input_ids, cache, document_starts)
        else:
            hidden = self.read_segments(input_ids, attention_mask, document_starts)
        logits = self.backbone.head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        output = ARMTOutput(loss=loss, logits=logits, cache=cache)
        return output if return_dict in (None, True) else output.to_tuple()

    def read_segments(self, input_ids: Tensor, attention_mask: Tensor | None, starts: Tensor | None = None) -> Tensor:
        """Read segment by segment, layer by layer. [B, N] -> normed hidden states [B, N, D]."""
        if attention_mask is not None and self.config.segment_alignment != "left":
            return self.read_rows(input_ids, attention_mask, starts)
        lengths = segment_lengths(input_ids.shape[1], self.config.segment_tokens, self.config.segment_alignment)
        masks, borders = (
            itertools.repeat(None) if each is None else each.split(lengths, dim=1) for each in (attention_mask, starts)
        )
        states = self.initial_states(input_ids.shape[0])
        hidden = []
        for s, (ids, mask, border) in enumerate(zip(input_ids.split(lengths, dim=1), masks, borders, strict=False)):
            if self.config.k2 and s % self.config.k2 == 0:
                states[-1] = MemoryRows(*(tensor.detach() for tensor in states[-1]))
            h, states = self.segment(ids, states, mask, border)
            hidden.append(h)
        return torch.cat(hidden, dim=1)

    def read_rows(self, input_ids: Tensor, attention_mask: Tensor, starts: Tensor | None) -> Tensor:
        """Read row by row, because where a row is cut depends on its own length, not on how far its batch is padded."""
        hidden = input_ids.new_zeros(*input_ids.shape, self.config.hidden_size, dtype=self.dtype)
        for row, tokens in enumerate(attention_mask.sum(1).tolist()):
            if tokens:
                own = None if starts is None else starts[row : row + 1, :tokens]
                hidden[row : row + 1, :tokens] = self.read_segments(input_ids[row : row + 1, :tokens], None, own)
        return hidden


def right_padding(attention_mask: Tensor | None) -> Tensor | None:
    """Return the mask, or None if it masks nothing. Raises ValueError for padding on the left."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if bool((attention_mask[:, 0] < attention_mask.amax(1)).any()):
        raise ValueError("attention_mask: padding on the left would shift the segments; pad on the right")
    return attention_mask


ARMTConfig.register_for_auto_class()
ARMTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
