"""Every row of FAMILIES and of MEMORIES: a new one is tested here without this file being edited.

The base model as Hugging Face runs it is the reference of the forward, the plain forward that of gradients and of
generation.
"""

import copy
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from support.golden import TOLERANCES, assert_close, assert_gradients
from support.models import BASES, accepted, small_model
from support.oracle import GRID, oracle, random_batch, scheduled_loss
from support.paths import ROOT
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from armt_dist.evaluation.exported import small_twin
from armt_dist.model.backbone import FAMILIES
from armt_dist.model.configuration_armt import MEMORIES, ARMTConfig
from armt_dist.model.memory_kind import LAST_LAYER
from armt_dist.model.modeling_armt import ARMTForCausalLM

MEMORY = dict(segment_tokens=16, num_mem_tokens=3, d_mem=4)
SEGMENT, WINDOW = 8, 5
# The memories that every family is tried with, and the families that every kind is tried with.
OPTIONS = {"armt": {}, "window": dict(sliding_window=WINDOW, sink=1)}
PLACED = ("gpt2", "llama")
# One family with learned and one with rotary positions stand for the others where a kind is tested.
CASES = {(family, name): options for family in FAMILIES for name, options in OPTIONS.items()}
CASES |= {(family, kind): dict(memory_kind=kind) for family in PLACED for kind in MEMORIES}
CASES |= {
    (family, f"{kind}_window"): dict(memory_kind=kind, sliding_window=WINDOW)
    for family in PLACED
    for kind, row in MEMORIES.items()
    if "sliding_window" in row.own_fields and kind != "armt"
}
every_case = pytest.mark.parametrize(
    "family, options", [(family, options) for (family, _), options in CASES.items()], ids=["-".join(c) for c in CASES]
)


# --- a family equals its Hugging Face model ---------------------------------------------------------------------------


def plain_model(family, attention="sdpa"):
    """The base model alone, with norms and biases that do something."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **BASES[family])
    plain = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in plain.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return plain


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [kind for kind, row in MEMORIES.items() if LAST_LAYER not in row.arrows])
@torch.no_grad()
def test_untrained_memory_changes_nothing(kind, family, attention, padded):
    """One segment: the logits of real tokens are the base model's, to the bit.

    The base model reads arbitrary tokens where the memory rows are: causality makes them invisible, and rows of
    another length would be summed in another order, as those with an empty window are. Memory rows before the tokens
    (RMT) are seen by them.
    """
    plain = plain_model(family, attention)
    options = {"memory_kind": kind, **accepted(kind, **MEMORY)}
    config = ARMTConfig(base_config={"model_type": family, **BASES[family]}, **options)
    config._attn_implementation = attention
    model = ARMTForCausalLM(config, copy.deepcopy(plain)).eval()
    model.reset_memory()
    rows = config.memory_rows
    ids, after = torch.randint(0, 50, (3, 16)), torch.randint(0, 50, (3, rows))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 10:] = mask[2, 4:] = 0
    logits = model(ids, attention_mask=mask).logits
    whole = nn.functional.pad(mask, (0, rows), value=1)
    expected = plain(torch.cat([ids, after], 1), attention_mask=whole).logits[:, :16]
    if config.sliding_window:
        assert_close("logits", logits[mask == 1], expected[mask == 1], TOLERANCES["logits"])
    else:
        assert torch.equal(logits[mask == 1], expected[mask == 1])
    assert model.base.config._attn_implementation == attention


def banded(tokens):
    """Additive mask [1, 1, N, N]: all of the own segment up to the query, and WINDOW tokens back beyond it."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    near = (query // SEGMENT == key // SEGMENT) | (query - key <= WINDOW)
    return torch.zeros(tokens, tokens).masked_fill(~(near & (key <= query)), torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("family", [family for family, row in FAMILIES.items() if row.rotary])
@torch.no_grad()
def test_a_sliding_window_keeps_rotary_distances(family):
    """With a memory that reads nothing the model is the base model with a band: turned keys are at their distances."""
    plain = plain_model(family)
    fields = {"model_type": family, **BASES[family]}
    config = ARMTConfig(base_config=fields, sliding_window=WINDOW, **{**MEMORY, "segment_tokens": SEGMENT})
    model = ARMTForCausalLM(config, copy.deepcopy(plain)).eval()
    model.reset_memory()
    ids = torch.randint(0, 50, (2, 29))
    # A mask with four dimensions is taken as it is, also where the base model has a window.
    assert_close("logits", model(ids).logits, plain(ids, attention_mask=banded(29)).logits, TOLERANCES["logits"])


# --- a memory kind, and both together ---------------------------------------------------------------------------------


@every_case
def test_gradients_are_those_of_the_plain_forward(family, options):
    model, batch = small_model(family, **options).eval(), random_batch()
    loss, gradients = oracle(model, *batch)
    unused = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - set(gradients)
    assert not unused, f"no gradient: {unused}"
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), f"d {name} is not finite"
    for states in ("store", "rebuild", "recompute"):
        fast_loss, fast_gradients = scheduled_loss(model, *batch, grid=GRID._replace(chunks=2), states=states)
        assert_close("loss", fast_loss, loss, TOLERANCES["loss"])
        assert_gradients(fast_gradients, gradients, where=states)


@every_case
@torch.no_grad()
def test_memory_reaches_the_next_segments(family, options):
    """Other tokens in the first segment change the logits of the third; what is zero at the start is random here."""
    model = small_model(family, **options).eval()
    ids, other = (random_batch(tokens=3 * SEGMENT, seed=seed)[0] for seed in (1, 2))
    other[:, SEGMENT:] = ids[:, SEGMENT:]
    one, two = (model(tokens).logits[:, 2 * SEGMENT :] for tokens in (ids, other))
    assert not torch.equal(one, two)


@every_case
def test_the_cache_changes_nothing(family, options):
    """Greedy generation across three borders, and the check that an export runs before it generates."""
    model = small_model(family, **options).eval()
    model.check()
    model.generation_config.eos_token_id = None
    ids = random_batch(tokens=SEGMENT - 1, batch=2, pad=0)[0]
    settings = dict(max_new_tokens=3 * SEGMENT, do_sample=False, pad_token_id=0)
    cached, plain = (model.generate(ids, use_cache=on, **settings) for on in (True, False))
    assert cached.shape == (2, 4 * SEGMENT - 1) and torch.equal(cached, plain)


@every_case
@torch.no_grad()
def test_an_export_loads_with_the_code_that_it_carries(family, options, tmp_path):
    model, ids = small_model(family, **options).eval(), random_batch()[0]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(loaded) is not type(model), "this is not the code in the folder"
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    twin = small_twin(model.config)
    assert (twin.config.base_config.model_type, twin.config.memory_kind) == (family, model.config.memory_kind)
    twin.check()


# --- the recipes of CONTRIBUTING.md -----------------------------------------------------------------------------------


def recipe():
    """The example of a memory kind: file name -> the lines of it that CONTRIBUTING.md shows."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return dict(re.findall(r"```python\n# armt_dist/model/(\w+\.py)\n(.*?)```", text, re.DOTALL))


def test_a_memory_kind_by_its_recipe(tmp_path):
    """Carried out on a copy of the package: the tests above then run for the new kind and pass."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "armt_dist", tmp_path / "armt_dist", ignore=ignored)
    for path in ("tests/support", "tests/golden/armt_v2_llama_base"):
        shutil.copytree(ROOT / path, tmp_path / path, ignore=ignored)
    (tmp_path / "tests/unit").mkdir()
    for path in ("tests/unit/test_families.py", "CONTRIBUTING.md"):
        shutil.copy(ROOT / path, tmp_path / path)
    files = recipe()
    (name,) = files.keys() - {"configuration_armt.py"}
    (tmp_path / "armt_dist/model" / name).write_text(files[name])
    table = tmp_path / "armt_dist/model/configuration_armt.py"
    (kind,) = re.findall(r'^    "(\w+)": MemoryKind', files["configuration_armt.py"], re.MULTILINE)
    import_line, row = (line for line in files["configuration_armt.py"].splitlines() if line.strip("# ."))
    edited = table.read_text().replace("from .memory import", f"{import_line}\nfrom .memory import")
    table.write_text(edited.replace("MEMORIES = {\n", f"MEMORIES = {{\n{row}\n"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", tmp_path]
    command += ["tests/unit/test_families.py", "-k", kind]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}/tests:{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    (passed,) = re.findall(r"(\d+) passed", done.stdout) or ["0"]
    assert done.returncode == 0, done.stdout[-3000:]
    # Of each family 4 against the base model, of two families the other tests.
    assert int(passed) == 4 * len(FAMILIES) + 4 * len(PLACED), done.stdout[-300:]


def test_every_kind_is_listed_by_the_configuration():
    with pytest.raises(ValueError, match=f"memory_kind=lstm: one of {', '.join(MEMORIES)}"):
        ARMTConfig(memory_kind="lstm")


def test_contributing_names_files_that_exist():
    """Paths in backquotes, and the tables that it tells to extend."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = set(re.findall(r"`((?:armt_dist|tests|docs|launch|slurm)/[\w/]+\.\w+)`", text))
    assert paths, "CONTRIBUTING.md names no file"
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert not missing - {f"armt_dist/model/{name}" for name in recipe()}, f"no such files: {missing}"
    for table, path in re.findall(r"`([A-Z]+)` in `(armt_dist/[\w/]+\.py)`", text):
        assert re.search(rf"^{table}\b", (ROOT / path).read_text(), re.MULTILINE), f"{path} has no {table}"
