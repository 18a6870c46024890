"""ARMT as an ordinary Hugging Face causal LM: the plain loops over segments and layers, which are the oracle of
every faster path.

Shapes: B batch, S segments, T tokens of a segment, M memory tokens, D model width, V vocabulary, L layers,
        H + T + M = N positions of a segment's row, H of them before the tokens: sinks (ARMT), memory (RMT).
"""

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .backbone import Backbone, Context, backbone_of, causal_mask
from .cache import ARMTCache, ARMTOutput, the_cache
from .configuration_armt import ARMTConfig
from .generation import ARMTGenerationMixin, check_others
from .memory import MEMORIES, apply
from .rmt import LAST_LAYER, MemoryRows, enter
from .sliding_window import Border, WindowedMemory, reach
from .tested import warn_if_untested


def segment_lengths(tokens: int, segment_tokens: int, alignment: str = "left") -> list[int]:
    """Lengths of the segments that `tokens` are cut into; the short one comes last (left) or first (right)."""
    full, rest = divmod(tokens, segment_tokens)
    if alignment == "center":
        # As torch.chunk cuts: equal parts of the rounded-up mean length.
        length = math.ceil(tokens / max(1, full + bool(rest)))
        full, rest = divmod(tokens, max(1, length))
        return [length] * full + [rest] * bool(rest)
    short = [rest] * bool(rest)
    return short + [segment_tokens] * full if alignment == "right" else [segment_tokens] * full + short


class MemoryTokens(nn.Module):
    """The learned rows around a segment's tokens; a module of its own so that ZeRO-3 gathers it when it is used."""

    def __init__(self, num_mem_tokens: int, hidden_size: int, sink: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_mem_tokens, hidden_size))
        if sink:
            self.sink = nn.Parameter(torch.empty(sink, hidden_size))

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """Sinks [B, rows, D], of which there may be none, and memory [B, M, D]."""
        sink = self.sink if hasattr(self, "sink") else self.weight[:0]
        return sink.expand(batch, -1, -1), self.weight.expand(batch, -1, -1)


class ARMTLayer(nn.Module):
    """A decoder layer between a memory read and a memory write."""

    def __init__(self, layer: nn.Module, memory: nn.Module, num_mem_tokens: int, call: Callable):
        super().__init__()
        self.layer, self.memory = layer, memory
        self.num_mem_tokens, self.call = num_mem_tokens, call

    def cell(self, x: Tensor, state: tuple, context: Context) -> tuple[Tensor, tuple]:
        """One cell of the grid. [B, N, D] -> [B, N, D] and what the segment adds to the memory (see `memory`)."""
        context = self.memory.open(context, state)
        y = self.call(self.layer, self.memory.read(x, state), context)
        return y, self.memory.write(y[:, -self.num_mem_tokens :], state, context)

    def forward(self, x: Tensor, *, run: Callable):
        """`run(self, x)` with this layer's parameters at hand.

        ZeRO-3 gathers a layer around this call, so whatever covers many segments with one gather (segment BPTT, the
        wavefront) comes in from outside as `run`.
        """
        return run(self, x)


def one_cell(layer: ARMTLayer, x: Tensor, state: tuple, context: Context) -> tuple[Tensor, tuple]:
    """The plain traversal: one cell under autograd, `x` [B, N, D]."""
    y, update = layer.cell(x, state, context)
    return y, apply(state, update)


class ARMTForCausalLM(PreTrainedModel, ARMTGenerationMixin):
    """An associative recurrent memory transformer around any supported causal LM.

    `base`: a loaded causal LM to wrap; initialising the memory is then the caller's, as its parameters may be
    partitioned: `reset_memory`, or `build.initialise` under ZeRO-3.
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
        # Hugging Face builds a nested model with the outer one's choice of attention.
        config.base_config._attn_implementation = config._attn_implementation
        self.base = AutoModelForCausalLM.from_config(config.base_config) if base is None else base
        self.memory_tokens = MemoryTokens(config.num_mem_tokens, config.hidden_size, config.sink)
        kind = WindowedMemory if config.sliding_window else MEMORIES[config.memory_kind]
        # Memory rows come from the segment before, not from the table.
        self.carries_rows = LAST_LAYER in kind.arrows
        layers = self.backbone.layers
        for i, layer in enumerate(layers):
            memory = kind.from_config(config)
            layers[i] = ARMTLayer(layer, memory, config.num_mem_tokens, self.backbone.family.call)
        self.post_init()
        # Under ZeRO-3 the parameters are elsewhere by now; whoever builds there initialises or loads them.
        if base is None and self.memory_tokens.weight.numel():
            self.reset_memory()
        self.freeze()

    @property
    def backbone(self) -> Backbone:
        """The base model seen through its family's row."""
        return backbone_of(self.base)

    @torch.no_grad()
    def reset_memory(self) -> None:
        """Initialise what ARMT adds to the base: projections, and memory rows with the embeddings' std."""
        for layer in self.backbone.layers:
            layer.memory.reset_parameters()
        embeddings = self.get_input_embeddings().weight
        for rows in self.memory_tokens.parameters():
            rows.normal_().mul_(embeddings.float().std().to(embeddings.dtype))

    def freeze(self) -> None:
        """Take the memory projections out of training if the config says so."""
        for layer in self.backbone.layers:
            layer.memory.requires_grad_(not self.config.freeze_mem)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As PreTrainedModel.from_pretrained, whose loading makes every parameter trainable again."""
        warn_if_untested()
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        # The base initialises its own modules; what ARMT adds is done by reset_memory.
        pass

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base.set_output_embeddings(value)

    # --- one row of hidden states: sinks or memory, tokens, memory ------------------------------------------------

    def position_ids(self, tokens: int, device: torch.device) -> Tensor:
        """Positions of a row of so many tokens. [1, H + tokens + M] int64."""
        memory = self.config.num_mem_tokens
        end = self.config.head_rows + tokens
        first = self.config.base_config.max_position_embeddings - memory if self.config.wrap_pos else end
        return torch.cat([torch.arange(end, device=device), torch.arange(first, first + memory, device=device)])[None]

    def embed_segments(self, input_ids: Tensor, lengths: list[int]) -> Tensor:
        """Consecutive segments, packed. [B, sum(lengths)] -> [B, sum(H + length + M), D].

        In one pass over the tables, because a module that is called once is gathered once under ZeRO-3. Memory rows
        that are carried (RMT) are left zero: see `enter`.
        """
        tokens, batch = self.backbone.embed(input_ids), input_ids.shape[0]
        if self.carries_rows:
            head = tail = tokens.new_zeros(batch, self.config.num_mem_tokens, tokens.shape[2])
        else:
            head, tail = (rows.to(tokens.dtype) for rows in self.memory_tokens(batch))
        rows = [part for segment in tokens.split(lengths, dim=1) for part in (head, segment, tail)]
        positions = torch.cat([self.position_ids(n, input_ids.device) for n in lengths], dim=1)
        return self.backbone.place(torch.cat(rows, dim=1), positions)

    def context(self, x: Tensor, attention_mask: Tensor | None) -> Context:
        """What the layers of one segment share. x [B, N, D], attention_mask [B, T] (1: real token) or None."""
        config, memory = self.config, self.config.num_mem_tokens
        tokens = x.shape[1] - config.other_rows
        positions = self.position_ids(tokens, x.device)
        mask = None
        if attention_mask is not None:
            attend = nn.functional.pad(attention_mask.bool(), (config.head_rows, memory), value=True)
        else:
            attend = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device)
        # eager without a mask would not be causal
        if attention_mask is not None or config.sliding_window or config._attn_implementation == "eager":
            mask = causal_mask(x.shape[1], attend, x.dtype, memory if config.sliding_window else 0)
        border = None
        if config.sliding_window:
            border = self.border(tokens, x.device)._replace(
                real=attend[:, config.head_rows : config.head_rows + tokens]
            )
        return Context(mask, positions, self.backbone.rotary(x, positions), border=border)

    def border(self, tokens: int, device: torch.device) -> Border:
        """The border behind a segment of so many tokens, none of them padding."""
        rows = self.config.head_rows, tokens, self.config.num_mem_tokens
        real = torch.ones(1, tokens, dtype=torch.bool, device=device)
        return Border(reach(rows, self.config.sliding_window, device), real, self.backbone.turn(-tokens, device))

    def initial_states(self, batch: int) -> list[tuple]:
        """L empty memories; rows that are carried (RMT) enter the first layer, so they stand there."""
        states = [layer.memory.initial_state(batch, self.device) for layer in self.backbone.layers]
        if self.carries_rows:
            states[0] = MemoryRows.empty(batch, self.config.num_mem_tokens, self.config.hidden_size, self.device)
        return states

    def rows_around(self, state: tuple, batch: int) -> tuple[Tensor, Tensor]:
        """The rows before and behind a segment's tokens, [B, H, D] and [B, M, D]; `state` is the first layer's."""
        head, tail = self.memory_tokens(batch)
        if self.carries_rows:
            head = tail = state.entering(tail)
        return head, tail

    def segment(
        self, input_ids: Tensor, states: list[tuple], attention_mask: Tensor | None = None
    ) -> tuple[Tensor, list[tuple]]:
        """One segment through all layers. input_ids [B, T] -> normed hidden states [B, T, D] and the next states.

        The way to stream a sequence of any length in constant memory.
        """
        x = self.embed_segments(input_ids, [input_ids.shape[1]])
        if self.carries_rows:
            x = enter(x, self.rows_around(states[0], len(x))[0])
        context = self.context(x, attention_mask)
        following = []
        for layer, state in zip(self.backbone.layers, states, strict=True):
            x, state = layer(x, run=partial(one_cell, state=state, context=context))
            following.append(state)
        hidden = self.backbone.norm(x)
        if self.carries_rows:
            following[0] = MemoryRows.of(hidden, self.config.num_mem_tokens)
        return hidden[:, self.config.head_rows : -self.config.num_mem_tokens], following

    # --- the plain forward: the oracle ---------------------------------------------------------------------------

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
        **others,
    ) -> ARMTOutput | tuple:
        """input_ids, attention_mask, labels [B, N] -> loss (labels given) and logits [B, N, V].

        labels equal input_ids with -100 where the target is not scored; they are shifted here, over the whole
        sequence, so the first token of every segment but the first is scored by the segment before it.
        num_items_in_batch: what the sum of losses is divided by; None: the number of scored targets.
        cache, or by its older name past_key_values: what a forward with use_cache=True returned.
        others: `position_ids` and `cache_position` that say what holds anyway; any other keyword is a TypeError.
        """
        cache = the_cache(cache, past_key_values)
        check_others(others, input_ids.shape[1], cache.get_seq_length() if cache else 0, attention_mask)
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if attention_mask is not None and bool((attention_mask[:, 0] < attention_mask.amax(1)).any()):
            raise ValueError("attention_mask: padding on the left would shift the segments; pad on the right")
        if use_cache and cache is None:
            cache = ARMTCache(self.initial_states(input_ids.shape[0]))
        if cache is not None:
            if attention_mask is not None:
                raise ValueError("attention_mask with padding: segments would shift; batch prompts of equal length")
            hidden = self.extend(input_ids, cache)
        else:
            hidden = self.read_segments(input_ids, attention_mask)
        logits = self.backbone.head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        output = ARMTOutput(loss=loss, logits=logits, cache=cache)
        return output if return_dict in (None, True) else output.to_tuple()

    def read_segments(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Segment by segment, layer by layer. [B, N] -> normed hidden states [B, N, D]."""
        lengths = segment_lengths(input_ids.shape[1], self.config.segment_tokens, self.config.segment_alignment)
        masks = itertools.repeat(None) if attention_mask is None else attention_mask.split(lengths, dim=1)
        states = self.initial_states(input_ids.shape[0])
        hidden = []
        for s, (ids, mask) in enumerate(zip(input_ids.split(lengths, dim=1), masks, strict=False)):
            if self.config.k2 and s % self.config.k2 == 0:
                states[0] = MemoryRows(*(tensor.detach() for tensor in states[0]))
            h, states = self.segment(ids, states, mask)
            hidden.append(h)
        return torch.cat(hidden, dim=1)


ARMTConfig.register_for_auto_class()
ARMTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
