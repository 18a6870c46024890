"""DeepSpeed's private parts that concern checkpoint files, one function each; the others are in `zero3.private`.

Each docstring names the version that the part was seen in. tests/unit/test_deepspeed_files.py fails if DeepSpeed
changes one. DeepSpeed is imported inside the functions: an export needs only `read_tensors`.
"""

import io
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


class Inert:
    """Stands in for an object of DeepSpeed's that is not needed."""


# The only classes that DeepSpeed 0.19.8 pickles beside tensors and plain values, and what stands in for each.
PICKLED: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Inert,
}


def read_tensors(path: Path) -> Any:
    """Map a file of tensors and plain values from disk, by torch's restricted unpickler and without DeepSpeed.

    A file with anything else in it, or a damaged one, raises one of many exceptions.
    """
    with torch.serialization.safe_globals([(kind, name) for name, kind in PICKLED.items()]):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


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
