"""Find and read local text files, and split them into training and validation by whole files."""

from collections.abc import Sequence
from glob import glob
from pathlib import Path

from ...config import ConfigError
from ..sampling import generator


def find_files(entries: str | Sequence[str], field: str = "files") -> list[Path]:
    """List the files that `entries` name, sorted: files, folders (all visible files below) and globs (with `**`).

    Raises ConfigError naming an entry that matches no file.
    """
    found: set[Path] = set()
    for entry in [entries] if isinstance(entries, str) else entries:
        path = Path(entry).expanduser()
        matches = path.rglob("*") if path.is_dir() else map(Path, glob(str(path), recursive=True))
        files = {match for match in matches if match.is_file() and not match.name.startswith(".")}
        if not files:
            raise ConfigError(f"{field}={entry}: no such file; give a text file, a folder of them or a glob")
        found |= files
    return sorted(found)


def read_text(path: Path, field: str = "files") -> str:
    """Read a UTF-8 text file, with its line ends. Raises ConfigError if it is empty, binary or unreadable."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}={path}: {error.strerror}; restore the file or leave it out") from None
    if not content.strip():
        raise ConfigError(f"{field}={path}: the file is empty; leave it out")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}={path}: not UTF-8 text (byte {error.start}); convert it or leave it out") from None
    if "\0" in text:
        raise ConfigError(f"{field}={path}: a binary file (contains NUL bytes); leave it out")
    return text


def split_files(files: list[Path], validation: list[Path] | None, fraction: float) -> tuple[list[Path], list[Path]]:
    """Split into training and validation files, without a common file.

    validation: the validation files; None holds out `fraction` of the files, the same ones for every seed.
    Raises ConfigError if nothing is left to train on, or if a single file would have to be both.
    """
    if validation is None:
        if fraction and len(files) == 1:
            raise ConfigError(
                f"files={files[0]}: one file cannot serve both training and validation; set validation_files "
                "or validation_fraction=0"
            )
        count = max(1, round(fraction * len(files))) if fraction else 0
        order = generator("files", 0, "validation", len(files)).permutation(len(files))
        validation = [files[i] for i in sorted(order[:count])]
    held_out = {path.resolve() for path in validation}
    training = [path for path in files if path.resolve() not in held_out]
    if not training:
        raise ConfigError(f"validation_files={validation[0]}: no file is left to train on; hold out fewer")
    return training, validation
