"""`generate()` in constant memory: keys and values of the open segment, memory of the closed ones.

Shapes: B batch, N tokens, D model width, n rows of the open segment that are read now.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from .backbone import Context, causal_mask
from .cache import CACHE_NAMES, ARMTCache
from .configuration_armt import ARMTConfig
from .documents import apart, documents_of, groups
from .memory_kind import apply
from .rmt import MemoryRows
from .segment_rows import SegmentRows
from .tested import INSTALLED, TESTED

# What `generate` of this version of transformers calls the cache.
NAMED_BY_GENERATE = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = next((name for name in CACHE_NAMES if name in NAMED_BY_GENERATE), CACHE_NAMES[0])
# The self-check: tokens of a segment, of the prompt and of what is generated, which together cross two borders.
CHECK_SEGMENT, CHECK_PROMPT, CHECK_NEW = 3, 2, 6
# The largest norm of the difference, relative to that of the logits, by dtype. A cache that is not passed on changes
# the logits by about their own size.
CHECK_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
CHECK_TOLERANCE_16_BITS = 0.1


def check_others(others: dict, tokens: int, before: int, attention_mask: Tensor | None) -> None:
    """Raise for keywords of `forward` that would have no effect: TypeError for unknown ones, ValueError for values.

    tokens: of this call; before: already in the cache. Positions start anew in every segment, so `position_ids` may
    only repeat the places of the tokens in the text; at padding they may be anything.
    """
    for name, value in others.items():
        if name in ("position_ids", "cache_position"):
            if value is None:
                continue
            wrong = value != torch.arange(before, before + tokens, device=value.device)
            if attention_mask is not None and name == "position_ids":
                wrong = wrong & attention_mask[:, -tokens:].bool()
            if bool(wrong.any()):
                raise ValueError(f"{name}: ARMT numbers the tokens of every segment itself; leave it out")
        elif name in ("output_attentions", "output_hidden_states"):
            if value:
                raise ValueError(f"{name}={value}: ARMT does not return them; leave it out")
        else:
            raise TypeError(f"ARMTForCausalLM.forward() got an unexpected keyword argument {name!r}")


def check_cacheable(config: ARMTConfig) -> None:
    """Raise ValueError where a cache cannot be right, because where segments begin depends on tokens yet to come."""
    if config.segment_alignment != "left":
        raise ValueError(
            f"use_cache=True: with segment_alignment={config.segment_alignment} every further token shifts the "
            "segments; set use_cache=False"
        )


class ARMTGeneration(SegmentRows, GenerationMixin):
    """The part of `ARMTForCausalLM` that reads a text piece by piece."""

    checked = False
    """Whether `check` has passed."""

    def generate(self, *args: Any, self_check: bool = True, **kwargs: Any) -> Any:
        """Generate as GenerationMixin.generate does. The first call runs `check`, unless `self_check` is false.

        Without a cache where every new token shifts the segments (`segment_alignment` right or center).
        """
        if self_check and not self.checked:
            self.check()
        if self.config.segment_alignment != "left":
            if kwargs.get("use_cache"):
                check_cacheable(self.config)
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)

    def check(self) -> None:
        """Compare logits of `generate`, with its cache, with those of the plain forward, over two segment borders.

        Takes a few milliseconds for a small model: eight random tokens in segments of three. Raises RuntimeError where
        they differ, as another version of transformers may pass the cache in another way.
        """
        config = copy.copy(self.config)
        # The cache fills segments from the left; with another alignment the two differ by design.
        config.segment_tokens, config.segment_alignment = CHECK_SEGMENT, "left"
        if config.sliding_window:
            config.sliding_window = min(config.sliding_window, CHECK_SEGMENT)
        # A view with shorter segments: it shares all modules and parameters.
        short = copy.copy(self)
        short.config, short.checked = config, True
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            short.compare_cached_with_plain()
        finally:
            for module in training:
                module.training = True
        self.checked = True

    @torch.no_grad()
    def compare_cached_with_plain(self) -> None:
        """Raise RuntimeError where greedy generation and the plain forward give different logits."""
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(self.config.vocab_size, (1, CHECK_PROMPT), generator=generator).to(self.device)
        settings = GenerationConfig(
            max_new_tokens=CHECK_NEW, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        )
        found = self.generate(prompt, generation_config=settings, attention_mask=torch.ones_like(prompt))
        cached = torch.cat(found.logits).float()
        # [CHECK_NEW, V]: each new token's logits come from the position before it.
        plain = self(found.sequences[:, :-1]).logits[0, CHECK_PROMPT - 1 :].float()
        error = ((cached - plain).norm() / plain.norm()).item()
        allowed = CHECK_TOLERANCE.get(self.dtype, CHECK_TOLERANCE_16_BITS)
        if not error <= allowed:
            raise RuntimeError(
                f"self-check: logits with and without the cache differ by {error:.2g} of their norm, more than "
                f"{allowed:g}; transformers {INSTALLED} is installed, this code was tested with {TESTED}: install one "
                "of those, or pass self_check=False to generate without this check"
            )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """Put an empty ARMTCache into `model_kwargs`, unless a cache was passed or none is wanted."""
        for name in CACHE_NAMES:
            if name != CACHE_NAME and name in model_kwargs:
                model_kwargs[CACHE_NAME] = model_kwargs.pop(name)
        if not generation_config.use_cache or model_kwargs.get(CACHE_NAME) is not None:
            # transformers types `self` as a class that exists for type checkers only.
            parent: Any = super()
            return parent._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation}: ARMT has a cache of its own, of "
                "constant size; leave it out"
            )
        beams = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs[CACHE_NAME] = ARMTCache(self.initial_states(batch_size * beams))

    def extend(self, input_ids: Tensor, cache: ARMTCache, starts: Tensor | None = None) -> Tensor:
        """Read tokens after those that `cache` has seen. [B, N] -> normed hidden states [B, N, D].

        A full segment is closed only when a token after it arrives, as in `read_segments`. starts [B, N] bool, true
        where a document begins.
        """
        hidden = []
        while input_ids.shape[1]:
            if cache.open_tokens == self.config.segment_tokens:
                self.close_segment(cache)
            room = self.config.segment_tokens - cache.open_tokens
            chunk, input_ids = input_ids.tensor_split([room], dim=1)
            own, starts = (None, None) if starts is None else starts.tensor_split([room], dim=1)
            if own is None and cache.slots[0].starts is not None:
                own = torch.zeros_like(chunk, dtype=torch.bool)
            if own is not None:
                cache.note_starts(own)
            x = self.backbone.embed(chunk)
            if not cache.open_tokens:
                head, _ = self.rows_around(cache.carried.state, len(x), own)
                x = torch.cat([head.to(x.dtype), x], dim=1)
            x = self.pass_layers(x, cache)[:, -chunk.shape[1] :]
            cache.count(chunk.shape[1])
            hidden.append(self.backbone.norm(x))
        return torch.cat(hidden, dim=1)

    def close_segment(self, cache: ARMTCache) -> None:
        """Pass the memory rows over the open segment, update the memory, and drop the segment's keys and values."""
        first = cache.slots[0]
        assert first.keys is not None, "only a segment with tokens is closed"
        _, rows = self.rows_around(cache.carried.state, len(first.keys), first.starts)
        x = self.pass_layers(rows.to(self.get_input_embeddings().get_parameter("weight").dtype), cache, write=True)
        if self.carries_rows:
            cache.carried.state = MemoryRows.of(self.backbone.norm(x), self.config.memory_rows)
        cache.close()

    def pass_layers(self, x: Tensor, cache: ARMTCache, write: bool = False) -> Tensor:
        """Pass the next rows x [B, n, D] of the open segment through all layers; with `write` they are memory rows."""
        config = self.config
        start = config.head_rows + cache.open_tokens if cache.open_tokens else 0
        end = start + x.shape[1]
        tokens = cache.open_tokens if write else end - config.head_rows
        positions = self.position_ids(tokens, x.device)[:, start:end]
        x = self.backbone.place(x, positions)
        keys = torch.ones(1, end, dtype=torch.bool, device=x.device)
        mask = causal_mask(x.shape[1], keys, x.dtype, config.seeing_all if write else 0)
        context = Context(mask, positions, self.backbone.rotary(x, positions))
        if config.sliding_window:
            border = self.border(tokens, x.device)
            context = context._replace(border=border._replace(reach=border.reach[start:end]))
        if cache.slots[0].starts is not None:
            context = self.with_documents(context, cache.slots[0].starts, end)
        for layer, slot in zip(self.layers, cache.slots, strict=True):
            own = context._replace(cache=slot)
            # Without memory tokens, a segment is closed without another row.
            if x.shape[1]:
                x, own = layer.attend(x, slot.state, own)
            if write:
                slot.state = apply(slot.state, layer.write(x, slot.state, own))
        return x

    def with_documents(self, context: Context, starts: Tensor, end: int) -> Context:
        """Return the context of the last rows of an open segment, of which `end` rows exist, with its documents."""
        group = groups(starts, self.config.head_rows, self.config.memory_rows)[:, :end]
        assert context.mask is not None, "a cached pass always has a mask"
        documents = documents_of(group)
        carried = documents.carried[:, end - context.mask.shape[2] :]
        border = context.border
        border = border and border._replace(seen=self.seen_of_last(border.seen.expand(len(group), -1), group))
        mask = apart(context.mask, group)
        return context._replace(mask=mask, border=border, documents=documents._replace(carried=carried))
