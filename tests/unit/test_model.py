"""The model as its user meets it: imported, loaded with `from_pretrained`, equal to the authors'; its configuration."""

import json
import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from support.float64 import in_float64
from support.golden import (
    CASES,
    GOLDEN,
    TOLERANCES,
    assert_close,
    assert_gradients,
    golden_gradients,
    hf_labels,
    load_case,
    load_model,
    norm_tolerance,
)
from support.models import BASES, small_model
from support.paths import ROOT
from transformers import AutoModelForCausalLM

from armt_dist import reference
from armt_dist.model.configuration_armt import ARMTConfig
from armt_dist.model.fields import ARMTFields
from armt_dist.model.modeling_armt import ARMTForCausalLM, segment_lengths

# --- golden cases -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Case name -> its Hugging Face folder, made once."""

    @cache
    def export(name):
        folder = tmp_path_factory.mktemp(name)
        load_model(name).save_pretrained(folder)
        return folder

    return export


@pytest.fixture(params=CASES)
def golden(request, exported):
    """A golden case and its model, loaded as a user loads it."""
    model = AutoModelForCausalLM.from_pretrained(exported(request.param), trust_remote_code=True)
    return load_case(request.param), model.eval()


def test_golden_loss_logits_gradients(golden):
    case, model = golden
    out = model(case.io["input_ids"], attention_mask=case.io["attention_mask"], labels=case.labels)
    assert_close("loss", out.loss, case.io["loss"][0], TOLERANCES["loss"])
    assert_close("logits", out.logits, case.io["logits"], TOLERANCES["logits"])
    out.loss.backward()
    assert_gradients({name: p.grad for name, p in model.named_parameters()}, golden_gradients(case))


@torch.no_grad()
def test_golden_memory_states(golden):
    case, model = golden
    ids, mask = case.io["input_ids"], case.io["attention_mask"]
    lengths = segment_lengths(ids.shape[1], model.config.segment_tokens, model.config.segment_alignment)
    states = model.initial_states(len(ids))
    compared = set()
    for s, (ids_s, mask_s) in enumerate(zip(ids.split(lengths, 1), mask.split(lengths, 1), strict=True)):
        _, states = model.segment(ids_s, states, mask_s)
        for name, actual in named_states(states):
            where, _, layer = name.partition(".")
            for key in (f"{where}.seg{s}{layer}", *[f"{where}.final{layer}"] * (s == len(lengths) - 1)):
                if key in case.io:
                    assert_close(key, actual, case.io[key].view_as(actual), TOLERANCES["state"], relative=True)
                    compared.add(key)
    assert compared == {key for key in case.io if key.startswith(("W_mem", "z.", "memory_state"))}


def named_states(states):
    """(the golden files' name without the segment, tensor) of everything that they hold."""
    *states, carried = states
    if carried:
        yield "memory_state", carried.rows
        return
    for layer, state in enumerate(states):
        yield f"W_mem..layer{layer}", state.A
        yield f"z..layer{layer}", state.z


@pytest.mark.parametrize("name", CASES)
def test_values_are_carried_over(name, exported):
    """Bit for bit; the names are spelled out here, not taken from the importer."""
    loaded = AutoModelForCausalLM.from_pretrained(exported(name), trust_remote_code=True).state_dict()
    theirs = load_file(GOLDEN / name / "weights.safetensors")
    compared = set()
    for key, tensor in theirs.items():
        if key in ("memory_cell.memory", "memory_cell.sink"):
            ours = {"memory": "memory_tokens.weight", "sink": "memory_tokens.sink"}[key.rpartition(".")[2]]
        elif key.startswith("memory_cell.layers."):
            # the same tensors, listed twice
            continue
        else:
            ours = key.replace("memory_cell.model.", "base.").replace("embed_out", "lm_head")
            ours = re.sub(r"\.(W_m[qkvb])\.", r".memory.\1.", ours)
            if name.startswith("rmt"):
                ours = re.sub(r"(\.h\.\d+)\.", r"\1.layer.", ours)
        assert loaded[ours].dtype == tensor.dtype and torch.equal(loaded[ours], tensor), ours
        compared.add(ours)
    assert compared == set(loaded)


# Of float64 losses, on any CPU.
EXACT_LOSS = 1e-5


def run_trajectory(model, options, batches):
    """Six steps of AdamW with clipping, a new batch each: (loss, gradient norm) of each step."""
    names = ("lr", "betas", "eps", "weight_decay")
    optimizer = torch.optim.AdamW(model.parameters(), **{name: options[name] for name in names})
    steps = []
    for step in range(len(options["losses"])):
        io = {name: batches[f"step{step}.{name}"] for name in ("input_ids", "attention_mask", "labels", "labels_mask")}
        loss = model(io["input_ids"], attention_mask=io["attention_mask"], labels=hf_labels(io)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip_grad_norm"])
        steps.append((loss.detach(), norm))
        optimizer.step()
        optimizer.zero_grad()
    return steps


@pytest.fixture
def trajectory():
    """The model before the first step, the options and the batches of the golden AdamW trajectory."""
    folder = GOLDEN / "armt_v2_llama_trajectory"
    options = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "weights_initial.safetensors")
    model = reference.load_model(reference.convert_config(options), weights).eval()
    return model, options, load_file(folder / "batches.safetensors")


def test_golden_trajectory(trajectory):
    model, options, _ = trajectory
    for step, (loss, norm) in enumerate(run_trajectory(*trajectory)):
        expected = torch.tensor(options["losses"][step])
        assert_close(f"loss of step {step}", loss, expected, TOLERANCES["trajectory_loss"])
        expected = torch.tensor(options["grad_norms_before_clip"][step])
        assert_close(f"gradient norm of step {step}", norm, expected, norm_tolerance(step), relative=True)
    actual, last = model.state_dict(), load_file(GOLDEN / "armt_v2_llama_trajectory" / "weights_final.safetensors")
    for name, expected in reference.convert_weights(last).items():
        assert_close(name, actual[name], expected, TOLERANCES["weights"], relative=True)


def test_golden_trajectory_in_float64(trajectory):
    model, options, batches = trajectory
    with in_float64():
        steps = run_trajectory(model.double(), options, batches)
    for step, (loss, _) in enumerate(steps):
        expected = torch.tensor(options["losses_fp64"][step], dtype=torch.float64)
        assert loss.dtype == torch.float64, "something still computes in float32"
        assert_close(f"loss of step {step}", loss, expected, EXACT_LOSS)


# --- the exported folder ------------------------------------------------------------------------------------------

STRANGER = """
import sys
# Even where the package is installed.
sys.modules["armt_dist"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert not [name for name in sys.modules if name.startswith("armt_dist.")]
assert model.get_input_embeddings().weight is model.get_output_embeddings().weight, "the tie is lost"
torch.save(model(torch.arange(40)[None]).logits, sys.argv[2])
"""


@pytest.mark.parametrize("name", ["armt_v2_llama_base", "armt_sw_llama_sink_nfs", "rmt_gpt2_base"])
def test_the_command_writes_a_folder_that_loads_without_this_package(name, tmp_path):
    case, folder, elsewhere = GOLDEN / name, tmp_path / "model", tmp_path / "elsewhere"
    command = [sys.executable, "-m", "armt_dist.reference", "--config", case / "config.json"]
    command += ["--weights", case / "weights.safetensors", "--out", folder]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    elsewhere.mkdir()
    logits = tmp_path / "logits.pt"
    # All of it, as what torch is told of the CPU changes bits.
    environment = {**os.environ, "HF_HOME": str(elsewhere), "HF_HUB_OFFLINE": "1"}
    # Sums come out bit for bit the same by as many threads only.
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    subprocess.run([sys.executable, "-I", "-c", STRANGER, folder, logits], check=True, cwd=elsewhere, env=environment)
    expected = load_model(name).eval()(torch.arange(40)[None]).logits
    assert torch.equal(torch.load(logits), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_with_more_tokens_is_saved_and_loaded(family, tmp_path):
    model = small_model(family).eval()
    model.resize_token_embeddings(57)
    model.save_pretrained(tmp_path)
    loaded = ARMTForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(57)[None]
    assert loaded.config.vocab_size == loaded.config.base.vocab_size == 57
    assert_close("logits", loaded(ids).logits, model(ids).logits, TOLERANCES["logits"])


def test_the_configuration_names_no_limit_of_length(tmp_path):
    """Not the base model's position table, which holds one segment."""
    small_model("gpt2").save_pretrained(tmp_path)
    config = ARMTConfig.from_pretrained(tmp_path)
    assert (config.max_position_embeddings, config.base_config.n_positions) == (2**31 - 1, 64)


# --- bad configurations -------------------------------------------------------------------------------------------

MEMORY = dict(segment_tokens=16, num_mem_tokens=3, d_mem=4)
XL = dict(memory_kind="transformer_xl", num_mem_tokens=None, d_mem=64)

BAD_CONFIGS = {
    "segment_tokens=0": dict(segment_tokens=0),
    "segment_tokens='8'": dict(segment_tokens="8"),
    "num_mem_tokens=2.5": dict(num_mem_tokens=2.5),
    "n_heads=True": dict(n_heads=True),
    "correction='no'": dict(correction="no"),
    "d_mem=-4": dict(d_mem=-4),
    "nu=0": dict(nu=0),
    "memory_kind=lstm": dict(memory_kind="lstm"),
    "maths=new": dict(maths="new"),
    "segment_alignment=middle": dict(segment_alignment="middle"),
    "n_heads=3 does not divide d_mem=4": dict(n_heads=3),
    "n_heads=2: maths=paper": dict(n_heads=2, maths="paper"),
    "wrap_pos=true": dict(wrap_pos=True),
    "segment_tokens=62 + num_mem_tokens=3": dict(base="gpt2", segment_tokens=62),
    "base_config='gpt2'": dict(base_config="gpt2"),
    "base_config.model_type=bert": dict(base_config=dict(model_type="bert")),
    "base_config.model_type=None": dict(base_config={}),
    "base_config: Validation error for field 'hidden_size'": dict(hidden_size="wide"),
    "base_config.vocab_size=0": dict(vocab_size=0),
    "base_config.num_hidden_layers=0": dict(num_hidden_layers=0),
    "base_config.num_attention_heads=5": dict(base="gpt2", n_head=5),
    "base_config.num_key_value_heads=3": dict(num_key_value_heads=3),
    "base_config.num_key_value_heads=0": dict(num_key_value_heads=0),
    "base_config.hidden_act=swoosh": dict(hidden_act="swoosh"),
    "base_config.sliding_window=18": dict(base="mistral", base_fields=dict(sliding_window=18)),
    "base_config.sliding_window=8": dict(
        base="qwen3", base_fields=dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    ),
    "state_decay=0.0: above 0 and at most 1, or learned": dict(state_decay=0.0),
    "state_decay=1.5: above 0 and at most 1, or learned": dict(state_decay=1.5),
    "state_decay=nan: above 0 and at most 1, or learned": dict(state_decay=float("nan")),
    "state_decay=slow: above 0 and at most 1, or learned": dict(state_decay="slow"),
    "state_decay=True: must be of type float": dict(state_decay=True),
    "state_decay=0.9: means nothing to memory_kind=rmt": dict(memory_kind="rmt", state_decay=0.9),
    "sink=True": dict(sink=True),
    "sink=-1": dict(sink=-1),
    "sliding_window=0": dict(sliding_window=0),
    "sliding_window='all'": dict(sliding_window="all"),
    "sliding_window=17: only the segment before": dict(sliding_window=17),
    "window_positions=absolute": dict(window_positions="absolute"),
    "window_positions=restart: needs": dict(sliding_window=15, window_positions="restart"),
    "sliding_window=17: only the segment before is": dict(memory_kind="rmt", sliding_window=17),
    "sink=1: means nothing to memory_kind=rmt": dict(memory_kind="rmt", sink=1),
    "k2=2: means nothing to memory_kind=armt": dict(k2=2),
    "k2=0": dict(memory_kind="rmt", k2=0),
    "num_mem_tokens=0: memory_kind=rmt writes": dict(memory_kind="rmt", num_mem_tokens=0),
    "num_mem_tokens=-1": dict(num_mem_tokens=-1),
    "num_mem_tokens=3: memory_kind=transformer_xl has no": dict(memory_kind="transformer_xl", d_mem=64),
    "d_mem=4: means nothing to memory_kind=transformer_xl": dict(memory_kind="transformer_xl", num_mem_tokens=0),
    "use_denom=False: means nothing to memory_kind=transformer_xl": dict(**XL, use_denom=False),
    "sink=1: means nothing to memory_kind=transformer_xl": dict(**XL, sink=1),
    "detach_window=True: means nothing to memory_kind=transformer_xl": dict(**XL, detach_window=True),
    "k2=2: means nothing to memory_kind=transformer_xl": dict(**XL, k2=2),
    "sliding_window=17: only the segment before is kept": dict(**XL, sliding_window=17),
    "segment_tokens=60 + 2 x num_mem_tokens=6 = 66": dict(base="gpt2", memory_kind="rmt", segment_tokens=60),
    "segment_tokens=60 + sink=2 + num_mem_tokens=3 = 65": dict(base="gpt2", sink=2, segment_tokens=60),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_a_bad_configuration_is_named(message):
    fields = dict(BAD_CONFIGS[message])
    family, base_fields = fields.pop("base", "llama"), fields.pop("base_fields", {})
    ours = {name: fields.pop(name) for name in list(fields) if name in {"base_config", *ARMTFields.__annotations__}}
    base = {"model_type": family, **BASES[family], **fields, **base_fields}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        ARMTConfig(**{"base_config": base, **MEMORY, **ours})
    assert "\n" not in str(error.value)


def test_windows_that_are_off_are_accepted():
    windows = {"mistral": dict(sliding_window=None), "qwen2": dict(sliding_window=8)}
    windows["qwen3"] = dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    for family, window in windows.items():
        ARMTConfig(base_config={"model_type": family, **BASES[family], **window}, **MEMORY)


def test_a_map_of_several_devices_is_refused(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    assert ARMTForCausalLM.from_pretrained(tmp_path / "model", device_map={"": "cpu"}).device.type == "cpu"
    parts = (
        "memory_tokens",
        "base.lm_head",
        *(f"base.model.{name}" for name in ("embed_tokens", "norm", "rotary_emb")),
    )
    spread = dict.fromkeys((*parts, "base.model.layers.0"), "cpu") | {"base.model.layers.1": "disk"}
    with pytest.raises(ValueError, match="puts layers on cpu, disk, but an ARMT's memory"):
        ARMTForCausalLM.from_pretrained(tmp_path / "model", device_map=spread, offload_folder=tmp_path / "offload")
