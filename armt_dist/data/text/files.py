"""Find and read local text files, and split them into training and validation by whole files."""

import codecs
import os
from collections.abc import Iterable, Iterator, Sequence
from glob import has_magic, iglob
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from ...config import ConfigError
from ...files import open_regular
from ..sampling import place

# Bytes that are read at once.
PIECE = 2**18


class Stamp(NamedTuple):
    """What tells, without reading it, that a file has changed."""

    bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """Return the stamp in what `stat` says."""
        return cls(status.st_size, status.st_mtime_ns)


class TextFile(NamedTuple):
    """A file, and its name below the folder that was given: the same on every machine."""

    path: Path
    name: str
    stamp: Stamp


class TextFacts(NamedTuple):
    """What a run records about a text that it read."""

    name: str
    bytes: int  # as UTF-8
    sha256: str


def find_files(entries: str | Sequence[str], field: str = "files") -> list[TextFile]:
    """List the files that `entries` name, by path: files, folders (all visible files below) and globs (with `**`).

    Raises ConfigError naming an entry that matches no file.
    """
    check_files(entries, field)
    found: dict[Path, TextFile] = {}
    for entry in listed(entries):
        path = Path(entry).expanduser()
        folder = path if path.is_dir() else Path(*takewhile(lambda part: not has_magic(part), path.parent.parts))
        for file in matching(path):
            found[file] = TextFile(file, file.relative_to(folder).as_posix(), stamp_of(file, field))
    return sorted(found.values())


def stamp_of(path: Path, field: str) -> Stamp:
    """Return the stamp of a file. Raises ConfigError if it has vanished."""
    try:
        return Stamp.of(path.stat())
    except OSError as error:
        raise ConfigError(f"{field}={path}: {error.strerror}; restore the file or leave it out") from None


def check_files(entries: str | Sequence[str], field: str) -> None:
    """Raise ConfigError naming an entry that matches no file."""
    for entry in listed(entries):
        if next(matching(Path(entry).expanduser()), None) is None:
            raise ConfigError(f"{field}={entry}: no such file; give a text file, a folder of them or a glob")


def listed(entries: str | Sequence[str]) -> Sequence[str]:
    """Return one entry as a list of one."""
    return [entries] if isinstance(entries, str) else entries


def matching(path: Path) -> Iterator[Path]:
    """Yield the files that a path names: itself, those below a folder, or those that match a glob."""
    matches = path.rglob("*") if path.is_dir() else map(Path, iglob(str(path), recursive=True))
    return (match for match in matches if match.is_file() and not match.name.startswith("."))


def read_text(path: Path, field: str = "files") -> str:
    """Read a UTF-8 text file, with its line ends. Raises ConfigError as `read_pieces` does."""
    return "".join(read_pieces(path, field))


def read_pieces(path: Path, field: str = "files", stamp: Stamp | None = None) -> Iterator[str]:
    """Read a UTF-8 text file piece by piece, with its line ends.

    Raises ConfigError if it is empty, binary, unreadable, or changes while it is read; stamp: what it had before.
    """
    reason = "changed while it was read; start again when nothing writes to it"
    empty, read, rest = True, 0, b""
    try:
        with open_regular(path) as file:
            before = stamp or Stamp.of(os.fstat(file.fileno()))
            while piece := file.read(PIECE):
                # A hole of a file holds any number of NUL bytes.
                if b"\0" in piece:
                    raise ConfigError(f"{field}={path}: a binary file (contains NUL bytes); leave it out")
                text, used = codecs.utf_8_decode(rest + piece, "strict", False)
                rest, read, start = (rest + piece)[used:], read + used, read
                empty = empty and not text.strip()
                yield text.removeprefix("\ufeff") if start == 0 else text
            codecs.utf_8_decode(rest, "strict", True)
            if Stamp.of(os.fstat(file.fileno())) != before:
                raise ConfigError(f"{field}={path}: {reason}")
    except OSError as error:
        raise ConfigError(f"{field}={path}: {error.strerror}; restore the file or leave it out") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{field}={path}: not UTF-8 text (byte {read + error.start}); convert it or leave it out"
        ) from None
    if empty:
        raise ConfigError(f"{field}={path}: the file is empty; leave it out")


def read_texts(files: Iterable[TextFile], facts: list[TextFacts]) -> Iterator[Iterator[str]]:
    """Yield the pieces of each file, and append to `facts` what was read, file by file. Raises ConfigError."""
    for file in files:
        yield read_known(file, facts)


def read_known(file: TextFile, facts: list[TextFacts]) -> Iterator[str]:
    """Yield the pieces of a file that is as it was found, and append its facts."""
    size, hashed = 0, sha256()
    for piece in read_pieces(file.path, stamp=file.stamp):
        content = piece.encode()
        size += len(content)
        hashed.update(content)
        yield piece
    facts.append(TextFacts(file.name, size, hashed.hexdigest()))


def split_files(
    files: list[TextFile], validation: list[TextFile] | None, fraction: float
) -> tuple[list[TextFile], list[TextFile]]:
    """Split into training and validation files, without a common file.

    validation: the validation files; None holds out about `fraction` of the files, at least one, by a hash of their
    names: neither seeds nor further files change which. Raises ConfigError if nothing is left to train on, or if a
    single file would have to be both.
    """
    if validation is None:
        if fraction and len(files) == 1:
            raise ConfigError(
                f"files={files[0].path}: one file cannot serve both training and validation; set validation_files "
                "or validation_fraction=0"
            )
        least = min((place(file.name) for file in files), default=0) if fraction else 0
        validation = [file for file in files if fraction and place(file.name) <= max(fraction, least)]
    held_out = {file.path.resolve() for file in validation}
    training = [file for file in files if file.path.resolve() not in held_out]
    if not training:
        raise ConfigError(f"validation_files={validation[0].path}: no file is left to train on; hold out fewer")
    return training, validation
