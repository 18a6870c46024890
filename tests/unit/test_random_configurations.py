"""Random configurations: the scheduled executor and the cache against the plain forward, in float64.

Each number draws a family, a memory with its options, lengths, padding, documents and a schedule, so that combinations
that nobody thought of are compared as well.
"""

from random import Random

import pytest
import torch
from support.float64 import in_float64
from support.models import small_model
from support.oracle import GRID, oracle, random_batch, random_starts, scheduled_loss

from armt_dist.model.backbone import FAMILIES
from armt_dist.model.modeling_armt import ARMTCache
from armt_dist.model.segment_rows import segment_lengths
from armt_dist.schedule.kept_cells import Keep

QUICK, ALL, PART = 20, 320, 20
LOSS, GRADIENT, LOGITS = 1e-11, 1e-7, 1e-9


def draw_model(random):
    """Draw a family and options of ARMTConfig that fit together."""
    family = random.choice(list(FAMILIES))
    options = {"segment_tokens": random.choice([3, 5, 8]), "num_mem_tokens": random.randint(1, 4)}
    options["segment_alignment"] = random.choice(["left", "left", "right", "center"])
    kind = random.choices(["armt", "rmt", "transformer_xl"], [4, 2, 1])[0]
    if kind == "transformer_xl":
        window = random.choice([None, random.randint(1, options["segment_tokens"])])
        del options["num_mem_tokens"]
        return family, options | {"memory_kind": kind, "sliding_window": window}
    if kind == "rmt":
        options["memory_kind"] = "rmt"
        if family == "gpt2":
            options["wrap_pos"] = random.random() < 0.5
        options["k2"] = random.choice([None, None, 1, 2])
        return family, options | draw_window(random, options["segment_tokens"])
    heads = random.choice([1, 1, 2])
    # With few features z·q comes close to 0, where even float64 loses digits.
    options |= {"n_heads": heads, "d_mem": 8 * heads, "nu": random.choice([1, 3])}
    options |= {"use_denom": random.random() < 0.7, "correction": random.random() < 0.7}
    options |= {"gating": random.random() < 0.3, "sink": random.choice([0, 0, 1, 2])}
    if random.random() < 0.3:
        options["state_decay"] = random.choice([0.5, 0.97, 1.0, "learned"])
    # Features that are not normalised write more than they find, and without a denominator A grows beyond 1e237.
    if heads == 1 and options["use_denom"] and random.random() < 0.2:
        options["maths"] = "paper"
    return family, options | draw_window(random, options["segment_tokens"])


def draw_window(random, segment_tokens):
    """Draw a sliding window, or none."""
    if random.random() < 0.6:
        return {}
    detach = random.random() < 0.3
    if random.random() < 0.3:
        return {"sliding_window": segment_tokens, "detach_window": detach, "window_positions": "restart"}
    return {"sliding_window": random.randint(1, segment_tokens), "detach_window": detach}


def draw_batch(random, config):
    """Draw tokens, labels, a mask where segments can be padded, and sometimes documents."""
    tokens, rows = random.randint(4, 30), random.randint(1, 4)
    pad = random.randint(0, tokens - 2) if config.segment_alignment == "left" and random.random() < 0.5 else 0
    batch = random_batch(tokens=tokens, batch=rows, pad=pad, seed=random.randrange(1000))
    starts = None
    if random.random() < 0.4:
        starts = random_starts(torch.zeros(rows, max(tokens, 9)), random.randrange(1000))[:, :tokens]
    return batch, starts


def draw_schedule(random, config, segments, rows):
    """Draw how the work is ordered, among what the memory and the number of segments allow."""
    chunks = random.randint(1, rows)
    if config.memory_kind == "rmt":
        return {"grid": GRID._replace(chunks=chunks), "schedule_name": random.choice([None, "segment_major"])}
    name = random.choice([None, "wavefront", "layer_major", "segment_major"])
    rounds = random.randint(1, min(segments, 4)) if name in (None, "wavefront") else 1
    return {"grid": GRID._replace(chunks=chunks, rounds=rounds), "schedule_name": name}


def compare(seed):
    """Compare loss, every gradient and the cached logits of one configuration."""
    random = Random(seed)
    family, options = draw_model(random)
    model = small_model(family, seed=seed, base={"max_position_embeddings": 64}, **options).double().eval()
    batch, starts = draw_batch(random, model.config)
    ids = batch[0]
    segments = len(segment_lengths(ids.shape[1], model.config.segment_tokens, model.config.segment_alignment))
    schedule = draw_schedule(random, model.config, segments, len(ids))
    schedule["states"] = random.choice(["store", "rebuild", "recompute"])
    schedule["keep"] = Keep(random.choice([0, 0.4, 1]))
    schedule["grouped"] = random.random() < 0.5
    where = f"seed {seed}: {family} {options}, {list(ids.shape)}, documents {starts is not None}, {schedule}"
    if not (batch[1][:, 1:] >= 0).any() or (starts is not None and not ((batch[1] >= 0) & ~starts)[:, 1:].any()):
        return
    loss, gradients = oracle(model, *batch, starts)
    found, others = scheduled_loss(model, *batch, starts, **schedule)
    assert abs(found - loss) <= LOSS * abs(loss), f"{where}: loss {found} is not {loss}"
    for name, expected in gradients.items():
        # Some gradients are zero but for rounding, of about 1e-16.
        off = (others[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-8)
        assert off <= GRADIENT, f"{where}: d {name} is off by {off:.1e}"
    if model.config.segment_alignment == "left":
        compare_cache(random, model, ids, starts, where)


@torch.no_grad()
def compare_cache(random, model, ids, starts, where):
    """Compare the logits of the text read in random pieces with those of the whole."""
    whole = model(ids, document_starts=starts).logits
    cache, logits, place = ARMTCache(model.initial_states(len(ids))), [], 0
    while place < ids.shape[1]:
        end = min(ids.shape[1], place + random.randint(1, 9))
        own = None if starts is None else starts[:, place:end]
        logits.append(model(ids[:, place:end], cache=cache, document_starts=own).logits)
        place = end
    off = (torch.cat(logits, 1) - whole).abs().max()
    assert off <= LOGITS * whole.abs().max(), f"{where}: cached logits are off by {off:.1e}"


@pytest.mark.parametrize("part", [pytest.param(i, marks=[pytest.mark.slow] * (i > 0)) for i in range(ALL // PART)])
def test_random_configurations(part):
    assert PART == QUICK, "the first part is the quick one"
    with in_float64():
        for seed in range(part * PART, (part + 1) * PART):
            compare(seed)
