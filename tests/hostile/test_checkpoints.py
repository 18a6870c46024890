"""Checkpoints that are not what their names and manifests say: none is loaded or exported, and damaged ones heal."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.checkpoints import TAGS, write_checkpoints
from support.hostile import make_hashes_fit
from support.ranks import spawn

from armt_dist.checkpoint import folder as checkpoint
from armt_dist.checkpoint import load
from armt_dist.checkpoint.export import export
from armt_dist.checkpoint.folder import CheckpointError
from armt_dist.checkpoint.zero_shards import open_checkpoint
from armt_dist.config import ConfigError
from armt_dist.training.progress import Progress
from armt_dist.training.trainer import Trainer

SHARDS = [f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for rank in range(2) for kind in ("model", "optim")]


def write_root(root: Path) -> Path:
    """Write two whole checkpoints of two ranks, whose files have the names that are loaded, and return their folder."""
    write_checkpoints(root)
    for tag in TAGS:
        for path in (root / tag).glob("shard_*"):
            path.unlink()
        for name in SHARDS:
            torch.save({"x": torch.full((100,), float(tag[-1]))}, root / tag / name)
        make_hashes_fit(root / tag)
    return root


@pytest.fixture
def root(tmp_path):
    return write_root(tmp_path / "checkpoints")


def flipped(folder: Path) -> None:
    content = bytearray((folder / SHARDS[1]).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / SHARDS[1]).write_bytes(content)


def mixed(folder: Path) -> None:
    shutil.copy(folder.with_name(TAGS[0]) / SHARDS[3], folder / SHARDS[3])


def renamed(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name(TAGS[0]), folder)


def changed(**facts):
    """Change a field of the manifest."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | facts))

    return change


def unlisted(name: str):
    """Plant a file of which the manifest knows nothing."""

    def plant(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / SHARDS[1], folder / name)

    return plant


def linked(folder: Path) -> None:
    (folder / SHARDS[0]).rename(folder.parent / "elsewhere.pt")
    (folder / SHARDS[0]).symlink_to(folder.parent / "elsewhere.pt")


def linked_folder(folder: Path) -> None:
    (folder.parent / "zero").mkdir()
    shutil.copy(folder / SHARDS[0], folder.parent / "zero")
    (folder / "zero").symlink_to(folder.parent / "zero")


def fewer_ranks(folder: Path) -> None:
    (folder / SHARDS[3]).unlink()
    make_hashes_fit(folder)


def code(folder: Path) -> None:
    torch.save({"x": SimpleNamespace()}, folder / SHARDS[0])
    make_hashes_fit(folder)


DAMAGE = {
    "flipped bit": (flipped, "is damaged"),
    "shard of another checkpoint": (mixed, "is damaged"),
    "another checkpoint under its name": (renamed, f"its manifest.json is that of {TAGS[0]}"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest.json"),
    "manifest without files": (changed(files={}), "manifest.json lists no files"),
    "manifest of a thousand million ranks": (changed(world_size=10**15), "its 4 files are not those of 10000000000000"),
    "manifest of three ranks": (changed(world_size=3), "its 4 files are not those of 3 ranks"),
    "manifest of less than no ranks": (changed(world_size=-1), "no readable manifest.json"),
    "manifest of another kind": (changed(state=[]), "no readable manifest.json"),
    "manifest with a key more": (changed(more=1), "no readable manifest.json"),
    "unlisted shard": (unlisted("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), "is not in manifest.json"),
    "unlisted hidden shard": (unlisted(".zero_pp_rank_0_mp_rank_00_optim_states.pt"), "is not in manifest.json"),
    "unlisted file below": (unlisted("zero/fp32.pt"), "zero/fp32.pt is not in manifest.json"),
    "unlisted generators": (unlisted("rank_0.safetensors"), "rank_0.safetensors is not in manifest.json"),
    "link to a file": (linked, "is a symbolic link"),
    "link to a folder": (linked_folder, "zero is a symbolic link"),
    "shards of fewer ranks": (fewer_ranks, "its 3 files are not those of 2 ranks"),
    "code": (code, "holds more than tensors and plain values"),
}


class Engine:
    """DeepSpeed's, which may not be asked."""

    def load_checkpoint(self, *_, **__):
        pytest.exit("DeepSpeed loads")


def load_all(ranks, root: Path) -> dict[str, str]:
    """What loading each damaged checkpoint says, by the name of the damage."""
    said = {}
    for folder in sorted(root.iterdir()):
        try:
            load.load_checkpoint(Engine(), folder, TAGS[1], print)
        except ConfigError as error:
            said[folder.name] = str(error)
    return said


def test_none_is_loaded(tmp_path):
    """`--resume TAG` as well as the best checkpoint of a stage: both ranks say the same, and nobody waits."""
    for name, (damage, _) in DAMAGE.items():
        damage(write_root(tmp_path / name) / TAGS[1])
    first, second = spawn(2, load_all, tmp_path)
    assert first == second
    for name, (_, says) in DAMAGE.items():
        assert says in first[name] and TAGS[1] in first[name] and "\n" not in first[name], first.get(name)


EXPORTED = [
    name for name in DAMAGE if name not in ("another checkpoint under its name", "code") and "ranks" not in name
]


@pytest.mark.parametrize("name", EXPORTED)
def test_none_is_exported(name, root, tmp_path):
    damage, says = DAMAGE[name]
    damage(root / TAGS[1])
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    for source, tag in ((tmp_path, TAGS[1]), (root / TAGS[1], None)):
        with pytest.raises(CheckpointError, match=says):
            export(source, tmp_path / "out", tag)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    ["../../x", "../checkpoints/step_00000002", "/etc", "step_2", "step_00000002/", "step_00000002\n", "universal-x"]
    + ["staging-step_00000002", "", ".", "step_0000000२", "step_" + "0" * 5000, "\0", "step_00000002/../step_00000004"],
)
def test_only_plain_tags_are_resumed(name, root):
    (root.parent / "x").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint's name; for example step_00000100") as caught:
        checkpoint.find_tag(root, name)
    assert len(str(caught.value)) < 300


def test_a_tag_that_is_missing_is_answered_by_those_that_exist(root):
    with pytest.raises(CheckpointError, match=f"there is no step_00000009 in .*; there are: {TAGS[0]}, {TAGS[1]}$"):
        checkpoint.find_tag(root, "step_00000009")
    assert checkpoint.find_tag(root, TAGS[0]) == TAGS[0] and checkpoint.find_tag(root, "latest") == TAGS[1]


def bytes_read(work) -> int:
    """Bytes that this process asks of files while `work` runs."""

    def asked() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = asked()
    work()
    return asked() - before


def test_verifying_reads_every_file_once(root):
    for name in SHARDS:
        (root / TAGS[1] / name).write_bytes(bytes(2**20))
    make_hashes_fit(root / TAGS[1])
    size = sum(path.stat().st_size for path in (root / TAGS[1]).iterdir())
    assert size <= bytes_read(lambda: checkpoint.verify_checkpoint(root / TAGS[1])) <= 1.1 * size


# --- healing ---------------------------------------------------------------------------------------------------------


def test_an_older_step_that_is_saved_again_takes_the_place_of_the_newer_one(root, monkeypatch):
    """After `--resume` of an older checkpoint."""
    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: 1)
    flipped(root / TAGS[1])
    for _ in range(2):
        staged = checkpoint.staging(root / TAGS[1])
        checkpoint.make_anew(staged)
        torch.save({}, staged / SHARDS[0])
        checkpoint.publish(root, TAGS[1], [checkpoint.hash_files(staged, [staged / SHARDS[0]])], {})
        checkpoint.verify_checkpoint(root / TAGS[1])
        assert {path.name for path in root.iterdir()} == {*TAGS, "latest"}


def test_the_checkpoint_of_an_older_step_is_not_pruned_for_newer_ones(root):
    said = []
    trainer = SimpleNamespace(root=root, say=said.append, config=SimpleNamespace(train=SimpleNamespace()))
    trainer.config.train.keep_last, trainer.config.train.keep_every = 1, None
    Trainer.prune(trainer, {"step_00000001", TAGS[0]})
    assert checkpoint.tags(root) == [*TAGS] and not said


# --- state -----------------------------------------------------------------------------------------------------------

PROGRESS = [
    {"step": -1},
    {"step": "3"},
    {"step": True},
    {"step": 1.5},
    {"step": 10**30},
    {"stage": -1},
    {"recent": "abc"},
    {"recent": [None]},
    {"best_tag": "../../x"},
    {"best_tag": "step_00000001\n"},
    {"losses": {"a": 1}},
    {"nope": 1},
    {"validation_due": "no"},
]


@pytest.mark.parametrize("saved", PROGRESS, ids=str)
def test_progress(saved):
    with pytest.raises(ConfigError, match=f"checkpoint: its progress.{next(iter(saved))}") as caught:
        Progress.restored(saved)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert Progress.restored(json.loads(json.dumps(Progress(3, recent=(0.5,), best_tag=TAGS[0])._asdict()))).step == 3


STATES = [
    {},
    {"progress": {"step": 3}, "task": {}},
    {"progress": {"step": 4, "stage": 1}, "task": {}},
    {"progress": {"step": 4}},
    {"progress": {"step": 4}, "task": {"train": {"position": {"nope": 1}}}},
    {"progress": {"step": 4}, "task": {}, "carried": {"nope": 1}},
]


@pytest.mark.parametrize("state", STATES, ids=str)
def test_the_state_of_another_run(state, tmp_path):
    def load_task(state: dict) -> None:
        assert not state, "no position"

    def restore_carried(tag: str, layout: dict) -> None:
        if layout:
            raise TypeError("unexpected keyword argument 'nope'")

    trainer = SimpleNamespace(
        root=tmp_path,
        stages=[None],
        task=SimpleNamespace(load_state_dict=load_task),
        restore_carried=restore_carried,
    )
    with pytest.raises(ConfigError) as caught:
        Trainer.restore_state(trainer, TAGS[1], state)
    assert "\n" not in str(caught.value)
    Trainer.restore_state(trainer, TAGS[1], {"progress": {"step": 4}, "task": {}})
    assert trainer.progress.step == 4


SHAPES = [{"model.w": torch.Size([4])}]
SHARD_CONTENTS = {
    "no mapping": ([], {"param_shapes": SHAPES}),
    "optimizer is no mapping": ({"optimizer_state_dict": []}, {"param_shapes": SHAPES}),
    "ranks are text": ("1", {"param_shapes": SHAPES}),
    "ranks without end": (10**12, {"param_shapes": SHAPES}),
    "no ranks": (0, {"param_shapes": SHAPES}),
    "shapes are numbers": (1, {"param_shapes": [{"model.w": 4}]}),
    "shapes are no list": (1, {"param_shapes": 3}),
    "shapes are huge": (1, {"param_shapes": [{"model.w": torch.Size([2**40, 2**20])}]}),
    "shapes are negative": (1, {"param_shapes": [{"model.w": torch.Size([-4])}]}),
    "frozen is no mapping": (1, {"param_shapes": SHAPES, "frozen_param_shapes": [1]}),
    "frozen pieces are missing": (1, {"param_shapes": SHAPES, "frozen_param_shapes": SHAPES[0]}),
    "model is no mapping": (1, [1]),
}


@pytest.mark.parametrize("name", SHARD_CONTENTS)
def test_what_an_export_reads(name, tmp_path):
    world, model = SHARD_CONTENTS[name]
    if isinstance(world, int | str):
        state = {"zero_stage": 3, "partition_count": world, "fp32_flat_groups": [torch.zeros(4)]}
        world = {"optimizer_state_dict": state}
    torch.save(world, tmp_path / SHARDS[1])
    torch.save(model, tmp_path / SHARDS[0])
    with pytest.raises(ConfigError, match="^checkpoint=") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
