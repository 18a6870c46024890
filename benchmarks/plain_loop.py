"""The plain loop that speed and memory are measured against, and our step on the same model and batch.

The plain loop is the oracle: `ARMTForCausalLM.forward` segment by segment in one graph, and its backward. Float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from armt_dist.model.configuration_armt import ARMTConfig
from armt_dist.model.modeling_armt import ARMTForCausalLM
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece
from armt_dist.schedule.grid import Grid

Step = Callable[[], torch.Tensor]
"""Loss and backward; returns the loss."""


class Shape(NamedTuple):
    """A model, and what a batch of it holds."""

    base: dict
    memory: dict
    rows: int


# Width 256, 8 layers, segments of 128 tokens; and what launch/configs/default.yaml trains, as one of two ranks has it.
SHAPES = {
    "wide": Shape(
        dict(
            model_type="llama",
            hidden_size=256,
            num_attention_heads=4,
            num_hidden_layers=8,
            intermediate_size=1024,
            vocab_size=1024,
            max_position_embeddings=256,
        ),
        dict(segment_tokens=128, num_mem_tokens=8, d_mem=32),
        1,
    ),
    "quickstart": Shape(
        dict(
            model_type="gpt2",
            n_embd=64,
            n_head=4,
            n_layer=2,
            n_positions=16,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            vocab_size=22,
        ),
        # A pair with its marks.
        dict(segment_tokens=4, num_mem_tokens=4, d_mem=16),
        128,
    ),
}


class Batch(NamedTuple):
    """A model, and sequences for it."""

    model: ARMTForCausalLM
    ids: torch.Tensor  # [B, S * T]

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.ids.numel()

    def plain(self) -> torch.Tensor:
        """A step of the plain loop."""
        loss = self.model(self.ids, labels=self.ids).loss
        loss.backward()
        return loss.detach()

    def scheduled(self, **options: Any) -> Step:
        """Return a step of ours; options: of ScheduledLM."""
        runner = ScheduledLM(self.model, **options)
        labels = torch.cat([self.ids[:, 1:], torch.full_like(self.ids[:, :1], -100)], dim=1)
        piece = cut_piece(self.ids, labels, None, self.model.config, Grid(1, self.model.config.num_hidden_layers))

        def step() -> torch.Tensor:
            totals = runner(piece)
            loss = totals.nll / totals.scored
            loss.backward()
            return loss.detach()

        return step


def make_batch(shape: Shape, segments: int) -> Batch:
    """A model whose memory is in use, as W_mv is not zero, with its gradients allocated; and rows of so many segments.

    Gradients exist beforehand, as they do in training; otherwise they, being made last, would hide what segments cost.
    """
    torch.manual_seed(0)
    model = ARMTForCausalLM(ARMTConfig(base_config=shape.base, **shape.memory))
    for layer in model.layers:
        torch.nn.init.normal_(layer.memory.W_mv.weight, std=0.02)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (shape.rows, segments * model.config.segment_tokens))
    return Batch(model, ids)
