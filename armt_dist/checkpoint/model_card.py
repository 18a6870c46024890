"""README.md of an exported model: what it is, how to load it, how it was trained, and its last validation."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..config import read_yaml
from ..model.configuration_armt import ARMTConfig
from ..records import markdown_table, markdown_text, read_json, read_json_lines
from .folder import MANIFEST
from .published import public

DATA = ModelCardData(
    library_name="transformers",
    pipeline_tag="text-generation",
    tags=["armt", "associative-recurrent-memory", "long-context"],
)
TEXT = """# {name}

{kind}: a {family} of {layers} layers, width {width}, that reads a text in segments of {segment_tokens} tokens and
carries {memory} from segment to segment. Time grows linearly with the length of the text; memory does not grow.
{parameters:,} parameters.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
prompt = tokenizer("your text", return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(prompt.input_ids, max_new_tokens=20)[0]))
```

The modelling code is in this folder; it needs only `torch` and `transformers`. Pad batches on the right.

## Training

{facts}
"""
# What a model is and what it carries, by `memory_kind`; others are named by their kind.
KINDS = {
    "armt": (
        "An [Associative Recurrent Memory Transformer](https://arxiv.org/abs/2407.04841)",
        "an associative memory in every layer",
    ),
    "rmt": ("A [Recurrent Memory Transformer](https://arxiv.org/abs/2207.06881)", "memory tokens"),
    "transformer_xl": (
        "A [Transformer-XL](https://arxiv.org/abs/1901.02860)",
        "the keys and values of its last tokens in every layer",
    ),
}
# Configuration keys of the run that the card shows, and their names for people.
SHOWN = {
    ("data", "task"): "task",
    ("model", "base"): "started from",
    ("curriculum",): "curriculum",
    ("train", "seed"): "seed",
}


def write_model_card(path: Path, run: Path, checkpoint: Path, config: ARMTConfig, parameters: int) -> None:
    """Write the card of `checkpoint` of `run`, without the facts that the run folder lacks. Raises OSError.

    parameters: number of parameters.
    """
    progress = read_json(checkpoint / MANIFEST).get("state", {}).get("progress", {})
    metrics = last_validation(run, progress.get("step"))
    kind, memory = KINDS.get(config.memory_kind, (f"A transformer with memory_kind={config.memory_kind}", "a memory"))
    text = TEXT.format(
        name=markdown_text(run.name),
        kind=kind,
        memory=memory,
        family=config.base.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        segment_tokens=config.segment_tokens,
        parameters=parameters,
        facts=facts_table("fact", training_facts(run, checkpoint, progress)),
    )
    if metrics:
        text += f"\n## Validation\n\n{facts_table('metric', metrics)}\n"
    ModelCard(f"---\n{DATA.to_yaml()}\n---\n\n{text}").save(path)


def facts_table(head: str, facts: dict[str, object]) -> str:
    """Format names and values as a Markdown table."""
    return markdown_table({head: name, "value": value} for name, value in facts.items())


def training_facts(run: Path, checkpoint: Path, progress: dict) -> dict[str, object]:
    """Collect facts from the configuration, the environment and the checkpoint's progress."""
    facts: dict[str, object] = {"checkpoint": checkpoint.name}
    facts |= {name: progress.get(name) for name in ("step", "tokens", "seconds")}
    config = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    for keys, name in SHOWN.items():
        value = config
        for key in keys:
            value = value.get(key) or {}
        facts[name] = public(without_nulls(value))
    ds = read_json(run / "ds_config.json")
    facts |= {name: ds.get(name) for name in ("train_batch_size", "optimizer", "bf16")}
    facts |= read_json(run / "environment.json")
    return {name: value for name, value in facts.items() if value not in (None, {}, [])}


def without_nulls(value: object) -> object:
    """Drop the null entries of nested mappings."""
    if isinstance(value, dict):
        return {key: without_nulls(child) for key, child in value.items() if child is not None}
    return [without_nulls(child) for child in value] if isinstance(value, list) else value


def last_validation(run: Path, step: int | None) -> dict[str, object]:
    """Return the last validation at or before `step`; empty if there is none."""
    path = run / "metrics.jsonl"
    found: dict[str, object] = {}
    for record in read_json_lines(path) if path.is_file() else []:
        if record["kind"] == "validation" and (step is None or record["step"] <= step):
            found = record
    return {name: value for name, value in found.items() if name != "kind"}
