"""Local text files: found, read, and split into training and validation by whole files."""

from collections.abc import Sequence
from glob import glob
from pathlib import Path

from ...config import ConfigError
from ..sampling import generator


def find_files(entries: str | Sequence[str], field: str = "files") -> list[Path]:
    """Files, folders (every file below, hidden ones apart) and globs (`**` allowed) -> different files, sorted.

    Raises ConfigError naming the entry that stands for no file.
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
    """A UTF-8 text file, line ends as they are. Raises ConfigError for one that is empty, binary or unreadable."""
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
        raise ConfigError(f"{field}={path}: a binary file (it has NUL bytes); leave it out")
    return text


def split_files(files: list[Path], validation: list[Path] | None, fraction: float) -> tuple[list[Path], list[Path]]:
    """Training and validation files without a file in common.

    `validation` names the latter; None holds out `fraction` of the files, the same ones whatever the seed.
    Raises ConfigError where nothing is left to train on, or a single file should be both.
    """
    if validation is None:
        if fraction and len(files) == 1:
            raise ConfigError(
                f"files={files[0]}: one file cannot be both; name others in validation_files "
                "or set validation_fraction=0"
            )
        count = max(1, round(fraction * len(files))) if fraction else 0
        order = generator("files", 0, "validation", len(files)).permutation(len(files))
        validation = [files[i] for i in sorted(order[:count])]
    held_out = {path.resolve() for path in validation}
    training = [path for path in files if path.resolve() not in held_out]
    if not training:
        raise ConfigError(f"validation_files={validation[0]}: no file is left to train on; hold out fewer")
    return training, validation
