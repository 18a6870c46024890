"""Rows of JSON lines, of Parquet files and of the `datasets` library, each with the place where it stands."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...config import ConfigError, one_line
from ...files import JSON_BYTES, open_regular, parse_json
from ..sections import HubDataset
from ..text.files import Stamp, TextFile
from ..text.stream import fingerprint
from .forms import kind

# Rows of a Parquet file that are in memory at a time.
BATCH_ROWS = 64


class Row(NamedTuple):
    """A row, and where it stands, for messages."""

    where: str
    values: dict[str, Any]


def read_files(files: Sequence[TextFile], field: str) -> Iterator[Row]:
    """Yield the rows of files. Raises ConfigError naming `field`, the file and the line that cannot be read."""
    for file in files:
        where = f"{field}={file.path}"
        reader = READERS.get(file.path.suffix.lower())
        if reader is None:
            raise ConfigError(f"{where}: expected a name that ends with one of {', '.join(READERS)}; convert the file")
        try:
            yield from reader(file.path, where)
            if Stamp.of(os.stat(file.path)) != file.stamp:
                raise ConfigError(f"{where}: changed while it was read; start again when nothing writes to it")
        except OSError as error:
            raise ConfigError(
                f"{where}: {error.strerror or one_line(error)}; restore the file or leave it out"
            ) from None


def read_lines(path: Path, where: str) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object a line. Raises ConfigError and OSError."""
    number = 0
    with open_regular(path) as file:
        while line := file.readline(JSON_BYTES + 1):
            number += 1
            here = f"{where}, line {number}"
            if len(line) > JSON_BYTES:
                raise ConfigError(f"{here}: more than {JSON_BYTES} bytes; write one object a line")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                found = parse_json(text)
            except UnicodeDecodeError as error:
                raise ConfigError(f"{here}: not UTF-8 (byte {error.start} of the line); convert the file") from None
            except ValueError as error:
                raise ConfigError(f"{here}: not valid JSON ({one_line(error)}); write one object a line") from None
            if not isinstance(found, dict):
                raise ConfigError(f"{here}: expected a JSON object, got {kind(found)}; write one object a line")
            yield Row(here, found)


def read_parquet(path: Path, where: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file. Raises ConfigError and OSError."""
    # Slow to import; other files should not pay for it.
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{where}, row {number}", values)
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{where}: not a readable Parquet file ({one_line(error)}); write it again") from None


Reader = Callable[[Path, str], Iterator[Row]]
READERS: dict[str, Reader] = {".jsonl": read_lines, ".json": read_lines, ".parquet": read_parquet}


def dataset_identity(config: HubDataset, field: str) -> str:
    """Return what changes with the content of a data set. Raises ConfigError if it cannot be found."""
    import datasets

    try:
        return fingerprint(config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error, limit=300)
        raise ConfigError(f"{field}.name={config.name}: cannot be read: {reason}; correct the name") from None


def read_dataset(config: HubDataset, split: str, field: str) -> Iterator[Row]:
    """Yield the rows of one split of a data set. Raises ConfigError naming the row after which reading fails."""
    # The import takes a second, which files should not pay.
    import datasets

    where, number = f"{field}.name={config.name} (split {split})", 0
    try:
        stream = datasets.load_dataset(
            config.name, config.config, data_files=config.data_files, split=split, streaming=True
        )
        for values in stream:
            number += 1
            yield Row(f"{where}, row {number}", dict(values))
    except ConfigError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error, limit=300)
        raise ConfigError(f"{where}: cannot be read after row {number}: {reason}; correct it") from None
