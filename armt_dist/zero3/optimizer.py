"""Which implementation of the optimizer a run uses: one that no compiler has to build, where there is one as fast.

DeepSpeed compiles its own operators when they are first used: FusedAdam, Lamb and Lion with nvcc, its CPU Adam with a
C++ compiler. Machines with pip wheels and a driver have neither. torch's fused AdamW is as fast as FusedAdam.
"""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from ..config import ConfigError

ADAM = ("Adam", "AdamW")
# What DeepSpeed has in CUDA only.
COMPILED = ("Lamb", "Lion", "OneBitAdam", "OneBitLamb", "ZeroOneAdam")


class Chosen(NamedTuple):
    """The keys of a ds_config that name an implementation."""

    params: dict  # optimizer.params
    forced: bool  # zero_force_ds_cpu_optimizer
    name: str  # for people


def choose(ds: dict, device_type: str) -> Chosen:
    """Choose the implementation of `ds["optimizer"]` on a device: "cuda" or "cpu".

    What the user says (`torch_adam`, `fused`) is kept. Raises ConfigError for an optimizer that needs a compiler which
    this machine lacks.
    """
    kind, params = ds["optimizer"].get("type", "AdamW"), dict(ds["optimizer"].get("params", {}))
    forced = ds.get("zero_force_ds_cpu_optimizer", True)
    offloaded = ds["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    if kind not in ADAM:
        if kind in COMPILED and device_type == "cuda" and not offloaded:
            need_nvcc(f"optimizer.type={kind}")
        return Chosen(params, forced, f"DeepSpeed's or torch's {kind}")
    if offloaded and not params.get("torch_adam", not has_cxx()):
        return Chosen(params, forced, f"DeepSpeed's CPU {kind}, which is compiled at its first use (about a minute)")
    if params.setdefault("torch_adam", True):
        if device_type == "cuda" and "foreach" not in params:
            params.setdefault("fused", True)
        # DeepSpeed refuses any other optimizer beside an offload unless it is told not to.
        forced = forced and not offloaded
        where = " on the host, because there is no C++ compiler (CXX) for DeepSpeed's" if offloaded else ""
        return Chosen(params, forced, f"torch's {'fused ' if params.get('fused') else ''}{kind}{where}")
    if device_type == "cuda":
        need_nvcc("optimizer.params.torch_adam=False")
    return Chosen(params, forced, f"DeepSpeed's {kind}, which is compiled at its first use")


def has_cxx() -> bool:
    """Tell whether torch would find a C++ compiler."""
    return shutil.which(os.environ.get("CXX", "c++")) is not None


def need_nvcc(setting: str) -> None:
    """Raise ConfigError where there is no nvcc for an operator that a `setting` asks for."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin/nvcc").exists():
        raise ConfigError(
            f"ds_config {setting}: DeepSpeed compiles it with nvcc, and CUDA_HOME={CUDA_HOME} has none; set "
            "optimizer.type=AdamW without torch_adam, or load a CUDA toolkit"
        )
