"""From a run's configuration to what the planner needs: sizes, the data of a step, the layout. Imports no torch.

The YAML recipe, the ds_config and key=value are read as plain values. `launch/train.py` checks every key with the
classes of each room; here only what planning reads is checked, and the names of the keys in the sections that it reads,
so that a misspelled one is not planned as its default. The longest stage of the curriculum decides the length of
samples, because it decides whether a run fits.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..config import ConfigError, one_line, read_object
from .kept_cells import parse_keep
from .model_sizes import KINDS, ModelSizes, StepWork, memory_fields, model_sizes
from .planner import STATES, Layout
from .program import SCHEDULES
from .weight_groups import WEIGHT_GRADIENTS

DS_CONFIG = "ds_config"
# Keys of the sections that planning reads; tests compare them with the configuration classes.
SECTIONS = (
    *("extensions", "model", "data", "loss", "bptt", "parallel", "train", "curriculum", "watchdog"),
    *("profile", "deterministic", "digests", DS_CONFIG),
)
KEYS = {
    "model": (
        *(
            "base",
            "base_config",
            "trust_remote_code",
            "init",
            "lora",
            "memory_kind",
            "segment_tokens",
            "num_mem_tokens",
        ),
        *("d_mem", "nu", "n_heads", "maths", "use_denom", "correction", "gating", "freeze_mem", "wrap_pos"),
        *("segment_alignment", "sink", "sliding_window", "window_positions", "detach_window", "k2", "state_decay"),
    ),
    "bptt": ("states", "keep", "weight_gradients", "graphs"),
    "parallel": ("sp", "rounds", "chunks", "schedule", "prefetch", "timeout_s"),
    "loss": ("skip_first_segment", "last_segment_only", "distill"),
}
# Defaults of ARMTConfig and of the data sections; tests compare them with the classes.
MEMORY_COUNTS = {"d_mem": 64, "nu": 3, "n_heads": 1}
SEGMENT_TOKENS = 512
SEQUENCE_TOKENS = 8192
RETRIEVAL = {"key_length": 1, "value_length": 1, "symbols": 16}
RETRIEVAL_MARKS = 4
"""Tokens of a retrieval vocabulary beside its symbols."""
BYTE_TOKENS = 259
"""Bytes and three special tokens."""
WORD_TOKENS = 177
"""bAbI's words, the words of the built-in background and three special tokens."""
PADDED_SET = "RMT-team/babilong"
"""Published samples with their background, whose lengths differ."""
ANSWER_TOKENS = 2
"""Scored tokens of a BABILong sample: a one-word answer and eos."""


class RunTree(NamedTuple):
    """A run's two configurations, unchecked."""

    run: dict
    ds_config: dict


def check_keys(run: Mapping) -> None:
    """Raise ConfigError for a section or a key that no run has."""
    for name in run:
        if name not in SECTIONS:
            raise ConfigError(f"{name}={one_line(run[name])}: unknown key; known here: {', '.join(sorted(SECTIONS))}")
    for name, known in KEYS.items():
        for key, value in section(run, name, "").items():
            if key not in known:
                raise ConfigError(
                    f"{name}.{key}={one_line(value)}: unknown key; known here: {', '.join(sorted(known))}"
                )


def section(tree: Mapping, name: str, path: str) -> dict:
    """A nested mapping, empty where it is left out. Raises ConfigError for anything else."""
    found = tree.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path}{name}={one_line(found)}: expected a section of keys")
    return found


def count(tree: Mapping, name: str, path: str, default: int | None, least: int = 1) -> int:
    """An integer of at least `least`. Raises ConfigError for another value, or if missing without a default."""
    value = tree.get(name)
    if value is None:
        if default is None:
            raise ConfigError(f"{path}{name}: missing; set it")
        return default
    # A float such as 2e5 is what YAML and key=value make of a large count.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or value < least:
        raise ConfigError(f"{path}{name}={one_line(value)}: expected an integer of at least {least}")
    return value


def optional_count(tree: Mapping, name: str, path: str) -> int | None:
    """An integer of at least 0, or None where it is left out. Raises ConfigError for another value."""
    return None if tree.get(name) is None else count(tree, name, path, None, least=0)


def choice(tree: Mapping, name: str, path: str, known: Iterable[Any]) -> Any:
    """One of `known`, the first where it is left out. Raises ConfigError for another value."""
    known = list(known)
    value = tree.get(name)
    value = known[0] if value is None else value
    if value not in known:
        named = ", ".join(str(each) for each in known)
        raise ConfigError(f"{path}{name}={one_line(value)}: unknown; known here: {named}")
    return value


def flag(tree: Mapping, name: str, path: str) -> bool:
    """True or false, false where it is left out. Raises ConfigError for another value."""
    return choice(tree, name, path, (False, True))


def kept(tree: Mapping) -> float | str:
    """What bptt.keep says, as it stands. Raises ConfigError where it says nothing that can be read."""
    value = tree.get("keep")
    value = 0 if value is None else value
    parse_keep(value)
    return value


class PlannedRun(NamedTuple):
    """What `planner.plan` takes."""

    model: ModelSizes
    work: StepWork
    layout: Layout


class Samples(NamedTuple):
    """The longest samples of a run."""

    segment_tokens: int
    sequence_tokens: int
    scored_tokens: int
    """0: all."""
    vocab_size: int | None
    """Tokens of the tokenizer; None: not known without loading it."""
    padded: bool = False
    """Whether one may be shorter than its batch."""
    packed: bool = False
    """Whether documents that do not see each other share a segment."""


def planned_run(trees: RunTree, world: int) -> PlannedRun:
    """The run that these configurations start on `world` ranks. Raises ConfigError naming field, value and remedy."""
    parallel, zero = section(trees.run, "parallel", ""), section(trees.ds_config, "zero_optimization", "ds_config ")
    sp = count(parallel, "sp", "parallel.", 1)
    if world < 1 or world % sp:
        raise ConfigError(f"parallel.sp={sp} does not divide gpus={world}; try parallel.sp=1 or other --gpus")
    sizes = batch_sizes(trees.ds_config, world // sp)
    samples = longest_samples(trees.run)
    bf16 = flag(section(trees.ds_config, "bf16", "ds_config "), "enabled", "ds_config bf16.")
    recompute = section(trees.ds_config, "activation_checkpointing", "ds_config ")
    work = StepWork(
        sequence_tokens=samples.sequence_tokens,
        segment_tokens=samples.segment_tokens,
        micro_batch=sizes.micro,
        states=choice(section(trees.run, "bptt", ""), "states", "bptt.", STATES),
        keep=kept(section(trees.run, "bptt", "")),
        weight_gradients=choice(section(trees.run, "bptt", ""), "weight_gradients", "bptt.", WEIGHT_GRADIENTS),
        dtype_bytes=2 if bf16 else 4,
        offload_optimizer=offloaded(zero, "offload_optimizer"),
        offload_parameters=offloaded(zero, "offload_param"),
        offload_activations=flag(recompute, "cpu_checkpointing", "ds_config activation_checkpointing."),
        accumulation=sizes.accumulation,
        scored_tokens=samples.scored_tokens,
        gradient_bytes=gradient_bytes(trees.ds_config),
        carried=carries(trees.run),
        padded=samples.padded,
        packed=samples.packed,
        teacher_window=teacher_window(trees.run),
        **{
            name: count(zero, name, "ds_config zero_optimization.", StepWork._field_defaults[name], least=0)
            for name in ("reduce_bucket_size", "stage3_param_persistence_threshold", "zero_hpz_partition_size")
        },
    )
    layout = Layout(
        world // sp,
        sp,
        count(parallel, "rounds", "parallel.", 1),
        # A micro-batch is cut into no more parts than it has rows.
        min(count(parallel, "chunks", "parallel.", 1), sizes.micro),
        choice(parallel, "schedule", "parallel.", (None, *SCHEDULES)),
        None if parallel.get("prefetch") is None else count(parallel, "prefetch", "parallel.", None),
    )
    model = read_model(section(trees.run, "model", ""), samples)
    # What patterns of names freeze is planned as if it were trained: the names are known with the model only. Adapters
    # are too small to be planned.
    lora = section(trees.run, "model", "").get("lora") is not None
    freeze_base = lora or section(trees.run, "train", "").get("freeze") == "base"
    return PlannedRun(model._replace(freeze_base=freeze_base), work, layout)


class BatchSizes(NamedTuple):
    """Sequences: of one optimizer step, of one rank's micro-batch; and micro-batches a step."""

    global_batch: int
    micro: int
    accumulation: int


def batch_sizes(config: Mapping[str, Any], dp: int) -> BatchSizes:
    """Apply DeepSpeed's rule, train_batch_size = micro x accumulation x dp, with the missing one filled in.

    Raises ConfigError for sizes that are not positive integers or do not fit the world.
    """
    total = batch_size(config, "train_batch_size")
    micro = batch_size(config, "train_micro_batch_size_per_gpu")
    accumulation = batch_size(config, "gradient_accumulation_steps")
    if total is None and micro is None:
        raise ConfigError("ds_config train_batch_size: missing; set it, or train_micro_batch_size_per_gpu")
    if accumulation is None:
        accumulation = 1 if total is None or micro is None else max(1, total // (micro * dp))
    if micro is None:
        micro = max(1, (total or 1) // (accumulation * dp))
    if total is None:
        total = micro * accumulation * dp
    if total != micro * accumulation * dp:
        raise ConfigError(
            f"ds_config train_batch_size={total} is not {micro} (micro-batch) x {accumulation} (accumulation) x {dp} "
            f"(data-parallel ranks); try train_batch_size={micro * accumulation * dp} or another world size"
        )
    return BatchSizes(total, micro, accumulation)


def batch_size(config: Mapping[str, Any], name: str) -> int | None:
    """Return one of the batch sizes. Raises ConfigError where it is not a positive integer."""
    value = config.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"ds_config {name}={one_line(value)}: expected a positive integer")
    return value


def offloaded(zero: Mapping[str, Any], name: str) -> bool:
    """Whether DeepSpeed moves these tensors to host memory."""
    return section(zero, name, "ds_config zero_optimization.").get("device", "none") != "none"


def gradient_bytes(ds_config: Mapping[str, Any]) -> int:
    """Of one accumulated gradient; 0: as the parameters."""
    path = "ds_config data_types."
    kind = choice(section(ds_config, "data_types", "ds_config "), "grad_accum_dtype", path, (None, "fp32", "bf16"))
    return {None: 0, "fp32": 4, "bf16": 2}[kind]


def longest_samples(run: Mapping[str, Any]) -> Samples:
    """The samples of the curriculum's longest stage."""
    data, asked = section(run, "data", ""), section(run, "model", "").get("segment_tokens")
    task = choice(data, "task", "data.", ("rewrite", "remember", "text", "babilong", "instructions", "mixture"))
    if task in ("rewrite", "remember"):
        return retrieval_samples(section(data, "retrieval", "data."), run, asked)
    if task == "mixture":
        return mixed_samples(section(data, "mixture", "data."), run)
    length = longest_stage(run, "segments")
    if task == "babilong":
        tokens = count({"segment_tokens": asked}, "segment_tokens", "model.", None)
        babilong = section(data, "babilong", "data.")
        padded = section(babilong, "published", "data.babilong.").get("set") == PADDED_SET
        return Samples(tokens, length * tokens, ANSWER_TOKENS, word_tokens(babilong), padded)
    text, path = section(data, task, "data."), f"data.{task}."
    most = count(text, "sequence_tokens", path, SEQUENCE_TOKENS)
    tokens = count({"segment_tokens": asked}, "segment_tokens", "model.", most)
    if length * tokens > most:
        raise ConfigError(
            f"curriculum segments={length} of {tokens} tokens exceed {path}sequence_tokens={most}; use at most "
            f"{most // tokens} or raise {path}sequence_tokens"
        )
    # The ends of texts are shorter than their batch; of texts that are joined only the very last one is.
    pack = flag(text, "pack", path)
    packed = pack and not flag(text, "cross_documents", path)
    vocabulary = BYTE_TOKENS if text.get("tokenizer", "byte") == "byte" else None
    return Samples(tokens, length * tokens, 0, vocabulary, not pack, packed)


def mixed_samples(mixture: Mapping[str, Any], run: Mapping[str, Any]) -> Samples:
    """The longest of all parts, whose rows share batches."""
    parts = mixture.get("parts")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"data.mixture.parts={one_line(parts)}: expected a list of data sections")
    found = [longest_samples({**run, "data": part}) for part in parts]
    scored = [part.scored_tokens for part in found]
    return found[0]._replace(
        scored_tokens=max(scored) if all(scored) else 0,
        padded=any(part.padded for part in found),
        packed=any(part.packed for part in found),
    )


def carries(run: Mapping[str, Any]) -> bool:
    """Whether the memory of rows passes to the next step, in any stage."""
    stages = [stage.get("carry_state") for stage in run.get("curriculum", ())]
    return bool(section(run, "data", "").get("carry_memory") or section(run, "train", "").get("carry_state")) or any(
        stages
    )


def teacher_window(run: Mapping[str, Any]) -> int:
    """Tokens that the base reads at once as a teacher; 0: there is none."""
    distill = section(section(run, "loss", ""), "distill", "loss.")
    return count(distill, "window", "loss.distill.", None, least=2) if distill else 0


def retrieval_samples(retrieval: Mapping[str, Any], run: Mapping[str, Any], asked: Any) -> Samples:
    """Pairs, one a segment, then the question, whose value and eos are scored."""
    key, value, symbols = (count(retrieval, name, "data.retrieval.", RETRIEVAL[name]) for name in RETRIEVAL)
    tokens = key + value + 2
    if asked not in (None, tokens):
        raise ConfigError(f"model.segment_tokens={asked}: the task's segments have {tokens} tokens; leave it out")
    return Samples(tokens, (longest_stage(run, "pairs") + 1) * tokens, value + 1, symbols + RETRIEVAL_MARKS)


def word_tokens(babilong: Mapping[str, Any]) -> int | None:
    """Size of BABILong's vocabulary, where it does not depend on files."""
    tokenizer = babilong.get("tokenizer", "word")
    if tokenizer == "word" and babilong.get("background") is None and babilong.get("vocabulary", 1000) >= 1000:
        return WORD_TOKENS
    return BYTE_TOKENS if tokenizer == "byte" else None


def longest_stage(run: Mapping[str, Any], unit: str) -> int:
    """The longest samples of the curriculum, in pairs or segments."""
    stages = run.get("curriculum")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError(
            f"curriculum={one_line(stages)}: expected a list of stages, such as [{{{unit}: 4, steps: 100}}]"
        )
    return max(count(stage, unit, f"curriculum.{i}.", None) for i, stage in enumerate(stages))


def read_model(model: Mapping[str, Any], samples: Samples) -> ModelSizes:
    """Sizes from the model section; a random base takes its vocabulary from the tokenizer unless it says its own."""
    base, base_config = model.get("base"), section(model, "base_config", "model.")
    if (base is None) == (not base_config):
        raise ConfigError("model.base or model.base_config: give exactly one of them")
    if base is not None:
        found = read_base(str(base))
        if found.get("model_type") == "armt":
            # An export: its fields hold unless the section changes them.
            model = {**found, **{key: value for key, value in model.items() if value is not None}}
            found = section(found, "base_config", f"model.base={base}: ")
    elif samples.vocab_size is None and base_config.get("vocab_size") is None:
        raise ConfigError(
            "model.base_config.vocab_size: missing, and the tokenizer's size is known only when it is loaded; add "
            "model.base_config.vocab_size=N"
        )
    else:
        found = {"vocab_size": samples.vocab_size, **base_config}
    memory = {
        "memory_kind": choice(model, "memory_kind", "model.", KINDS),
        **{name: count(model, name, "model.", default) for name, default in MEMORY_COUNTS.items()},
        **{name: flag(model, name, "model.") for name in ("gating", "freeze_mem")},
        "state_decay": model.get("state_decay"),
        **{name: count(model, name, "model.", 0, least=0) for name in ("sink", "sliding_window")},
        "num_mem_tokens": optional_count(model, "num_mem_tokens", "model."),
    }
    return model_sizes(found, memory_fields(memory, samples.segment_tokens))


def read_base(base: str) -> dict:
    """The config.json of a base model's folder."""
    path = Path(base) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"model.base={base}: no folder with a config.json; give the path of a downloaded model, or its shapes as "
            "model.base_config"
        )
    return read_object(path, "model.base")
