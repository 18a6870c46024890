"""The planner against the run it plans: parameters by tensor, defaults, batch sizes, the command line, calibration."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from support.commands import run_script
from support.models import BASES, accepted, small_model
from support.operations import Operations
from support.paths import ROOT
from transformers import AutoConfig

from armt_dist.config import ConfigError, load_config
from armt_dist.data.babilong.task import babilong_tokenizer
from armt_dist.data.sections import BabilongConfig
from armt_dist.data.tasks import make_task
from armt_dist.data.tokenizers import byte_tokenizer
from armt_dist.model.backbone import FAMILIES
from armt_dist.model.configuration_armt import ARMTConfig
from armt_dist.model.fields import ARMTFields
from armt_dist.model.modeling_armt import ARMTForCausalLM
from armt_dist.runtime.sections import BPTTConfig, ParallelConfig
from armt_dist.schedule import backbone_sizes, planned_run
from armt_dist.schedule.calibration import NETWORK, calibrated, read_run, with_network
from armt_dist.schedule.hardware import CPU
from armt_dist.schedule.model_sizes import ModelSizes, memory_fields, model_sizes
from armt_dist.schedule.planner import plan
from armt_dist.training.run_config import LossConfig, RunConfig
from armt_dist.zero3.partitioned_model import armt_config, token_fields
from armt_dist.zero3.run_trees import read_trees
from armt_dist.zero3.sections import ModelConfig
from armt_dist.zero3.trained_parameters import freeze_parameters

ZERO3 = ROOT / "ds_configs/zero3_fp32.json"
CONFIGS = sorted((ROOT / "launch/configs").glob("*.yaml"))
MEMORIES = {
    "armt": {},
    "heads and gating": {"n_heads": 2, "gating": True},
    "heads and sink": {"n_heads": 2, "sink": 3},
    "frozen": {"freeze_mem": True},
    "decay": {"state_decay": 0.9},
    "learned decay": {"state_decay": "learned"},
    "window": {"sliding_window": 4},
    "rmt": {"memory_kind": "rmt"},
    "rmt and window": {"memory_kind": "rmt", "sliding_window": 5},
    "transformer_xl": {"memory_kind": "transformer_xl"},
    "transformer_xl of 3 tokens": {"memory_kind": "transformer_xl", "sliding_window": 3},
}


def with_counts(memory):
    """The options of one of MEMORIES with small counts, and the planner's fields of the same."""
    options = {**accepted(MEMORIES[memory].get("memory_kind", "armt"), d_mem=4, num_mem_tokens=3), **MEMORIES[memory]}
    given = {"memory_kind": "armt", "num_mem_tokens": None, "sliding_window": 0, **options}
    return options, memory_fields(given, segment_tokens=8)


def planned(path, overrides=(), world=1, ds_config=ZERO3):
    return planned_run.planned_run(read_trees(path, ds_config, ds_config, overrides), world)


# --- sizes ---------------------------------------------------------------------------------------------------------


def test_every_family_has_a_row():
    assert set(backbone_sizes.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_built_model(family, memory, tied):
    base = {"model_type": family, **BASES[family], "tie_word_embeddings": tied}
    options, fields = with_counts(memory)
    with torch.device("meta"):
        model = ARMTForCausalLM(ARMTConfig(base_config=base, segment_tokens=8, **options))
    sizes = model_sizes(base, fields)
    layer = model.backbone.layers[0]
    assert sorted(sizes.layer_tensors) == sorted(p.numel() for p in layer.parameters())
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Only the memory's: with a memory that has none, there is nothing to train.
    if sizes._replace(freeze_base=True).trainable_parameters:
        freeze_parameters(model, "base")
    else:
        model.requires_grad_(False)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sizes._replace(freeze_base=True).trainable_parameters == sum(trained)


@pytest.mark.parametrize("memory", MEMORIES)
def test_states_and_updates_are_as_large_as_planned(memory):
    options, fields = with_counts(memory)
    model = small_model("qwen3", **options)
    sizes = model_sizes({"model_type": "qwen3", **BASES["qwen3"]}, fields)
    x, state = torch.randn(1, 8 + model.config.other_rows, 32), model.layers[0].memory.initial_state(1, "cpu")
    _, update = model.layers[0].cell(x, state, model.context(x, None))
    assert sizes.state_bytes == elements(state) * 4
    # The factor itself is not counted.
    assert sizes.update_bytes == (elements(update) - ("decay" in memory)) * 4
    # The mark that the rows are written is not counted.
    assert sizes.carried_bytes == max(0, elements(model.initial_states(1)[-1]) - 1) * 4


def elements(nested):
    """Numbers in all tensors of nested tuples."""
    if nested is None:
        return 0
    return nested.numel() if isinstance(nested, torch.Tensor) else sum(map(elements, nested))


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
@pytest.mark.parametrize("family", FAMILIES)
def test_biases_are_those_of_the_built_model(family, bias):
    base = {"model_type": family, **BASES[family], bias: True}
    with torch.device("meta"):
        model = ARMTForCausalLM(ARMTConfig(base_config=base, segment_tokens=8, num_mem_tokens=3, d_mem=4))
    assert model_sizes(base, {"num_mem_tokens": 3, "d_mem": 4}).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    default = AutoConfig.for_model(family)
    for name, value in backbone_sizes.FAMILIES[family].defaults.items():
        own = backbone_sizes.FAMILIES[family].names.get(name, name)
        # What the configuration does not have (head_dim, say) follows from the rest.
        if hasattr(default, own) and value is not None:
            assert getattr(default, own) == value, name


@pytest.mark.parametrize("memory", ["armt", "window", "rmt", "rmt and window", "transformer_xl", "decay"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_launches_as_many_kernels_as_planned(family, memory):
    options, fields = with_counts(memory)
    model = small_model(family, **options).eval()
    layer, x = model.backbone.layers[0], torch.randn(1, 8 + model.config.other_rows, 32)
    context, state = model.context(x, None), layer.memory.initial_state(1, "cpu")
    with torch.no_grad(), Operations() as made:
        layer.cell(x, state, context)
    base = {"model_type": family, **BASES[family]}
    # Versions of torch and transformers differ by an operation or two.
    assert made.kernels == pytest.approx(model_sizes(base, fields).kernels, abs=4)


def test_sizes_use_the_names_of_armt_config():
    known = {*ARMTFields.__annotations__, *(name for family in BASES for name in backbone_sizes.FIELDS), "model_type"}
    # Of the train section.
    assert set(ModelSizes._fields) - {"freeze_base"} <= known
    for name, default in planned_run.MEMORY_COUNTS.items():
        assert getattr(ARMTFields, name) == default == ModelSizes._field_defaults[name]


# --- the configuration ---------------------------------------------------------------------------------------------


def test_keys_are_those_of_the_configuration_classes():
    assert set(planned_run.SECTIONS) >= set(RunConfig.model_fields)
    classes = {"model": ModelConfig, "bptt": BPTTConfig, "parallel": ParallelConfig, "loss": LossConfig}
    assert {name: set(keys) for name, keys in planned_run.KEYS.items()} == {
        name: set(kind.model_fields) for name, kind in classes.items()
    }


def test_vocabularies_are_those_of_the_tokenizers():
    assert len(byte_tokenizer()) == planned_run.BYTE_TOKENS
    assert len(babilong_tokenizer(BabilongConfig())) == planned_run.WORD_TOKENS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_is_planned_as_it_is_configured(path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some words to train on. " * 40)
    own = [f"data.text.files={text}", "data.text.validation_fraction=0"] if path.stem.startswith("plays") else []
    config = load_config(RunConfig, path, own)
    if config.model.base is not None:
        with pytest.raises(ConfigError, match=f"model.base={config.model.base}: no folder with a config.json; give"):
            planned(path, own)
        return
    task = make_task(config.data, config.model.segment_tokens, None, 4)
    armt = armt_config(config.model, token_fields(task.tokenizer), task.segment_tokens)
    run = planned(path, own)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_mem_tokens", "d_mem", "nu", "n_heads"):
        assert getattr(run.model, name) == getattr(armt, name), name
    assert run.work.segment_tokens == armt.segment_tokens
    assert run.work.sequence_tokens == max(task.sequence_tokens(stage.length) for stage in config.curriculum)
    with torch.device("meta"):
        built = ARMTForCausalLM(armt)
    assert run.model.parameters == sum(p.numel() for p in built.parameters())


def test_a_second_copy_of_the_parameters_is_planned(tmp_path):
    """Each rank has its part of the copy that the ranks of its node share."""
    recipe = ROOT / "launch/configs/default.yaml"
    for ranks, share in ((1, 0), (8, 8), (32, 16)):
        run = planned(recipe, [f"ds_config.zero_optimization.zero_hpz_partition_size={ranks}"], world=16)
        held = plan(run.model, run.work, run.layout).gpu_bytes["second copy of parameters (shard)"]
        assert held == pytest.approx(run.model.parameters * run.work.dtype_bytes / share if share else 0)


def test_overrides_and_the_ds_config_decide_the_work(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "launch/configs/default.yaml").read_text() + "ds_config: {train_batch_size: 48}\n")
    overrides = [
        *("bptt.states=rebuild", "parallel.sp=2", "parallel.rounds=2", "parallel.chunks=64"),
        *("ds_config.gradient_accumulation_steps=4", "ds_config.bf16.enabled=true"),
        "ds_config.activation_checkpointing.cpu_checkpointing=true",
        "ds_config.zero_optimization.offload_optimizer.device=cpu",
    ]
    _, work, layout = planned(recipe, overrides, world=4)
    assert (work.micro_batch, work.accumulation, work.states, work.dtype_bytes) == (6, 4, "rebuild", 2)
    assert (work.offload_activations, work.offload_optimizer, work.offload_parameters) == (True, True, False)
    # No more chunks than rows.
    assert tuple(layout) == (2, 2, 2, 6, None, None)


def test_a_complete_section_needs_no_file(tmp_path):
    """What --show-config prints, or a run folder's config.yaml, is planned as the run that it came from."""
    recipe = ROOT / "launch/configs/plays_cpu.yaml"
    trees = read_trees(recipe, ZERO3, ZERO3)
    shown = tmp_path / "config.yaml"
    shown.write_text(yaml.safe_dump({**trees.run, "ds_config": trees.ds_config}))
    # The default file has bf16, which must not be merged under a complete section.
    again = read_trees(shown, None, ROOT / "ds_configs/zero3.json")
    assert planned_run.planned_run(again, 1) == planned_run.planned_run(trees, 1)
    assert planned_run.planned_run(again, 1).work.dtype_bytes == 4


def test_the_base_of_a_run_is_read_from_its_folder(tmp_path):
    base = {"model_type": "llama", **BASES["llama"], "vocab_size": 70}
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(base))
    text = [
        "data.task=text",
        "model.segment_tokens=8",
        "curriculum=[{segments: 4, steps: 2}]",
        "model.base_config=null",
    ]
    sizes = planned(CONFIGS[0], [*text, "data.babilong=null", f"model.base={tmp_path / 'base'}"]).model
    assert (sizes.vocab_size, sizes.num_mem_tokens) == (70, 4)
    exported = {"model_type": "armt", "base_config": base, "num_mem_tokens": 5, "d_mem": 6, "n_heads": 2}
    (tmp_path / "base/config.json").write_text(json.dumps(exported))
    sizes = planned(
        CONFIGS[0], [*text, "data.babilong=null", "model.d_mem=null", f"model.base={tmp_path / 'base'}"]
    ).model
    assert (sizes.hidden_size, sizes.d_mem, sizes.n_heads) == (32, 6, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "parallel.spp=2",
            "parallel.spp=2: unknown key; known here: chunks, prefetch, rounds, schedule, sp, timeout_s",
        ),
        ("paralel.sp=2", "paralel={'sp': 2}: unknown key"),
        ("parallel.sp=3", "parallel.sp=3 does not divide gpus=4; try parallel.sp=1"),
        ("parallel.rounds=none", "parallel.rounds=none: expected an integer of at least 1"),
        ("bptt.states=keep", "bptt.states=keep: unknown; known here: store, rebuild, recompute"),
        ("model.base_config.model_type=vit", "model_type=vit: no such backbone; one of gpt2"),
        ("model.n_heads=3", "n_heads=3 does not divide d_mem=16; try n_heads=1"),
        ("model.base_config=null", "model.base or model.base_config: give exactly one of them"),
        ("model.segment_tokens=7", "model.segment_tokens=7: the task's segments have 4 tokens; leave it out"),
        ("curriculum=[]", r"curriculum=\[\]: expected a list of stages"),
        ("curriculum=[{steps: 3}]", "curriculum.0.pairs: missing; set it"),
        ("ds_config.train_batch_size=7", "ds_config train_batch_size=7 is not 1 .* try train_batch_size=4"),
        ("ds_config.train_batch_size=null", "ds_config train_batch_size: missing; set it"),
        ("ds_config.bf16=true", "ds_config bf16=True: expected an object"),
    ],
)
def test_a_mistake_names_field_value_and_remedy(override, message):
    with pytest.raises(ConfigError, match=message):
        planned(ROOT / "launch/configs/default.yaml", [override], world=4)


# --- calibration ---------------------------------------------------------------------------------------------------


def write_run(folder, overrides=(), steps=6, world=1, hardware=CPU):
    """A run folder as launch/train.py leaves it, whose steps took what the planner says of `hardware`."""
    trees = read_trees(ROOT / "launch/configs/plays_cpu.yaml", ZERO3, ZERO3, overrides)
    run = planned_run.planned_run(trees, world)
    result = plan(*run, hardware)
    for name in ("model", "heartbeat"):
        (folder / name).mkdir(parents=True)
    for rank in range(world):
        (folder / f"heartbeat/rank_{rank}.json").write_text("{}")
    base = {**trees.run["model"]["base_config"], "vocab_size": run.model.vocab_size}
    (folder / "model/config.json").write_text(json.dumps({"base_config": base}))
    (folder / "config.yaml").write_text(yaml.safe_dump(trees.run))
    (folder / "ds_config.json").write_text(json.dumps(trees.ds_config))
    lines = [
        {"kind": "train", "step": n, "tokens": 8192 * n, "cell_s": result.costs.cell_s, "step_s": result.step_s}
        for n in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return result


def test_calibration_recovers_the_rate_and_the_backward(tmp_path):
    truth = CPU._replace(kernel_efficiency=0.3, backward_ratio=2.5)
    write_run(tmp_path / "run", ["ds_config.train_batch_size=1"], hardware=truth)
    hardware = calibrated(CPU, [tmp_path / "run"])
    assert hardware.kernel_efficiency == pytest.approx(truth.kernel_efficiency, rel=1e-6)
    assert hardware.backward_ratio == pytest.approx(2.5, rel=1e-3)
    other = planned(ROOT / "launch/configs/plays_cpu.yaml", ["ds_config.train_batch_size=2", "bptt.states=recompute"])
    assert plan(*other, hardware).step_s == pytest.approx(plan(*other, truth).step_s, rel=1e-3)


def test_two_runs_separate_launching_from_computing(tmp_path):
    truth = CPU._replace(kernel_s=5e-5, kernel_efficiency=0.4, backward_ratio=2.5)
    for name, batch in (("small", 1), ("large", 4)):
        write_run(tmp_path / name, [f"ds_config.train_batch_size={batch}"], hardware=truth)
    hardware = calibrated(CPU, [tmp_path / "small", tmp_path / "large"])
    for field in ("kernel_s", "kernel_efficiency", "backward_ratio"):
        assert getattr(hardware, field) == pytest.approx(getattr(truth, field), rel=1e-3), field


def test_calibration_reads_sizes_and_ranks_from_the_folder(tmp_path):
    result = write_run(tmp_path / "run", ["ds_config.train_batch_size=2"], world=2)
    measured = read_run(tmp_path / "run")
    assert (measured.world, measured.run.layout.dp, measured.cell_s) == (2, 2, pytest.approx(result.costs.cell_s))
    assert measured.run.model.vocab_size == planned_run.BYTE_TOKENS


def test_a_run_that_cannot_calibrate_says_why(tmp_path):
    with pytest.raises(ConfigError, match="config=.*No such file"):
        calibrated(CPU, [tmp_path])
    write_run(tmp_path / "run", ["ds_config.train_batch_size=1"], steps=2)
    with pytest.raises(ConfigError, match="calibrate=.*fewer than 3 steps of the longest samples; train with"):
        calibrated(CPU, [tmp_path / "run"])


def test_a_preflight_says_how_fast_the_network_is(tmp_path):
    file = tmp_path / "network.json"
    file.write_text(json.dumps(dict.fromkeys(NETWORK, 0.25)))
    hardware = with_network(CPU, file)
    assert {getattr(hardware, name) for name in NETWORK} == {0.25}
    assert hardware._replace(**{name: getattr(CPU, name) for name in NETWORK}) == CPU


@pytest.mark.parametrize("wrong", [{}, {"handoff_bytes_per_s": 0.0}, {"gather_bytes_per_s": "fast"}], ids=str)
def test_a_file_that_is_no_preflight_says_so(wrong, tmp_path):
    file = tmp_path / "network.json"
    file.write_text(json.dumps(dict.fromkeys(NETWORK, 1.0) | wrong if wrong else {}))
    with pytest.raises(ConfigError, match="network=.*s=.*; give a file of launch/preflight.py --network"):
        with_network(CPU, file)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_plans_a_run():
    done = run_script(
        "plan.py",
        *("--config", ROOT / "launch/configs/plays_cpu.yaml", "--ds_config", ZERO3, "--gpus", 2),
        *("parallel.sp=2", "ds_config.train_batch_size=2", "--hardware", "cpu"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    for wanted in ("1,459,204 parameters", "16 segments of 512", "dp 1 x sp 2", "micro-batch 2", "memory of tensors"):
        assert wanted in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt2", "parallel.sp=2"], "model=gpt2: a run is planned from --config"),
        (["--sp", "2", "train.seed=1"], "--sp: belongs to --model; a run takes it from its configuration"),
        (["--nodes", "0"], "nodes=0: must be at least 1"),
        (["--model", "gpt9"], "model=gpt9: neither llama-1b, llama-8b, gpt2 nor a readable config.json"),
        (["--config", "none.yaml"], "config=none.yaml: No such file or directory"),
        (["--ds_config", "none.json"], "ds_config=none.json: No such file or directory"),
    ],
)
def test_the_command_reports_a_mistake_in_one_line(arguments, message):
    done = run_script("plan.py", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_planning_imports_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['plan.py', '--gpus', '2', 'parallel.sp=2']\n"
        f"try: runpy.run_path({str(ROOT / 'launch/plan.py')!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "print({'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_padding_and_documents_are_planned_as_the_data_say():
    def work(*data):
        base = [f"model.base_config={json.dumps(BASES['llama'] | {'model_type': 'llama'})}", "model.segment_tokens=8"]
        run = planned(ROOT / "launch/configs/default.yaml", [*base, "curriculum=[{segments: 4, steps: 1}]", *data])
        return run.work.padded, run.work.packed

    text = "data.task=text", "data.text={files: x, sequence_tokens: 64}"
    assert work(*text) == (True, False)
    assert work(*text, "data.text.pack=true") == (False, True)
    assert work(*text, "data.text.pack=true", "data.text.cross_documents=true") == (False, False)
    assert work("data.task=babilong") == (False, False)
    assert work("data={task: babilong, babilong: {published: {set: RMT-team/babilong}}}") == (True, False)
