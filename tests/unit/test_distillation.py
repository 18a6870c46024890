"""Distillation from the base's own full attention, against two plain loops and the base as Hugging Face has it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.golden import TOLERANCES, assert_close, assert_gradients
from support.models import small_model
from support.oracle import GRID, random_batch, random_starts, shifted

from armt_dist.config import ConfigError, validate
from armt_dist.model.configuration_armt import ARMTConfig
from armt_dist.runtime import loss as losses
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece
from armt_dist.runtime.teacher import Teacher, cut_windows, spans
from armt_dist.training.run_config import LossConfig, RunConfig
from armt_dist.training.setup import check_window
from armt_dist.training.train_step import objective
from armt_dist.zero3.adapters import add_adapters, without_adapters
from armt_dist.zero3.sections import LoraSection
from armt_dist.zero3.trained_parameters import freeze_parameters

# Of 29 tokens in segments of 8.
WINDOW = 17
WEIGHT = 0.3
LOSS = validate(LossConfig, {"distill": {"weight": WEIGHT, "window": WINDOW}})
LORA = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
}


def plain_base(model):
    """A copy of the base as a Hugging Face model of its own, in evaluation."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for i, layer in enumerate(model.layers):
        model.backbone.layers[i] = layer.layer
    return model.base


def adapted(family, **options):
    """A model with adapters that are not zero, and the base as it was before."""
    model = small_model(family, **options).eval()
    base = plain_base(model)
    add_adapters(model, validate(LoraSection, {"r": 2, "alpha": 6, "targets": LORA[family]}))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, base


def frozen(family, **options):
    """A model whose memory alone is trained, and its base."""
    model = small_model(family, **options).eval()
    freeze_parameters(model, "base")
    return model, plain_base(model)


def taught_logits(base, ids, window):
    """Logits of the base for each token, one window at a time: that of the token with most behind its first half."""
    overlap = window // 2
    stride = window - overlap
    logits = []
    for t in range(ids.shape[1]):
        start = max(0, (t - overlap) // stride) * stride
        read = ids[:, start : start + window]
        logits.append(base(input_ids=read, use_cache=False).logits[:, t - start])
    return torch.stack(logits, dim=1)


def oracle(model, base, ids, labels, mask):
    """Mean of the objective and the divergence over scored tokens, and all gradients, by plain loops and autograd."""
    target = shifted(labels)
    scored = target >= 0
    log_q = model(ids, attention_mask=mask).logits.log_softmax(-1)[scored]
    log_p = taught_logits(base, ids, WINDOW).log_softmax(-1)[scored]
    nll = F.nll_loss(log_q, target[scored])
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss = (1 - WEIGHT) * nll + WEIGHT * divergence
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), divergence.detach(), gradients


def scheduled(model, ids, labels, mask, grid=GRID, sp_rank=0, **options):
    """The same by the executor."""
    runner = ScheduledLM(model, without_adapters=without_adapters, **options)
    grid = grid._replace(layers=model.config.num_hidden_layers)
    piece = cut_piece(ids, shifted(labels), mask, model.config, grid, sp_rank)
    totals = runner(piece, windows=cut_windows(ids, None, piece, WINDOW))
    loss = objective(totals, LOSS) / totals.scored
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), (totals.divergence / totals.scored).detach(), gradients


OPTIONS = {
    "default": {},
    "window_eager": dict(sliding_window=5, attn_implementation="eager"),
    "right": dict(segment_alignment="right"),
    "rmt": dict(memory_kind="rmt"),
    "transformer_xl": dict(memory_kind="transformer_xl"),
}


# Beside a frozen base, Transformer-XL has nothing that is trained.
CASES = [
    (kind, build) for kind in OPTIONS for build in (frozen, adapted) if (kind, build) != ("transformer_xl", frozen)
]


@pytest.mark.parametrize(("kind", "build"), CASES)
@pytest.mark.parametrize("family", LORA)
def test_equals_the_oracle(family, kind, build, monkeypatch):
    options = OPTIONS[kind]
    # Several chunks, the last one shorter.
    monkeypatch.setattr(losses, "TAUGHT_POSITIONS", 32)
    model, base = build(family, **options)
    batch = random_batch() if model.config.segment_alignment == "left" else random_batch(pad=0)
    loss, divergence, gradients = oracle(model, base, *batch)
    assert divergence > 0.01
    rounds = 1 if kind == "rmt" else 2
    for grid in (GRID._replace(chunks=2), GRID._replace(rounds=rounds)):
        fast_loss, fast_divergence, fast_gradients = scheduled(model, *batch, grid=grid)
        assert_close("loss", fast_loss, loss, TOLERANCES["loss"])
        assert_close("divergence", fast_divergence, divergence, TOLERANCES["loss"])
        assert_gradients(fast_gradients, gradients)


@pytest.mark.parametrize("window", [2, 3, 8, 17, 28, 29, 40])
@pytest.mark.parametrize("tokens", [1, 16, 29])
def test_every_token_is_in_one_window_behind_half_of_it(tokens, window):
    found = {}
    for span, overlap in spans(tokens, window):
        assert len(span) <= window and span.stop <= tokens
        for t in range(span.start + overlap, span.stop):
            assert t not in found
            found[t] = t - span.start
    assert sorted(found) == list(range(tokens))
    assert all(before >= min(t, window // 2) for t, before in found.items())


def test_ranks_read_the_windows_that_their_tokens_need():
    model, base = frozen("llama")
    ids, labels, mask = random_batch(tokens=48, pad=11)
    grid = GRID._replace(layers=2, sp=2, rounds=2)
    expected = taught_logits(base, ids, WINDOW)
    # Two rounds on two ranks: blocks 0 and 2, 1 and 3, of 12 tokens or 8 and 16.
    seen = []
    for rank in range(2):
        piece = cut_piece(ids, shifted(labels), mask, model.config, grid, rank)
        windows = cut_windows(ids, None, piece, WINDOW)
        teacher = Teacher(model, windows, without_adapters)
        for layer in model.layers:
            teacher.advance(layer)
        tokens = [t for block in piece.tokens for t in block]
        seen += tokens
        own = base.lm_head(base.model.norm(teacher.at(piece.labels)))
        torch.testing.assert_close(own, expected[:, tokens][piece.labels >= 0], rtol=1e-4, atol=1e-4)
        assert torch.equal(piece.input_ids, ids[:, tokens])
    assert sorted(seen) == list(range(48))


def test_dropout_and_adapters_stay_with_the_model():
    model, base = adapted("gpt2", base={"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5})
    model.train()
    model.layers[0].layer.attn.eval()
    before = [part.training for part in model.modules()]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    ids, labels, _ = random_batch(pad=0)
    piece = cut_piece(ids, shifted(labels), None, model.config, GRID._replace(layers=2))
    totals = ScheduledLM(model, without_adapters=without_adapters)(piece, windows=cut_windows(ids, None, piece, WINDOW))
    assert totals.divergence > 0
    torch.manual_seed(0)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    teacher = Teacher(model, cut_windows(ids, None, piece, WINDOW), without_adapters)
    for layer in model.layers:
        teacher.advance(layer)
    assert torch.equal(torch.rand(1), drawn), "the teacher draws random numbers"
    own = base.lm_head(base.transformer.ln_f(teacher.at(piece.labels)))
    expected = taught_logits(base, ids, WINDOW)[piece.labels >= 0]
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    assert [part.training for part in model.modules()] == before
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    with torch.no_grad():
        assert not torch.allclose(model.eval()(ids).logits, small_model("gpt2").eval()(ids).logits), "no adapters"


def test_a_piece_without_scored_tokens_has_no_divergence():
    # The first row of a segment is a sink, of which the teacher has none.
    model, _ = frozen("llama", sink=2)
    ids, labels, _ = random_batch(pad=0)
    loss, divergence, gradients = scheduled_sums(model, ids, torch.full_like(labels, -100))
    assert loss == divergence == 0
    assert all(not gradient.any() for gradient in gradients if gradient is not None)


def scheduled_sums(model, ids, labels):
    """Sums instead of means, as nothing may be scored."""
    piece = cut_piece(ids, labels, None, model.config, GRID._replace(layers=2))
    totals = ScheduledLM(model)(piece, windows=cut_windows(ids, None, piece, WINDOW))
    loss = objective(totals, LOSS)
    loss.backward()
    return loss.item(), totals.divergence.item(), [p.grad for p in model.parameters()]


def test_packed_documents_are_refused():
    model, _ = frozen("llama")
    ids, labels, _ = random_batch(pad=0)
    starts = random_starts(ids)
    piece = cut_piece(ids, shifted(labels), None, model.config, GRID, document_starts=starts)
    with pytest.raises(
        ConfigError, match="loss.distill: .*; set data.text.pack=false or data.text.cross_documents=true"
    ):
        cut_windows(ids, starts, piece, WINDOW)


def test_mistakes_are_one_line():
    run = {
        "model": {"base_config": {"model_type": "llama"}, "segment_tokens": 8},
        "loss": {"distill": {"window": 32}},
        "curriculum": [{"pairs": 2, "steps": 1}],
    }
    lora = {**run["model"], "lora": {"targets": ["q_proj"]}}
    with pytest.raises(ConfigError, match="must not change; set train.freeze=base, or model.lora"):
        validate(RunConfig, run)
    with pytest.raises(ConfigError, match="must not change"):
        validate(RunConfig, {**run, "train": {"freeze": ["*.layers.0.*"]}})
    for right in ({"train": {"freeze": "base"}}, {"train": {"freeze": ["base", "*.W_mb.*"]}}, {"model": lora}):
        assert validate(RunConfig, {**run, **right}).loss.distill.weight == 0.5
    carried = {"task": "text", "text": {"files": "x"}, "carry_memory": True}
    with pytest.raises(ConfigError, match="set data.carry_memory=false"):
        validate(RunConfig, {**run, "model": lora, "data": carried})
    for weight in (0, 1.5):
        with pytest.raises(ConfigError, match=f"distill.weight={weight}"):
            validate(LossConfig, {"distill": {"window": 32, "weight": weight}})
    armt = ARMTConfig(base_config={"model_type": "llama", "max_position_embeddings": 64}, segment_tokens=8)
    for window in (15, 65):
        with pytest.raises(ConfigError, match=f"loss.distill.window={window}: must be from 16, two segments, to 64"):
            check_window(window, armt)
    check_window(16, armt)
    check_window(64, armt)
    narrow = ARMTConfig(base_config={"model_type": "mistral", "sliding_window": 32}, segment_tokens=8)
    with pytest.raises(ConfigError, match="to 32, which"):
        check_window(33, narrow)
