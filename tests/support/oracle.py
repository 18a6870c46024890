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


def random_starts(ids, seed=1):
    """Draw where documents begin: about one in ten tokens, one at a border of segments, none in the first row."""
    torch.manual_seed(seed)
    starts = torch.rand(ids.shape) < 0.1
    starts[1:, 8] = True
    starts[0] = False
    return starts


def shifted(labels):
    """Shift labels to the predicting position, where the executor expects them."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


def oracle(model, ids, labels, mask, starts=None):
    """Return mean loss and gradients of the plain forward."""
    loss = model(ids, attention_mask=mask, labels=labels, document_starts=starts).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def scheduled_loss(model, ids, labels, mask, starts=None, grid=GRID, schedule_name=None, **options):
    """Return mean loss and gradients of the scheduled executor; `options` are those of ScheduledLM."""
    runner = ScheduledLM(model, **options)
    grid = grid._replace(layers=model.config.num_hidden_layers)
    if starts is not None:
        labels = labels.masked_fill(starts, -100)
    more = {"schedule_name": schedule_name, "document_starts": starts}
    totals = runner(cut_piece(ids, shifted(labels), mask, model.config, grid, **more))
    loss = totals.nll / totals.scored
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients
