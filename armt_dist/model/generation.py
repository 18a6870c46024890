"""`generate()` in constant memory: keys and values of the open segment, memory of the closed ones.

Shapes: B batch, N tokens, D model width, n rows of the open segment that are read now.
"""

import copy
import inspect

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from .backbone import Context, causal_mask
from .cache import CACHE_NAMES, ARMTCache
from .memory import apply
from .rmt import MemoryRows
from .tested import INSTALLED, TESTED

# What `generate` of this version of transformers calls the cache.
NAMED_BY_GENERATE = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = next((name for name in CACHE_NAMES if name in NAMED_BY_GENERATE), CACHE_NAMES[0])
# The self-check: tokens of a segment and of a text that crosses two borders, and how far the norm of the difference
# may be from that of the logits, by dtype. A cache that is not passed on changes them by their own size.
CHECK_SEGMENT, CHECK_PROMPT, CHECK_NEW = 3, 2, 6
CHECK_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
CHECK_TOLERANCE_16_BITS = 0.1


def check_others(others: dict, tokens: int, before: int, attention_mask: Tensor | None) -> None:
    """Raise for keywords of `forward` that would have no effect: TypeError for unknown ones, ValueError for values.

    tokens: of this call; before: already in the cache. Positions start anew in every segment, so those that are passed
    may only be what they are without: the places of the tokens in the text, anything at padding.
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


class ARMTGenerationMixin(GenerationMixin):
    """The part of `ARMTForCausalLM` that reads a text piece by piece."""

    checked = False

    def generate(self, *args, self_check: bool = True, **kwargs):
        """As GenerationMixin.generate. The first call runs `check`, unless `self_check` is false."""
        if self_check and not self.checked:
            self.check()
        return super().generate(*args, **kwargs)

    def check(self) -> None:
        """Compare logits of `generate`, with its cache, with those of the plain forward, over two segment borders.

        A few milliseconds for a small model: eight random tokens in segments of three, the rest of the model as it is.
        Raises RuntimeError where they differ: another version of transformers may pass the cache in another way.
        """
        config = copy.copy(self.config)
        # Where the short segment comes first the two differ by design: the cache fills segments from the left.
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
        """Raise RuntimeError where greedy generation and the plain forward give other logits."""
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
                f"self-check: with the cache the logits are {error:.2g} times their norm from those without, more than "
                f"{allowed:g}; transformers {INSTALLED} is installed, this code was tested with {TESTED}: install one "
                "of those (self_check=False generates all the same)"
            )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, *args):
        for name in CACHE_NAMES:
            if name != CACHE_NAME and name in model_kwargs:
                model_kwargs[CACHE_NAME] = model_kwargs.pop(name)
        if not generation_config.use_cache or model_kwargs.get(CACHE_NAME) is not None:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, *args
            )
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation}: ARMT has a cache of its own, which is "
                "constant in the length of the text; leave it out"
            )
        beams = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs[CACHE_NAME] = ARMTCache(self.initial_states(batch_size * beams))

    def extend(self, input_ids: Tensor, cache: ARMTCache) -> Tensor:
        """Read tokens after those that `cache` has seen. [B, N] -> normed hidden states [B, N, D].

        A full segment is closed only when a token after it arrives, as in `read_segments`.
        """
        hidden = []
        while input_ids.shape[1]:
            if cache.open_tokens == self.config.segment_tokens:
                self.close_segment(cache)
            chunk, input_ids = input_ids.tensor_split([self.config.segment_tokens - cache.open_tokens], dim=1)
            x = self.backbone.embed(chunk)
            if not cache.open_tokens:
                head, _ = self.rows_around(cache.layers[0].state, len(x))
                x = torch.cat([head.to(x.dtype), x], dim=1)
            x = self.pass_layers(x, cache)[:, -chunk.shape[1] :]
            cache.count(chunk.shape[1])
            hidden.append(self.backbone.norm(x))
        return torch.cat(hidden, dim=1)

    def close_segment(self, cache: ARMTCache) -> None:
        """Let the memory rows read the open segment, write what they found, and forget its keys and values."""
        first = cache.layers[0]
        _, rows = self.rows_around(first.state, len(first.state[0]))
        x = self.pass_layers(rows.to(self.get_input_embeddings().weight.dtype), cache, write=True)
        if self.carries_rows:
            first.state = MemoryRows.of(self.backbone.norm(x), self.config.num_mem_tokens)
        cache.close()

    def pass_layers(self, x: Tensor, cache: ARMTCache, write: bool = False) -> Tensor:
        """The next rows x [B, n, D] of the open segment through all layers; with `write` they are the memory's."""
        config = self.config
        start = config.head_rows + cache.open_tokens if cache.open_tokens else 0
        end = start + x.shape[1]
        tokens = cache.open_tokens if write else end - config.head_rows
        positions = self.position_ids(tokens, x.device)[:, start:end]
        x = self.backbone.place(x, positions)
        keys = torch.ones(1, end, dtype=torch.bool, device=x.device)
        mask = causal_mask(x.shape[1], keys, x.dtype, x.shape[1] if write and config.sliding_window else 0)
        context = Context(mask, positions, self.backbone.rotary(x, positions))
        if config.sliding_window:
            border = self.border(tokens, x.device)
            context = context._replace(border=border._replace(reach=border.reach[start:end]))
        for layer, slot in zip(self.backbone.layers, cache.layers, strict=True):
            own = layer.memory.open(context._replace(cache=slot), slot.state)
            x = layer.call(layer.layer, layer.memory.read(x, slot.state), own)
            if write:
                slot.state = apply(slot.state, layer.memory.write(x, slot.state, own))
        return x
