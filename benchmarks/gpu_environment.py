"""What a machine has: GPU, driver, compiler, NCCL, attention kernels, the rate of a product and of a copy.

    python benchmarks/gpu_environment.py [--device cpu]

Prints a table and one JSON line last.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable

import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from armt_dist.versions import installed

PACKAGES = ("armt_dist", "torch", "deepspeed", "transformers", "triton")
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Mean seconds of `work`, after two runs to warm up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        work()
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - started) / repeats


def attention(device: torch.device, backend: SDPBackend, mask: bool) -> str:
    """Microseconds forward of a segment's attention in bfloat16 under one kernel; why not, where it does not run."""
    shape = (1, 32, 1040, 64) if device.type == "cuda" else (1, 4, 64, 16)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    given = torch.zeros(1, 1, shape[2], shape[2], device=device, dtype=torch.bfloat16) if mask else None

    def run() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given, is_causal=not mask)

    try:
        with sdpa_kernel(backend):
            return f"{seconds(run, device) * 1e6:.0f} us"
    except RuntimeError as error:
        return f"no ({str(error).splitlines()[0][:60]})"


def facts(device: torch.device) -> dict[str, str]:
    """Everything by name."""
    cuda = device.type == "cuda"
    found = {"host": f"{platform.machine()}, {os.cpu_count()} CPU cores, {psutil.virtual_memory().total / 1e9:.0f} GB"}
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {
            "GPU": f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 1e9:.1f} GB",
            "compute capability": f"{properties.major}.{properties.minor}",
            "driver": subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0],
            "CUDA of torch, NCCL": f"{torch.version.cuda}, {'.'.join(map(str, torch.cuda.nccl.version()))}",
        }
    found |= {
        "nvcc, c++": ", ".join(str(shutil.which(name) or "none") for name in ("nvcc", "c++")),
        "versions": ", ".join(f"{name} {version}" for name, version in installed(PACKAGES).items() if version),
    }
    n, dtype = (8192, torch.bfloat16) if cuda else (256, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    found["product"] = f"{2 * n**3 / seconds(lambda: a @ b, device) / 1e12:.3g} TFLOP/s ({n}, {dtype})"
    large = torch.empty(2**28 if cuda else 2**22, device=device)
    found["copy"] = f"{8 * large.numel() / seconds(large.clone, device) / 1e9:.3g} GB/s, read and written"
    for backend in BACKENDS:
        for mask in (False, True):
            name = f"attention {backend.name.lower()}{', dense mask' if mask else ', causal'}"
            found[name] = attention(device, backend, mask)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    found = facts(torch.device(parser.parse_args().device))
    for name, value in found.items():
        print(f"{name:<42}{value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
