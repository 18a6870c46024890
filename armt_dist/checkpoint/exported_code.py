"""The modelling code in an exported folder: compare it with this version's, and replace it.

Needs only transformers, like launch/ask.py.
"""

import filecmp
import json
import os
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .. import files

HERE = Path(__file__).parents[1] / "model"
STARTS = ("configuration_armt.py", "modeling_armt.py")
AUTO_MAP = {
    "AutoConfig": "configuration_armt.ARMTConfig",
    "AutoModelForCausalLM": "modeling_armt.ARMTForCausalLM",
}
REFRESH = "python launch/consolidate.py --refresh {folder}"


def code_files() -> list[Path]:
    """List the files that an export carries: configuration, model, and their imports from this package."""
    starts = [HERE / name for name in STARTS]
    imported = {Path(file) for start in starts for file in get_relative_import_files(start)}
    return sorted({*starts, *imported})


def is_stale(folder: Path) -> bool:
    """Return whether `folder` holds code of another version."""
    if not (folder / STARTS[1]).is_file():
        return False
    return any(
        not (folder / file.name).is_file() or not filecmp.cmp(file, folder / file.name, shallow=False)
        for file in code_files()
    )


def refresh(folder: Path) -> list[str]:
    """Replace the code in `folder` by this version's and return the names of the changed files.

    Each file is replaced as a whole. Weights, tokenizer and configuration stay as they are, except that config.json may
    get its `auto_map`. Raises ValueError, in one line, for a folder without an ARMT, and OSError.
    """
    config_file = folder / "config.json"
    try:
        config = files.read_json(config_file)
    except (OSError, ValueError) as error:
        raise ValueError(f"refresh={folder}: no readable config.json in it ({error})") from None
    if not isinstance(config, dict) or config.get("model_type") != "armt":
        raise ValueError(f"refresh={folder}: is not an ARMT; give a folder that launch/consolidate.py wrote")
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
    """Write a file so that readers see either the old or the new content; keep the old mode."""
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        staging.write_bytes(content)
        if target.exists():
            shutil.copymode(target, staging)
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)
