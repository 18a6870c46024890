"""DeepSpeed's private parts that concern checkpoint files, one function each; the others are in `zero3.private`.

Each docstring names the version that the part was seen in. tests/unit/test_deepspeed_files.py fails if DeepSpeed
changes one. DeepSpeed is imported inside the functions: an export needs only `read_tensors`.
"""

import io
import os
import pickle
import pickletools
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..files import open_regular


class Inert:
    """Stands in for an object of DeepSpeed's that is not needed."""


# The only classes that DeepSpeed 0.19.8 pickles beside tensors and plain values, and what stands in for each.
PICKLED: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Inert,
}


# What their tensors and plain values are made of. torch's own list is longer: it has bytearray, for example, which
# makes gigabytes of a number.
BUILT_FROM = frozenset(
    (
        *("collections.OrderedDict", "torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter"),
        *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch._tensor._rebuild_from_type_v2"),
        *PICKLED,
    )
)


def read_tensors(path: Path) -> Any:
    """Map a file of tensors and plain values from disk, by torch's restricted unpickler and without DeepSpeed.

    A file with anything else in it, one that claims more values than it holds, or a damaged one, raises one of many
    exceptions, before memory is taken for it.
    """
    check_archive(path)
    with torch.serialization.safe_globals([(kind, name) for name, kind in PICKLED.items()]):
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    claimed, held = tensor_bytes(content), path.stat().st_size
    if claimed > held:
        raise ValueError(f"its tensors claim {claimed} bytes, and the file has {held}")
    return content


def check_archive(path: Path) -> None:
    """Check that a file of torch's has its records as they are, once each, and pickles only what tensors need.

    Raises ValueError, UnpicklingError, and many exceptions for a damaged file.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        held = os.fstat(file.fileno()).st_size
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed")
        if sum(record.file_size for record in records) > held:
            raise ValueError(f"its records claim more than the {held} bytes of the file")
        if len({record.filename for record in records}) < len(records):
            raise ValueError("it has several records of one name")
        for record in records:
            if record.filename.endswith(".pkl"):
                for code, name, _ in pickletools.genops(archive.read(record)):
                    if code.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                        check_built_from(str(name).replace(" ", "."))


def check_built_from(name: str) -> None:
    """Raise UnpicklingError unless a pickle may name this class or function."""
    inside = getattr(torch, name.removeprefix("torch."), None) if name.startswith("torch.") else None
    if name not in BUILT_FROM and not isinstance(inside, torch.dtype) and not name.endswith("Storage"):
        raise pickle.UnpicklingError(f"it names {name[:100]}")


def tensor_bytes(content: Any) -> int:
    """Return the bytes that all tensors in nested mappings and lists would take if each were copied."""
    total, seen, left = 0, set[int](), [content]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list | tuple | set):
            left.extend(value)
    return total


@contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Make DeepSpeed's own readers use torch's restricted unpickler.

    They pass `weights_only=False`, which would run any code in a file. Seen in DeepSpeed 0.19.8.
    """
    known = [getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in PICKLED]
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals(known):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextmanager
def writing_through(engine: Any, writer: Any) -> Iterator[None]:
    """Make the engine pass the files of its checkpoints to `writer`, a TorchCheckpointEngine.

    `engine.checkpoint_engine`, seen in DeepSpeed 0.19.8.
    """
    before, engine.checkpoint_engine = engine.checkpoint_engine, writer
    try:
        yield
    finally:
        engine.checkpoint_engine = before


def leave_out_recovery_script(engine: Any) -> None:
    """Keep the engine from copying its script into checkpoints: it runs any code that a checkpoint was pickled with.

    `engine._copy_recovery_script`, seen in DeepSpeed 0.19.8.
    """
    engine._copy_recovery_script = lambda path: None


@contextmanager
def reading_universal(engine: Any, universal: bool) -> Iterator[None]:
    """Make the engine expect a universal checkpoint, or not.

    `engine._config.load_universal_checkpoint`, seen in DeepSpeed 0.19.8, which takes it from the ds_config only.
    """
    config = engine._config
    before, config.load_universal_checkpoint = config.load_universal_checkpoint, universal
    try:
        yield
    finally:
        config.load_universal_checkpoint = before


def write_universal(source: Path, target: Path) -> None:
    """Convert a ZeRO checkpoint to DeepSpeed's universal format, silently, in the existing folder `target`.

    `deepspeed.checkpoint.ds_to_universal.main`, a script seen in DeepSpeed 0.19.8. It prints to standard output and
    progress bars, and writes the file `latest_universal` beside `target`. Raises many exceptions for damaged files.
    """
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    silent = io.StringIO()
    with restricted_unpickling(), redirect_stdout(silent), redirect_stderr(silent):
        ds_to_universal.main(arguments)
    (target.parent / "latest_universal").unlink(missing_ok=True)
