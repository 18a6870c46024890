"""Files that are not what they seem: FIFOs, links, other people's locks, and names with markup in them."""

import json
import os
import time

import pytest
import yaml
from support.checkpoints import TAGS, write_checkpoints
from support.ranks import spawn

from armt_dist.checkpoint import folder as checkpoint
from armt_dist.checkpoint.export import resolve_tag
from armt_dist.config import ConfigError, read_object, read_yaml
from armt_dist.deadline import within
from armt_dist.evaluation import run_report
from armt_dist.evaluation.charts import Curve, Panel, draw
from armt_dist.monitoring.lease import Lease
from armt_dist.records import markdown_text, read_json, read_metrics
from armt_dist.zero3 import engine


def in_time(work, seconds=5):
    """What `work` returns or raises, within `seconds`: it must not wait for a file."""
    try:
        return within(seconds, work)
    except TimeoutError as error:
        raise AssertionError("it waits") from error
    except Exception as error:
        return error


READERS = {
    "config": read_yaml,
    "ds_config": lambda path: read_object(path, "ds_config"),
    "records": read_json,
    "metrics.jsonl": lambda path: list(read_metrics(path.parent)),
    "manifest.json": lambda path: checkpoint.read_manifest(path.parent),
    "latest": lambda path: checkpoint.read_pointer(path.parent, "latest"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_fifo_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    found = in_time(lambda: READERS[name](tmp_path / name))
    assert found == {} or isinstance(found, ConfigError) and "not a regular file" in str(found)


def test_a_fifo_among_the_files_of_a_checkpoint(tmp_path):
    write_checkpoints(tmp_path)
    (tmp_path / TAGS[0] / "shard_0.pt").unlink()
    os.mkfifo(tmp_path / TAGS[0] / "shard_0.pt")
    found = in_time(lambda: checkpoint.verify_checkpoint(tmp_path / TAGS[0]))
    assert isinstance(found, ConfigError) and "shard_0.pt is not a regular file" in str(found)


@pytest.mark.parametrize("name", ["7.json", "²7.json", "7" * 200 + ".json"])
def test_a_fifo_as_a_lease(name, tmp_path):
    (tmp_path / "lease").mkdir()
    os.mkfifo(tmp_path / "lease" / name)
    lease = Lease(tmp_path, beat_s=0.1, stale_s=0.2)
    found = in_time(lease.take)
    lease.release()
    assert found is None or isinstance(found, ConfigError)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"", b"../../x", b"step_00000002/../../x", b"step_2\n", b"/etc", b"x" * 10**6, b"\0"]
)
def test_what_latest_points_to(content, tmp_path):
    write_checkpoints(tmp_path)
    (tmp_path / "latest").write_bytes(content)
    (tmp_path / TAGS[0] / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    for read in (checkpoint.read_pointer, checkpoint.find_tag, resolve_tag):
        with pytest.raises(ConfigError, match="latest: (not readable|holds)") as caught:
            read(tmp_path, "latest")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert resolve_tag(tmp_path, TAGS[0]) == TAGS[0], "it is not needed where a checkpoint is named"


def in_the_way(ranks, root) -> list[str]:
    """Clean and stage with what is in the way; the names that are left."""
    checkpoint.clean(root)
    checkpoint.make_anew(checkpoint.staging(root / TAGS[0]))
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.is_symlink())


def test_what_has_the_name_of_a_staging_folder(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (outside / "kept").write_text("")
    (root / "staging-x").symlink_to(outside)
    (root / "staging-dangling").symlink_to(tmp_path / "nothing")
    (root / "staging-file").write_text("")
    os.mkfifo(root / "staging-fifo")
    (root / f"staging-{TAGS[0]}").symlink_to(outside)
    assert spawn(1, in_the_way, root) == [[f"staging-{TAGS[0]}"]]
    assert [path.name for path in outside.iterdir()] == ["kept"]


# --- locks -----------------------------------------------------------------------------------------------------------


def test_locks_of_others_are_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    ours = [tmp_path / "cpu_adam/lock", tmp_path / "py311_cpu/fused_adam/lock"]
    others = [
        *(tmp_path / name for name in ("lock", "mine/lock", "py311_cpu/mine/lock", "cpu_adam/x/lock")),
        *(tmp_path / name for name in ("a/b/cpu_adam/lock", "cpu_adam/lock.txt")),
    ]
    for path in (*ours, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1, 1))
    young, link = tmp_path / "async_io/lock", tmp_path / "cpu_lion/lock"
    young.parent.mkdir()
    young.touch()
    link.parent.mkdir()
    link.symlink_to(others[0])
    os.utime(link, (1, 1), follow_symlinks=False)
    engine.clear_stale_locks()
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in (*others, young)) and link.is_symlink()
    assert capsys.readouterr().out.count("removed") == 2


def test_locks_of_another_user_are_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam/lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (1, 1))
    monkeypatch.setattr(engine.os, "getuid", lambda: lock.stat().st_uid + 1)
    engine.clear_stale_locks()
    assert lock.exists()


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = [
    r"$\frac{",
    r"a $x^{$ b",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "`code` **bold** \\",
    "line\nbreak\r\t\x1b[31m",
    "\udcff not UTF-8",
    "|a|b|",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(name, tmp_path):
    run = tmp_path / name.replace("/", "")
    (run / "evals").mkdir(parents=True)
    rows = [{"length": 5, "accuracy": 0.5, "note": name, name: name}, "no row"]
    (run / "evals/evaluation.json").write_text(json.dumps({"rows": rows}))
    config = {"data": {"task": name}, "train": {"seed": "```\n# heading"}, "note": "```\n# heading\n````\n"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(json.dumps({"commit": "a\n# b", "torch": name}))
    record = {"kind": "train", "step": 1, "stage": 0, "loss": 1.0, "tokens": 3, "tokens_per_s": 1.0, "step_s": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    text = run_report.write_run_report(run).read_text()
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    before, _, block = text.partition("## Configuration\n\n")
    headings = [line for line in before.splitlines() if line.startswith("#")]
    assert len(headings) == 3 and headings[1] == "## Stages" and headings[2] == "## Evaluation evals"
    assert not any(f in before.replace(f"\\{f[0]}", "") for f in ("<img", "[x](", "`code`", "**bold**"))
    assert all(c.isprintable() or c == "\n" for c in before)
    fence = block.partition("yaml\n")[0]
    assert fence.strip("`") == "" and len(fence) == 5 and block.rstrip().endswith(f"\n{fence}".lstrip())
    assert fence not in block.removeprefix(fence).rstrip().removesuffix(fence)


def test_names_in_charts(tmp_path):
    for i, name in enumerate(NAMES):
        draw([Panel("x", "y", [Curve("c", [1, 2], [1, 2])])], tmp_path / f"{i}.png", name)
    assert markdown_text("a_b-c 1.5 (d)") == "a_b-c 1.5 (d)", "plain names stay as they are"


@pytest.mark.parametrize("record", [{}, {"kind": "train"}, {"kind": "train", "step": "x", "stage": []}])
def test_records_of_another_kind(record, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="^run=") as caught:
        run_report.write_run_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_report_takes_no_time_over_a_fifo(tmp_path):
    began = time.monotonic()
    os.mkfifo(tmp_path / "evaluation.json")
    assert [*run_report.evaluations(tmp_path)] and time.monotonic() - began < 5
