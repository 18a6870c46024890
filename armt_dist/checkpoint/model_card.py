"""README.md of an exported model: what it is, how it is loaded, how it was trained and how well it did."""

import json
from pathlib import Path

from ..config import read_yaml
from ..model.configuration_armt import ARMTConfig
from .folder import MANIFEST

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [armt, associative-recurrent-memory, long-context]
---

# {name}

An [Associative Recurrent Memory Transformer](https://arxiv.org/abs/2407.04841): a {family} of {layers} layers, width
{width}, that reads a text in segments of {segment_tokens} tokens and carries an associative memory in every layer from
segment to segment. Time grows linearly with the length of the text; memory does not grow. {parameters:,} parameters.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
prompt = tokenizer("your text", return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(prompt.input_ids, max_new_tokens=20)[0]))
```

The modelling code is in this folder; it needs only `torch` and `transformers`. Batches are padded on the right.

## Training

{facts}{metrics}"""
# Where the run says how it was trained: configuration key -> its name for people.
SHOWN = {
    ("data", "task"): "task",
    ("model", "base"): "started from",
    ("curriculum",): "curriculum",
    ("train", "seed"): "seed",
}


def write_model_card(run: Path, checkpoint: Path, config: ARMTConfig, parameters: int) -> str:
    """The card of `checkpoint` of `run`; facts that the run folder lacks are left out. parameters: their number."""
    facts, metrics = training_facts(run, checkpoint), last_validation(run, step_of(checkpoint))
    return CARD.format(
        name=run.name,
        family=config.base_config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        segment_tokens=config.segment_tokens,
        parameters=parameters,
        facts=table(("fact", "value"), facts),
        metrics="\n## Validation\n\n" + table(("metric", "value"), metrics) if metrics else "",
    )


def without_nulls(value: object) -> object:
    """Nested mappings and lists without the entries that were left out."""
    if isinstance(value, dict):
        return {key: without_nulls(child) for key, child in value.items() if child is not None}
    return [without_nulls(child) for child in value] if isinstance(value, list) else value


def training_facts(run: Path, checkpoint: Path) -> dict[str, object]:
    """From the resolved configuration, the environment and the checkpoint's manifest."""
    facts: dict[str, object] = {"checkpoint": checkpoint.name}
    progress = read_json(checkpoint / MANIFEST).get("state", {}).get("progress", {})
    facts |= {name: progress.get(name) for name in ("step", "tokens", "seconds")}
    config = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    for keys, name in SHOWN.items():
        value = config
        for key in keys:
            value = value.get(key) or {}
        facts[name] = without_nulls(value)
    ds = read_json(run / "ds_config.json")
    facts |= {name: ds.get(name) for name in ("train_batch_size", "optimizer", "bf16")}
    facts |= read_json(run / "environment.json")
    return {name: value for name, value in facts.items() if value not in (None, {}, [])}


def last_validation(run: Path, step: int | None) -> dict[str, object]:
    """The last validation at or before `step`; empty where there is none."""
    path, found = run / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        # A run that is going on may be in the middle of its last line.
        record = json.loads(line) if line.endswith("}") else {}
        if record.get("kind") == "validation" and (step is None or record["step"] <= step):
            found = record
    return {name: value for name, value in found.items() if name != "kind"}


def step_of(checkpoint: Path) -> int | None:
    """Optimizer steps that a checkpoint was saved after."""
    return read_json(checkpoint / MANIFEST).get("state", {}).get("progress", {}).get("step")


def read_json(path: Path) -> dict:
    """A JSON object; empty where there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def table(head: tuple[str, str], rows: dict[str, object]) -> str:
    """A Markdown table of names and values."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    for name, value in rows.items():
        text = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
        lines.append(f"| {name} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"
