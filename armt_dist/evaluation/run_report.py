"""Writes the report of a run: `report.md` and `report.png` in its folder.

    python -m armt_dist.report runs/NAME

Training writes it at the end; the command writes it at any time, also during the run.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

import yaml

from ..config import ConfigError, one_line, read_yaml
from ..records import check_links, code_block, markdown_table, markdown_text, read_json, read_metrics
from .charts import Curve, Panel, draw
from .run_history import LAST, History

# Metrics to draw, if the run has them, and their axis labels.
DRAWN = {"loss": "loss, nats per token", "accuracy": "accuracy", "tokens_per_s": "tokens/s"}
# Of the facts in environment.json, those that the report names.
VERSIONS = ("commit", "torch", "deepspeed")


def write_run_report(run: Path) -> Path:
    """Write the report of the run in folder `run` and return its path. Raises ConfigError without a training step."""
    check_links(run)
    try:
        history = History(read_metrics(run), DRAWN)
        if not history.last:
            raise ConfigError(f"run={run}: metrics.jsonl has no training step yet; train first")
        config = read_yaml(run / "config.yaml")
        panels = [panel(name, label, history) for name, label in DRAWN.items() if name in history.last]
        draw(panels, run / "report.png", run.name)
        (run / "report.md").write_text("\n\n".join(sections(run, config, history)) + "\n")
    except OSError as error:
        raise ConfigError(f"run={run}: the report cannot be written ({error.strerror})") from None
    except ConfigError:
        raise
    # What a run writes has all that is read here.
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ConfigError(f"run={run}: metrics.jsonl or config.yaml is damaged ({one_line(repr(error))})") from None
    return run / "report.md"


def panel(name: str, label: str, history: History) -> Panel:
    """Return the panel of one metric over the steps."""
    kinds = {"training": history.training[name]}
    if name in history.validated:
        kinds["validation"] = history.validation[name]
    return Panel("step", label, [Curve(kind, found.x, found.y) for kind, found in kinds.items()], log_x=False)


def sections(run: Path, config: dict, history: History) -> Iterable[str]:
    """Yield the sections of the report."""
    last = history.last
    facts = read_json(run / "environment.json")
    chosen = config.get("data", {}).get("task"), config.get("train", {}).get("seed")
    task, seed, commit, torch, deepspeed = map(markdown_text, (*chosen, *map(facts.get, VERSIONS)))
    yield f"# {markdown_text(run.name)}"
    yield (
        f"{last['step']} steps, {last['tokens']:,} tokens, {history.seconds / 60:.1f} min of "
        f"training; task {task}, seed {seed}, commit {commit[:12]}, torch {torch}, DeepSpeed {deepspeed}."
    )
    yield "![curves](report.png)"
    yield "## Stages\n\n" + markdown_table(stages(config, history))
    yield from evaluations(run)
    rest = yaml.safe_dump({k: config[k] for k in config if k != "curriculum"})
    yield f"## Configuration\n\n{code_block(rest, 'yaml')}"


def stages(config: dict, history: History) -> Iterable[dict]:
    """Yield one row for each stage that has begun."""
    curriculum = config.get("curriculum", [])
    for number, stage in history.by_stage():
        shown = curriculum[number] if number < len(curriculum) else {}
        unit = "pairs" if shown.get("pairs") else "segments"
        row = {"stage": number, unit: shown.get(unit), "steps": f"{stage.first} to {stage.last}"}
        row[f"loss, last {LAST} steps"] = f"{fmean(stage.losses):.4f}"
        for name in ("loss", "accuracy"):
            if name in stage.validation:
                row[f"validation {name}"] = f"{stage.validation[name]:.4f}"
        yield row


def evaluations(run: Path) -> Iterable[str]:
    """Yield the results of launch/evaluate.py below the run folder."""
    for path in sorted(run.rglob("evaluation.json")):
        folder = path.parent.relative_to(run)
        rows = [row for row in read_json(path).get("rows", []) if isinstance(row, dict)]
        table = markdown_table(
            {markdown_text(k): markdown_text(v) if isinstance(v, str) else v for k, v in row.items() if is_shown(v)}
            for row in rows
        )
        name, place = markdown_text(str(folder)), quote(str(folder), errors="replace")
        picture = f"![{name}]({place}/evaluation.png)\n\n" if path.with_suffix(".png").exists() else ""
        yield f"## Evaluation {name}\n\n{picture}{table}"


def is_shown(value: object) -> bool:
    """Return whether a result of an evaluation fits into a cell."""
    return isinstance(value, int | float | str)


def main() -> None:
    """Write the report of the run given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    print(f"wrote {write_run_report(parser.parse_args().run)}")
