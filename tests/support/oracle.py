"""Loss and gradients two ways: by autograd through the plain forward (the oracle), and by the scheduled executor."""

import torch

from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece
from armt_dist.schedule.grid import Grid

# One rank, one block; `scheduled_loss` sets the number of layers.
GRID = Grid(segments=1, layers=1)


def random_batch(tokens=29, batch=4, pad=11, seed=1):
    """Draw token ids, labels and an attention mask; the last row ends in `pad` tokens of padding (0: no mask)."""
    torch.manual_seed(seed)
    ids = torch.randint(0, 50, (batch, tokens))
    mask = torch.ones_like(ids)
    # Long enough for a segment of nothing but padding.
    mask[-1, tokens - pad :] = 0
    return ids, ids.masked_fill(mask == 0, -100), mask if pad else None


def shifted(labels):
    """Shift labels to the predicting position, where the executor expects them."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


def oracle(model, ids, labels, mask):
    """Return mean loss and gradients of the plain forward."""
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def scheduled_loss(model, ids, labels, mask, grid=GRID, schedule_name=None, **options):
    """Return mean loss and gradients of the scheduled executor; `options` are those of ScheduledLM."""
    runner = ScheduledLM(model, **options)
    grid = grid._replace(layers=model.config.num_hidden_layers)
    totals = runner(cut_piece(ids, shifted(labels), mask, model.config, grid, schedule_name=schedule_name))
    loss = totals.nll / totals.scored
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients
