"""`generate()` across segment borders: with the cache as without it, in constant memory."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from support.golden import TOLERANCES, assert_close
from support.models import small_model
from transformers import DynamicCache, GenerationMixin, TextStreamer, Trainer, TrainingArguments

from armt_dist.model import generation, tested
from armt_dist.model.generation import CACHE_NAME
from armt_dist.model.modeling_armt import ARMTCache

SEGMENT = 8
FAMILIES = {
    "gpt2": dict(family="gpt2"),
    "gpt2_wrapped": dict(family="gpt2", wrap_pos=True),
    "gpt_neox": dict(family="gpt_neox"),
    "llama": dict(family="llama"),
    "heads_gating": dict(family="llama", n_heads=2, gating=True),
    "decay": dict(family="llama", state_decay=0.8),
    "decay_learned_window": dict(family="gpt2", state_decay="learned", sliding_window=5),
    "window": dict(family="llama", sliding_window=5),
    "window_sink": dict(family="gpt_neox", sliding_window=SEGMENT, sink=2),
    "window_restart": dict(family="llama", sliding_window=SEGMENT, sink=1, window_positions="restart"),
    "window_gpt2": dict(family="gpt2", sliding_window=3, sink=1),
    "sink": dict(family="llama", sink=1),
    "rmt": dict(family="llama", memory_kind="rmt"),
    "rmt_gpt2": dict(family="gpt2", memory_kind="rmt"),
    "rmt_gpt2_wrapped": dict(family="gpt2", memory_kind="rmt", wrap_pos=True),
    "rmt_window": dict(family="llama", memory_kind="rmt", sliding_window=5),
    "rmt_window_gpt2": dict(family="gpt2", memory_kind="rmt", sliding_window=SEGMENT, wrap_pos=True),
    "transformer_xl": dict(family="llama", memory_kind="transformer_xl"),
    "transformer_xl_gpt2": dict(family="gpt2", memory_kind="transformer_xl", sliding_window=3),
}
WAYS = {
    "greedy": dict(do_sample=False),
    "beams": dict(do_sample=False, num_beams=3),
    "returned beams": dict(do_sample=False, num_beams=3, num_return_sequences=2),
    "returned samples": dict(do_sample=True, num_return_sequences=3),
}


def prompt(tokens, batch=2):
    torch.manual_seed(1)
    # 0 is kept as the padding
    return torch.randint(1, 50, (batch, tokens))


def generate(model, ids, **options):
    """Without an end token: every sequence is as long as asked for."""
    torch.manual_seed(2)
    model.generation_config.eos_token_id = None
    return model.generate(ids, pad_token_id=0, **options)


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, id=name, marks=[pytest.mark.slow] * name.startswith("returned")) for name, way in WAYS.items()],
)
@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_cache_changes_nothing(options, way):
    """Prompts that end before, at and after a border; three borders to cross."""
    model = small_model(**options).eval()
    for tokens in (SEGMENT - 1, SEGMENT, SEGMENT + 1):
        ids = prompt(tokens)
        cached, plain = (generate(model, ids, max_new_tokens=3 * SEGMENT, use_cache=on, **way) for on in (True, False))
        assert cached.shape == (2 * way.get("num_return_sequences", 1), tokens + 3 * SEGMENT)
        assert torch.equal(cached, plain)


@torch.no_grad()
@pytest.mark.parametrize("way", [WAYS["greedy"], WAYS["beams"]], ids=["greedy", "beams"])
@pytest.mark.parametrize("alignment", ["right", "center"])
def test_without_a_cache_where_every_token_shifts_the_segments(alignment, way):
    model, ids = small_model(segment_alignment=alignment).eval(), prompt(SEGMENT + 3)
    found = generate(model, ids, max_new_tokens=2 * SEGMENT, return_dict_in_generate=True, output_logits=True, **way)
    if way is WAYS["greedy"]:
        for new, logits in enumerate(found.logits):
            whole = model(found.sequences[:, : ids.shape[1] + new]).logits[:, -1]
            assert_close("logits", logits, whole, TOLERANCES["logits"])
    for refused in (lambda: generate(model, ids, max_new_tokens=2, use_cache=True), lambda: model(ids, use_cache=True)):
        with pytest.raises(ValueError, match=f"use_cache=True: with segment_alignment={alignment}"):
            refused()


@torch.no_grad()
@pytest.mark.parametrize("alignment", ["left", "right", "center"])
def test_a_row_does_not_depend_on_how_far_its_batch_is_padded(alignment):
    model, ids = small_model(segment_alignment=alignment).eval(), prompt(29)
    alone = model(ids[:1, :13]).logits
    for tokens in (16, 21, 29):
        mask = torch.ones(2, tokens, dtype=torch.int64)
        mask[0, 13:] = 0
        together = model(ids[:, :tokens], attention_mask=mask).logits[:1, :13]
        assert_close("logits", together, alone, TOLERANCES["logits"])


@torch.no_grad()
@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_prefill_in_pieces(options):
    """Any cut of the text gives the logits of the whole, within and across borders."""
    model, ids = small_model(**options).eval(), prompt(37)
    whole = model(ids).logits
    for pieces in ([37], [1] * 37, [8, 8, 8, 8, 5], [3, 10, 1, 22, 1]):
        cache = ARMTCache(model.initial_states(len(ids)))
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(pieces, 1)]
        assert_close("logits", torch.cat(parts, 1), whole, TOLERANCES["logits"])
        assert cache.get_seq_length() == 37


def test_generation_from_a_prefilled_cache():
    model, ids = small_model().eval(), prompt(21)
    cache = model(ids[:, :13], use_cache=True).past_key_values
    expected = generate(model, ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(model, ids, max_new_tokens=12, do_sample=False, **{CACHE_NAME: cache}), expected)


def cache_bytes(cache):
    """Of everything that the cache holds, buffers behind views included."""
    tensors = [t for slot in cache.layers for t in (*slot.state, slot.keys, slot.values) if t is not None]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@torch.no_grad()
@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_memory_is_constant(options):
    model, ids = small_model(**options).eval(), prompt(20 * SEGMENT)
    cache, seen = None, []
    for token in ids.split(1, 1):
        cache = model(token, past_key_values=cache, use_cache=True).past_key_values
        seen.append(cache_bytes(cache))
    by_segment = [seen[i : i + SEGMENT] for i in range(0, len(seen), SEGMENT)]
    assert all(sizes == by_segment[0] for sizes in by_segment)


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_a_cache_starts_afresh_after_reset(options):
    model, ids = small_model(**options).eval(), prompt(21)
    with torch.no_grad():
        first = model(ids, use_cache=True)
        cache = first.past_key_values
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache, use_cache=True).logits, first.logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_left_padded_prompt_is_refused(use_cache):
    model, ids = small_model().eval(), prompt(12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="attention_mask: padding on the left"):
        generate(model, ids, attention_mask=mask, max_new_tokens=3, use_cache=use_cache)


def test_a_right_padded_prompt_is_refused():
    model, ids = small_model().eval(), prompt(12)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="attention_mask with padding"):
        generate(model, ids, attention_mask=mask, max_new_tokens=3)


def test_the_cache_cannot_be_cropped():
    """Assisted generation would take tokens back."""
    cache = small_model().eval()(prompt(12), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(5)


# --- nothing is swallowed ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_cache_has_two_names():
    model, ids = small_model().eval(), prompt(21)
    whole = model(ids).logits
    for name in ("cache", "past_key_values"):
        first = model(ids[:, :13], use_cache=True)
        assert name in first and first[name] is first.get(name) is getattr(first, name)
        assert first.keys() == {"logits", "cache"} and len(first.to_tuple()) == 2
        rest = model(ids[:, 13:], use_cache=True, **{name: first[name]}).logits
        assert_close(name, rest, whole[:, 13:], TOLERANCES["logits"])
    with pytest.raises(TypeError, match="two names of one argument"):
        model(ids, cache=first.cache, past_key_values=first.cache)


def test_generate_takes_a_cache_under_both_names():
    model, ids = small_model().eval(), prompt(21)
    expected = generate(model, ids, max_new_tokens=12, do_sample=False)
    for name in ("cache", "past_key_values"):
        cache = model(ids[:, :13], use_cache=True).cache
        # transformers warns whoever passes the old name, since 5.24.
        with pytest.warns(FutureWarning) if name != CACHE_NAME and CACHE_NAME == "cache" else nullcontext():
            found = generate(model, ids, max_new_tokens=12, do_sample=False, **{name: cache})
        assert torch.equal(found, expected), name


def test_another_models_cache_is_refused():
    with pytest.raises(TypeError, match="cache=DynamicCache: expected the ARMTCache"):
        small_model().eval()(prompt(5), cache=DynamicCache())


UNKNOWN = {"inputs_embeds": torch.zeros(2, 12, 32), "token_type_ids": torch.zeros(2, 12), "kv": None}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_keyword_is_named(name):
    model, ids = small_model().eval(), prompt(12)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        model(ids, **{name: UNKNOWN[name]})
    with pytest.raises((TypeError, ValueError), match="nonsense"):
        generate(model, ids, max_new_tokens=2, nonsense=1)


@torch.no_grad()
def test_positions_may_be_passed_but_not_changed():
    model, ids = small_model().eval(), prompt(12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    derived = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    whole = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask, position_ids=derived).logits, whole)
    cache = model(ids[:, :5], use_cache=True).cache
    rest = torch.arange(5, 12)
    model(ids[:, 5:], cache=cache, use_cache=True, position_ids=rest[None], cache_position=rest)
    for name in ("position_ids", "cache_position"):
        with pytest.raises(ValueError, match=f"{name}: ARMT numbers the tokens"):
            model(ids, **{name: torch.arange(12) + 1})


def test_what_is_always_passed_is_honoured():
    model, ids = small_model().eval(), prompt(12)
    plain = model(ids, labels=ids)
    scored = 2 * 11
    doubled = model(ids, labels=ids, num_items_in_batch=2 * scored)
    assert_close("loss", doubled.loss.detach(), plain.loss.detach() / 2, 1e-6)
    loss, logits = model(ids, labels=ids, return_dict=False, output_attentions=False)
    assert torch.equal(loss, plain.loss) and torch.equal(logits, plain.logits)
    with pytest.raises(ValueError, match="output_hidden_states=True: ARMT does not return them"):
        model(ids, output_hidden_states=True)


def test_the_hugging_face_trainer_trains_it(tmp_path):
    """It passes what we do not name ourselves: a changed keyword would be a TypeError here."""
    model, ids = small_model(), prompt(12, batch=4)
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    options = TrainingArguments(tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    Trainer(model, options, train_dataset=data).train()


# --- other ways to generate -------------------------------------------------------------------------------------------


class Words:
    """A tokenizer for `TextStreamer`: ids as numbers."""

    def decode(self, ids, **options):
        return "".join(f"{int(i)} " for i in ids)


def test_streaming(capsys):
    model, ids = small_model().eval(), prompt(SEGMENT, batch=1)
    expected = generate(model, ids, max_new_tokens=12, do_sample=False)
    capsys.readouterr()
    streamer = TextStreamer(Words(), skip_prompt=True)
    generate(model, ids, max_new_tokens=12, do_sample=False, streamer=streamer)
    assert [int(word) for word in capsys.readouterr().out.split()] == expected[0, SEGMENT:].tolist()


def test_assisted_generation_is_refused():
    model = small_model().eval()
    with pytest.raises(ValueError, match="crop"):
        generate(model, prompt(12, batch=1), max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)


def test_a_cache_implementation_is_refused():
    with pytest.raises(ValueError, match="cache_implementation=static: ARMT has a cache of its own"):
        generate(small_model().eval(), prompt(12), max_new_tokens=2, cache_implementation="static")


# --- a transformers that changes --------------------------------------------------------------------------------------


def test_the_check_passes_and_leaves_the_model_as_it_was():
    for options in FAMILIES.values():
        model = small_model(**options).train()
        state = torch.get_rng_state()
        config = model.config.to_dict()
        model.check()
        assert model.training and all(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), state) and model.config.to_dict() == config


def renamed(prepare):
    """What a later version might do: hand the cache to forward under another name."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        inputs["key_value_store"] = inputs.pop(CACHE_NAME)
        return inputs

    return prepare_inputs_for_generation


def test_a_cache_renamed_once_more_fails_loudly(monkeypatch):
    prepare = GenerationMixin.prepare_inputs_for_generation
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", renamed(prepare))
    model = small_model().eval()
    for self_check in (True, False):
        with pytest.raises(TypeError, match="unexpected keyword argument 'key_value_store'"):
            generate(model, prompt(12), max_new_tokens=12, self_check=self_check)


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_the_check_sees_a_lost_cache(options, monkeypatch):
    """The fault of transformers 5.24 before our forward knew its name: every token starts an empty cache."""
    model = small_model(**options).eval()

    def lost(self, input_ids, cache, *others):
        cache.__dict__.update(ARMTCache(self.initial_states(len(input_ids))).__dict__)
        return extend(self, input_ids, cache, *others)

    extend = generation.ARMTGeneration.extend
    monkeypatch.setattr(generation.ARMTGeneration, "extend", lost)
    with pytest.raises(
        RuntimeError, match=rf"transformers {tested.INSTALLED} is installed.*tested with {tested.OLDEST}"
    ):
        generate(model, prompt(12), max_new_tokens=2)
    generate(model, prompt(12), max_new_tokens=2, self_check=False)


def test_a_renamed_parameter_of_a_layer_is_named(monkeypatch):
    """A decoder layer has **kwargs, so it would ignore a name that it no longer has."""
    model = small_model().eval()
    kind = type(model.backbone.layers[0].layer)

    def forward(self, hidden_states, mask=None, position_ids=None, cache=None, position_embeddings=None, **kwargs):
        raise AssertionError("never called")

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(TypeError, match="has no parameter 'attention_mask': it was renamed"):
        model(prompt(5))


@pytest.mark.parametrize("installed, warns", [("5.17.2", True), ("5.18.0", False), ("5.24.9", False), ("5.25.0", True)])
def test_an_untested_version_is_told_at_load(installed, warns, monkeypatch, tmp_path, caplog):
    small_model().save_pretrained(tmp_path)
    monkeypatch.setattr(tested, "INSTALLED", installed)
    said = []
    monkeypatch.setattr(tested.logging.get_logger(tested.__name__), "warning", said.append)
    type(small_model()).from_pretrained(tmp_path)
    assert len(said) == warns and all(f"transformers {installed} is installed" in line for line in said)


QUIET = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(1, 12)[None]
model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
model(ids, labels=ids).loss.backward()
"""


def test_no_warning_reaches_the_terminal(tmp_path):
    """As its user sees it: an exported model, loaded and used in a fresh process."""
    model = small_model()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-c", QUIET, tmp_path / "model"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert not lines, done.stderr
