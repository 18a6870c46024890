"""Other memories than the plain one.

The sliding window against the base model with a banded mask; RMT, and the segment-major order that it needs.
"""

import pytest
import torch
from support.golden import (
    CASES,
    GOLDEN,
    TOLERANCES,
    assert_close,
    assert_gradients,
    golden_gradients,
    load_case,
    load_model,
)
from support.models import small_model
from support.oracle import GRID, oracle, random_batch, scheduled_loss
from support.window_oracle import assert_equals_oracle, unwrapped

from armt_dist import reference
from armt_dist.config import ConfigError
from armt_dist.model.memory import AssociativeMemory, State, Update
from armt_dist.model.modeling_armt import ARMTForCausalLM
from armt_dist.runtime.executor import check_memory
from armt_dist.runtime.sections import ParallelConfig
from armt_dist.schedule.program import default_schedule

SEGMENT = 8

# --- associative memory -------------------------------------------------------------------------------------------


def test_the_memory_computes_in_float32_under_autocast():
    """The products with A and z, forward and backward, are those without autocast, bit for bit."""
    model = small_model().eval()
    layer, state = model.layers[0].memory, model.initial_states(2)[0]
    results = []
    for autocast in (False, True):
        torch.manual_seed(3)
        # Projections that both ways round alike: only the memory's own arithmetic is compared.
        m = torch.randn(2, 3, 32).bfloat16().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            q = layer.features(m[..., :4])
            update = Update(q, m.unflatten(-1, (1, -1)).transpose(1, 2), layer.gamma(q, state))
            written = update.onto(state)
            read = layer.read(m, written) - m
        # Outside of autocast, as torch recommends.
        written.A.square().sum().backward()
        results.append((written, m.grad))
        assert written.A.dtype == written.z.dtype == torch.float32, f"autocast={autocast}"
        assert read.any(), "nothing was read"
    for name, plain, other in zip(State._fields, *(written for written, _ in results), strict=True):
        assert torch.equal(plain, other), f"{name} differs under autocast"
    assert torch.equal(results[0][1], results[1][1]), "the gradient differs under autocast"


# --- sliding window -----------------------------------------------------------------------------------------------


def banded(tokens, window):
    """Additive mask [1, 1, N, N]: all of the own segment up to the query, and `window` tokens back beyond it."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    near = (query // SEGMENT == key // SEGMENT) | (query - key <= window)
    near &= query // SEGMENT - key // SEGMENT <= 1
    return torch.zeros(tokens, tokens).masked_fill(~(near & (key <= query)), torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("window", [1, 5, SEGMENT])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@torch.no_grad()
def test_without_memory_it_is_the_base_model_with_a_band(family, window):
    """Real tokens do not see memory rows, so an empty memory leaves attention alone: at its right distances."""
    model, plain = (small_model(family, sliding_window=w).eval() for w in (window, None))
    for layer in [*model.backbone.layers, *plain.backbone.layers]:
        layer.memory.W_mv.weight.zero_()
    ids = random_batch(tokens=29)[0]
    logits = model(ids).logits
    assert_close(
        "logits", logits, unwrapped(model)(ids, attention_mask=banded(29, window)).logits, TOLERANCES["logits"]
    )
    differs = (plain(ids).logits - logits).abs().amax((0, 2)) > 10 * TOLERANCES["logits"]
    assert differs.tolist() == [t >= SEGMENT for t in range(29)]


def test_a_detached_window_changes_gradients_alone():
    batch = random_batch()
    (loss, gradients), (same, detached) = (
        oracle(small_model(sliding_window=5, detach_window=detach).eval(), *batch) for detach in (False, True)
    )
    assert loss == same
    name = "base.model.layers.0.layer.self_attn.k_proj.weight"
    assert (gradients[name] - detached[name]).abs().max() > 0.01 * gradients[name].abs().max()


def test_flash_attention_has_no_mask_for_a_window():
    config = small_model(sliding_window=5).config
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation=flash_attention_2: takes no mask"):
        ARMTForCausalLM(config)


# --- segment-major order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", ["store", "rebuild", "recompute"])
@pytest.mark.parametrize(
    "name", ["armt_v2_llama_nocorr_ragged_nfs", "armt_v2_llama_pad_ignore", "armt_sw_llama_sink_nfs"]
)
def test_segment_major_gives_the_same_gradients(name, states):
    assert name in CASES
    case, model = load_case(name), load_model(name).eval()
    batch = case.io["input_ids"], case.labels, case.io["attention_mask"]
    loss, gradients = scheduled_loss(model, *batch, states=states, schedule_name="segment_major")
    assert_close("loss", loss, case.io["loss"][0], TOLERANCES["loss"])
    assert_gradients(gradients, golden_gradients(case))


BAD_LAYOUTS = {
    "parallel.sp=2: memory_kind=rmt": dict(sp=2),
    "rounds=2: schedule=segment_major": dict(rounds=2),
    "schedule=layer_major: forbidden": dict(schedule="layer_major"),
    "schedule=wavefront: forbidden": dict(schedule="wavefront"),
}


@pytest.mark.parametrize("message", BAD_LAYOUTS)
def test_what_rmt_forbids_is_named(message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        check_memory(ParallelConfig(**BAD_LAYOUTS[message]), "rmt")
    assert "\n" not in str(error.value)


def test_what_is_allowed():
    check_memory(ParallelConfig(), "rmt")
    check_memory(ParallelConfig(schedule="segment_major", chunks=2), "rmt")
    for layout in (dict(sp=4, rounds=2), dict(schedule="layer_major"), dict(schedule="segment_major")):
        check_memory(ParallelConfig(**layout), "armt")
    assert default_schedule(AssociativeMemory.arrows) == "wavefront"


# --- RMT ----------------------------------------------------------------------------------------------------------


CHUNKS = GRID._replace(chunks=2)
RMT_WINDOWS = {
    "llama": dict(sliding_window=SEGMENT),
    "short": dict(sliding_window=3),
    "detached": dict(family="gpt_neox", sliding_window=5, detach_window=True),
    "gpt2": dict(family="gpt2", sliding_window=5),
    "qwen3": dict(family="qwen3", sliding_window=SEGMENT),
}


@pytest.mark.parametrize("path", ["oracle", "scheduled"])
@pytest.mark.parametrize("k2", [None, 1, 2, 3])
def test_gradients_stop_after_k2_segments(path, k2):
    """Scored is the last of 6 segments alone, each of its own token: which tokens' embeddings have a gradient?"""
    model = small_model(memory_kind="rmt", k2=k2, base=dict(tie_word_embeddings=False)).eval()
    ids = torch.arange(6).repeat_interleave(SEGMENT)[None]
    labels = ids.masked_fill(torch.arange(ids.shape[1]) <= 5 * SEGMENT, -100)
    gradients = oracle(model, ids, labels, None)[1] if path == "oracle" else scheduled_loss(model, ids, labels, None)[1]
    reached = gradients["base.model.embed_tokens.weight"][:6].abs().sum(1) > 0
    # Memory is cut off where it enters segments k2, 2 k2, ...
    start = 5 // k2 * k2 if k2 else 0
    assert reached.tolist() == [s >= start for s in range(6)]
    assert bool(gradients["memory_tokens.weight"].any()) == (start == 0)


@pytest.mark.parametrize("pad", [0, 11], ids=["whole", "padded"])
@pytest.mark.parametrize("options", RMT_WINDOWS.values(), ids=RMT_WINDOWS)
def test_rmt_with_a_window_is_the_oracle(options, pad):
    """Segment by segment through Hugging Face's model, with its cache of the tokens before."""
    model, batch = small_model(memory_kind="rmt", **options).eval(), random_batch(pad=pad)
    ways = {how: scheduled_loss(model, *batch, grid=CHUNKS, states=how) for how in ("store", "rebuild", "recompute")}
    assert_equals_oracle(model, batch, {"plain": oracle(model, *batch), **ways})


@torch.no_grad()
def test_wrapped_positions_are_those_of_the_authors():
    """M rows before the base model's table for the memory in front, M behind it for the memory at the end."""
    folder, rows = GOLDEN / "rmt_gpt2_base", 4
    options, tensors = reference.read_checkpoint(folder / "config.json", folder / "weights.safetensors")
    torch.manual_seed(0)
    table = tensors["memory_cell.model.transformer.wpe.weight"]
    extra = torch.randn(2 * rows, table.shape[1])
    tensors["memory_cell.model.transformer.wpe.weight"] = wrapped = torch.cat([extra[:rows], table, extra[rows:]])
    model = reference.load_model(reference.convert_config({**options, "wrap_pos": True}), tensors).eval()
    ids = random_batch(tokens=41, pad=0)[0]
    base, memory, logits = unwrapped(model), model.memory_tokens.weight.expand(len(ids), -1, -1), []
    for segment in ids.split(16, 1):
        x = torch.cat([memory, base.transformer.wte(segment), memory], 1)
        places = [*range(rows + segment.shape[1]), *range(len(wrapped) - rows, len(wrapped))]
        hidden = base.transformer(inputs_embeds=x, position_ids=torch.tensor([places])).last_hidden_state
        memory = hidden[:, -rows:]
        logits.append(base.lm_head(hidden[:, rows:-rows]))
    assert_close("logits", model(ids).logits, torch.cat(logits, 1), TOLERANCES["logits"])


@torch.no_grad()
def test_memory_passes_on_and_can_be_emptied():
    """What the first segment said changes the logits of the third; not where the states are emptied between."""
    model = small_model(memory_kind="rmt").eval()
    ids, other = random_batch(tokens=3 * SEGMENT)[0], random_batch(tokens=3 * SEGMENT, seed=2)[0]
    other[:, SEGMENT:] = ids[:, SEGMENT:]
    for emptied in (False, True):
        last = []
        for tokens in (ids, other):
            states = model.initial_states(len(tokens))
            for segment in tokens.split(SEGMENT, 1):
                hidden, states = model.segment(segment, states)
                states = model.initial_states(len(tokens)) if emptied else states
            last.append(hidden)
        assert torch.equal(*last) == emptied
