"""The modelling code that lies in an exported folder: is it this version's, and how it is replaced.

Needs nothing but transformers, as launch/ask.py does.
"""

import filecmp
import json
import os
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

HERE = Path(__file__).parents[1] / "model"
STARTS = ("configuration_armt.py", "modeling_armt.py")
AUTO_MAP = {
    "AutoConfig": "configuration_armt.ARMTConfig",
    "AutoModelForCausalLM": "modeling_armt.ARMTForCausalLM",
}
REFRESH = "python launch/consolidate.py --refresh {folder}"


def code_files() -> list[Path]:
    """The files that an export carries: configuration and model, and what they import of this package."""
    starts = [HERE / name for name in STARTS]
    imported = {Path(file) for start in starts for file in get_relative_import_files(start)}
    return sorted({*starts, *imported})


def is_stale(folder: Path) -> bool:
    """Return whether the code in `folder` is there and not this version's."""
    if not (folder / STARTS[1]).is_file():
        return False
    return any(
        not (folder / file.name).is_file() or not filecmp.cmp(file, folder / file.name, shallow=False)
        for file in code_files()
    )


def refresh(folder: Path) -> list[str]:
    """Put this version's code into `folder` and return the names of the files that changed.

    Each file is replaced as a whole; weights, tokenizer and configuration keep every byte, but for an `auto_map` that
    config.json may lack. Raises ValueError, in one line, for a folder without an ARMT; OSError where it cannot write.
    """
    config_file = folder / "config.json"
    try:
        config = json.loads(config_file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"refresh={folder}: no readable config.json in it ({error})") from None
    if not isinstance(config, dict) or config.get("model_type") != "armt":
        raise ValueError(f"refresh={folder}: holds no ARMT; give a folder that launch/consolidate.py wrote")
    changed = []
    for file in code_files():
        target = folder / file.name
        if not target.is_file() or not filecmp.cmp(file, target, shallow=False):
            replace(target, file.read_bytes())
            changed.append(file.name)
    if config.get("auto_map") != AUTO_MAP:
        replace(config_file, (json.dumps({**config, "auto_map": AUTO_MAP}, indent=2, sort_keys=True) + "\n").encode())
        changed.append(config_file.name)
    return changed


def replace(target: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old or the new one; it keeps the old one's mode."""
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        staging.write_bytes(content)
        if target.exists():
            shutil.copymode(target, staging)
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)
