"""What makes two runs of the same command on the same hardware bit-equal."""

import os

import torch

# cuBLAS reads the first when its first handle is made; with it GEMMs do not share workspaces between streams. NCCL's
# tuner picks an algorithm by message size and topology, and each adds in an order of its own.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def make_deterministic() -> None:
    """Only deterministic kernels in this process; call before torch touches a GPU. What is set already stays.

    A kernel that has no deterministic form raises RuntimeError from then on. Sums over ranks have a fixed order for
    a fixed number of ranks, so runs on other numbers of ranks still differ in the last digits.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
