"""ARMT as an ordinary Hugging Face causal LM: the plain loops over segments and layers, which are the oracle of
every faster path, and `generate()` with constant memory.

Shapes: B batch, S segments, T tokens of a segment, M memory tokens, D model width, V vocabulary, L layers.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .backbone import Backbone, Context, backbone_of, causal_mask
from .configuration_armt import ARMTConfig
from .memory import MEMORIES, State, Update, apply


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
    """The learned rows appended to every segment; a module of its own so that ZeRO-3 gathers it when it is used."""

    def __init__(self, num_mem_tokens: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_mem_tokens, hidden_size))

    def forward(self, batch: int) -> Tensor:
        """[B, M, D]."""
        return self.weight.expand(batch, -1, -1)


class ARMTLayer(nn.Module):
    """A decoder layer between a memory read and a memory write."""

    def __init__(self, layer: nn.Module, memory: nn.Module, num_mem_tokens: int, call: Callable):
        super().__init__()
        self.layer, self.memory = layer, memory
        self.num_mem_tokens, self.call = num_mem_tokens, call

    def cell(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, Update]:
        """One cell of the grid. [B, T+M, D] -> [B, T+M, D] and what the segment adds to the memory."""
        y = self.call(self.layer, self.memory.read(x, state), context)
        return y, self.memory.write(y[:, -self.num_mem_tokens :], state)

    def forward(self, x: Tensor, *, run: Callable):
        """`run(self, x)` with this layer's parameters at hand.

        ZeRO-3 gathers a layer around this call, so whatever covers many segments with one gather (segment BPTT, the
        wavefront) comes in from outside as `run`.
        """
        return run(self, x)


def one_cell(layer: ARMTLayer, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
    """The plain traversal: one cell under autograd, `x` [B, T+M, D]."""
    y, update = layer.cell(x, state, context)
    return y, apply(state, update)


class ARMTForCausalLM(PreTrainedModel, GenerationMixin):
    """An associative recurrent memory transformer around any supported causal LM.

    `base`: a loaded causal LM to wrap; initialising the memory is then the caller's, as its parameters may be
    partitioned: `reset_memory`, or `build.initialise` under ZeRO-3.
    """

    config_class = ARMTConfig
    _no_split_modules = ["ARMTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: ARMTConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        # Hugging Face builds a nested model with the outer one's choice of attention.
        config.base_config._attn_implementation = config._attn_implementation
        self.base = AutoModelForCausalLM.from_config(config.base_config) if base is None else base
        self.memory_tokens = MemoryTokens(config.num_mem_tokens, config.hidden_size)
        layers = self.backbone.layers
        for i, layer in enumerate(layers):
            memory = MEMORIES[config.memory_kind](
                config.hidden_size,
                config.d_mem,
                nu=config.nu,
                n_heads=config.n_heads,
                maths=config.maths,
                use_denom=config.use_denom,
                correction=config.correction,
                gating=config.gating,
            )
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
        self.memory_tokens.weight.normal_().mul_(embeddings.float().std().to(embeddings.dtype))

    def freeze(self) -> None:
        """Take the memory projections out of training if the config says so."""
        for layer in self.backbone.layers:
            layer.memory.requires_grad_(not self.config.freeze_mem)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As PreTrainedModel.from_pretrained, whose loading makes every parameter trainable again."""
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

    # --- one row of hidden states: tokens, then memory -----------------------------------------------------------

    def position_ids(self, start: int, tokens: int, device: torch.device) -> Tensor:
        """Positions of `tokens` from `start` on, then those of the memory rows. [1, tokens + M] int64."""
        memory = self.config.num_mem_tokens
        end = start + tokens
        first = self.config.base_config.max_position_embeddings - memory if self.config.wrap_pos else end
        return torch.cat(
            [torch.arange(start, end, device=device), torch.arange(first, first + memory, device=device)]
        ).unsqueeze(0)

    def embed_segments(self, input_ids: Tensor, lengths: list[int]) -> Tensor:
        """Consecutive segments, packed. [B, sum(lengths)] -> [B, sum(length + M), D].

        In one pass over the tables, because a module that is called once is gathered once under ZeRO-3.
        """
        memory = self.memory_tokens(input_ids.shape[0])
        rows = [
            part
            for tokens in self.backbone.embed(input_ids).split(lengths, dim=1)
            for part in (tokens, memory.to(tokens.dtype))
        ]
        positions = torch.cat([self.position_ids(0, n, input_ids.device) for n in lengths], dim=1)
        return self.backbone.place(torch.cat(rows, dim=1), positions)

    def context(self, x: Tensor, attention_mask: Tensor | None) -> Context:
        """What the layers of one segment share. x [B, T+M, D], attention_mask [B, T] (1: real token) or None."""
        memory = self.config.num_mem_tokens
        tokens = x.shape[1] - memory
        positions = self.position_ids(0, tokens, x.device)
        mask = None
        if attention_mask is not None:
            mask = causal_mask(x.shape[1], nn.functional.pad(attention_mask.bool(), (0, memory), value=True), x.dtype)
        elif self.config._attn_implementation == "eager":
            # eager without a mask would not be causal
            mask = causal_mask(x.shape[1], torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device), x.dtype)
        return Context(mask, positions, self.backbone.rotary(x, positions))

    def initial_states(self, batch: int) -> list[State]:
        """L empty memories."""
        return [layer.memory.initial_state(batch, self.device) for layer in self.backbone.layers]

    def segment(
        self, input_ids: Tensor, states: list[State], attention_mask: Tensor | None = None
    ) -> tuple[Tensor, list[State]]:
        """One segment through all layers. input_ids [B, T] -> normed hidden states [B, T, D] and the next states.

        The way to stream a sequence of any length in constant memory.
        """
        x = self.embed_segments(input_ids, [input_ids.shape[1]])
        context = self.context(x, attention_mask)
        following = []
        for layer, state in zip(self.backbone.layers, states, strict=True):
            x, state = layer(x, run=partial(one_cell, state=state, context=context))
            following.append(state)
        return self.backbone.norm(x[:, : input_ids.shape[1]]), following

    # --- the plain forward: the oracle ---------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: "ARMTCache | None" = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """input_ids, attention_mask, labels [B, N] -> loss (labels given) and logits [B, N, V].

        labels equal input_ids with -100 where the target is not scored; they are shifted here, over the whole
        sequence, so the first token of every segment but the first is scored by the segment before it.
        """
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if attention_mask is not None and bool((attention_mask[:, 0] < attention_mask.amax(1)).any()):
            raise ValueError("attention_mask: padding on the left would shift the segments; pad on the right")
        if use_cache and past_key_values is None:
            past_key_values = ARMTCache(self.config, self.initial_states(input_ids.shape[0]))
        if past_key_values is not None:
            if attention_mask is not None:
                raise ValueError("attention_mask with padding: segments would shift; batch prompts of equal length")
            hidden = self.extend(input_ids, past_key_values)
        else:
            hidden = self.read_segments(input_ids, attention_mask)
        logits = self.backbone.head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def read_segments(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Segment by segment, layer by layer. [B, N] -> normed hidden states [B, N, D]."""
        lengths = segment_lengths(input_ids.shape[1], self.config.segment_tokens, self.config.segment_alignment)
        masks = itertools.repeat(None) if attention_mask is None else attention_mask.split(lengths, dim=1)
        states = self.initial_states(input_ids.shape[0])
        hidden = []
        for ids, mask in zip(input_ids.split(lengths, dim=1), masks, strict=False):
            h, states = self.segment(ids, states, mask)
            hidden.append(h)
        return torch.cat(hidden, dim=1)

    # --- generation: keys and values of the open segment, memory of the closed ones ------------------------------

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, *args):
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            beams = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs["past_key_values"] = ARMTCache(self.config, self.initial_states(batch_size * beams))

    def extend(self, input_ids: Tensor, cache: "ARMTCache") -> Tensor:
        """Read tokens after those that `cache` has seen. [B, N] -> normed hidden states [B, N, D].

        A full segment is closed only when a token after it arrives, as in `read_segments`.
        """
        hidden = []
        while input_ids.shape[1]:
            if cache.open_tokens == self.config.segment_tokens:
                self.close_segment(cache)
            chunk, input_ids = input_ids.tensor_split([self.config.segment_tokens - cache.open_tokens], dim=1)
            x = self.pass_layers(self.backbone.embed(chunk), cache, slice(None, chunk.shape[1]))
            cache.count(chunk.shape[1])
            hidden.append(self.backbone.norm(x))
        return torch.cat(hidden, dim=1)

    def close_segment(self, cache: "ARMTCache") -> None:
        """Let the memory rows read the open segment, write what they found, and forget its keys and values."""
        batch = cache.layers[0].state.z.shape[0]
        rows = self.memory_tokens(batch).to(self.get_input_embeddings().weight.dtype)
        self.pass_layers(rows, cache, slice(-self.config.num_mem_tokens, None), write=True)
        cache.close()

    def pass_layers(self, x: Tensor, cache: "ARMTCache", which: slice, write: bool = False) -> Tensor:
        """Rows x [B, n, D] of the open segment through all layers; `which` of (tokens, memory) positions are theirs."""
        tokens = 0 if write else x.shape[1]
        positions = self.position_ids(cache.open_tokens, tokens, x.device)[:, which]
        x = self.backbone.place(x, positions)
        keys = torch.ones(1, cache.open_tokens + x.shape[1], dtype=torch.bool, device=x.device)
        context = Context(causal_mask(x.shape[1], keys, x.dtype), positions, self.backbone.rotary(x, positions), cache)
        for layer, slot in zip(self.backbone.layers, cache.layers, strict=True):
            x = layer.call(layer.layer, layer.memory.read(x, slot.state), context)
            if write:
                slot.state = apply(slot.state, layer.memory.write(x, slot.state))
        return x


class ARMTCacheLayer(DynamicLayer):
    """Keys and values of the open segment, and the memory of the closed ones."""

    def __init__(self, state: State):
        super().__init__()
        self.state = state

    def select(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Apply `pick` along the batch to everything that this layer holds."""
        self.state = State(*map(pick, self.state))
        if self.is_initialized:
            self.keys, self.values = pick(self.keys), pick(self.values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(lambda t: t[indices, ...])

    def reset(self) -> None:
        self.drop_segment()
        self.state = State(*map(torch.zeros_like, self.state))

    def drop_segment(self) -> None:
        """Forget the keys and values."""
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, *args) -> None:
        raise ValueError("an ARMT cache cannot be cropped: what was written to memory stays; generate without drafts")


class ARMTCache(Cache):
    """What generation carries: constant in the length of the text."""

    def __init__(self, config: ARMTConfig, states: list[State]):
        super().__init__(layers=[ARMTCacheLayer(state) for state in states])
        self.tokens = 0
        self.open_tokens = 0

    def count(self, tokens: int) -> None:
        """`tokens` more were read into the open segment."""
        self.tokens += tokens
        self.open_tokens += tokens

    def close(self) -> None:
        """The open segment was written to memory."""
        self.open_tokens = 0
        for layer in self.layers:
            layer.drop_segment()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.tokens

    def reset(self) -> None:
        super().reset()
        self.tokens = self.open_tokens = 0


ARMTConfig.register_for_auto_class()
ARMTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
