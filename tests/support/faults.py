"""Run the real training command with faults planted in it. For tests and benchmarks/faults.py.

    RANK=.. WORLD_SIZE=.. python tests/support/faults.py nan:step=5,rank=1 -- --ds_config .. train.max_steps=9

A plant patches one function of the package in this process and takes effect at its step and rank only. Steps count the
global batches from 1; they are those of metrics.jsonl until a rollback leaves some out. `start` runs a world of such
processes without a launcher, so that each rank's exit code and stderr can be seen. Faults that need no patch (SIGSTOP,
SIGKILL) are sent to the processes.
"""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


class Plant(NamedTuple):
    """What happens (a key of PLANTS), when and where; step 0 or rank -1: always, everywhere."""

    what: str
    step: int = 0
    rank: int = -1
    segment: int = 0
    layer: int = 0
    size: float = 0.0

    def __str__(self) -> str:
        return f"{self.what}:" + ",".join(f"{name}={value}" for name, value in self._asdict().items() if name != "what")

    @classmethod
    def parse(cls, text: str) -> "Plant":
        """Read what `str` writes; fields may be left out."""
        what, _, rest = text.partition(":")
        pairs = (pair.split("=") for pair in rest.split(",") if pair)
        return cls(what, **{name: float(value) if name == "size" else int(value) for name, value in pairs})

    def here(self) -> bool:
        """True at the plant's rank and step; never outside a training step."""
        return Now.step > 0 and self.step in (0, Now.step) and self.rank in (-1, int(os.environ.get("RANK", 0)))


class Now:
    """The training step of this process, 0 outside one."""

    step = 0


def patch(owner: type | ModuleType, name: str, make: Callable) -> None:
    """Replace `owner.name` by `make(original)`."""
    original = getattr(owner, name)
    setattr(owner, name, wraps(original)(make(original)))


def clock() -> None:
    """Keep `Now.step` up to date."""
    from armt_dist.training import trainer

    def make(original):
        def train_step(parts, stage, progress, *args):
            Now.step = progress.batch + 1
            try:
                return original(parts, stage, progress, *args)
            finally:
                Now.step = 0

        return train_step

    patch(trainer, "train_step", make)


def nan(plant: Plant) -> None:
    """Make the rank's embedded batch NaN."""
    from armt_dist.model.modeling_armt import ARMTForCausalLM

    def make(original):
        return lambda *args: original(*args) * (float("nan") if plant.here() else 1)

    patch(ARMTForCausalLM, "embed_segments", make)


def loss(plant: Plant) -> None:
    """Add `size` to the rank's summed loss, without changing its gradients."""
    from armt_dist.runtime.executor import ScheduledLM

    def make(original):
        def sum_up(*args):
            totals = original(*args)
            return totals._replace(nll=totals.nll + plant.size) if plant.here() else totals

        return sum_up

    patch(ScheduledLM, "sum_up", make)


def memory(plant: Plant) -> None:
    """Fail an allocation of the rank in the backward pass, with torch's own error and words."""
    from armt_dist.runtime.cells import EagerCells

    def make(original):
        def back(*args):
            if plant.here():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")
            return original(*args)

        return back

    patch(EagerCells, "back", make)


def defect(plant: Plant) -> None:
    """Raise an error of our own on the rank, and let leaving the group wait for the others."""
    from armt_dist.distributed import rendezvous
    from armt_dist.training import train_step

    def make(original):
        def run_micro_batches(*args):
            if plant.here():
                raise KeyError("a planted defect")
            return original(*args)

        return run_micro_batches

    patch(train_step, "run_micro_batches", make)
    patch(rendezvous, "stop", lambda original: lambda: time.sleep(600))


def slow(plant: Plant) -> None:
    """Delay every cell of the rank by `size` seconds."""
    from armt_dist.model.modeling_armt import ARMTLayer

    def make(original):
        def cell(*args):
            time.sleep(plant.size if plant.here() else 0)
            return original(*args)

        return cell

    patch(ARMTLayer, "cell", make)


def write(plant: Plant) -> None:
    """Add `size` to what one segment and layer writes to the memory. For one micro-batch, block and chunk a step."""
    from armt_dist.model.modeling_armt import ARMTLayer

    layers, calls = {}, Counter()

    def make(original):
        def cell(layer, *args):
            y, update = original(layer, *args)
            # The forward runs layer by layer without a graph; the backward, with one, is left alone.
            if torch.is_grad_enabled() or not plant.here():
                return y, update
            index = layers.setdefault(layer, len(layers))
            calls[Now.step, index] += 1
            hit = (index, calls[Now.step, index]) == (plant.layer, plant.segment + 1)
            return y, update._replace(dv=update.dv + plant.size) if hit else update

        return cell

    patch(ARMTLayer, "cell", make)


def without(plant: Plant) -> None:
    """Leave out the global batch of `step`: the next one takes its place. Of several, name the last first."""
    from armt_dist.training.global_batch import Batches

    def make(original):
        def micro_batches(batches, split, step, difficulty):
            return original(batches, split, step + (split == "train" and step >= plant.step - 1), difficulty)

        return micro_batches

    patch(Batches, "micro_batches", make)


def stop(plant: Plant) -> None:
    """Send SIGUSR1 to this process within the step: the run stops after the next one."""
    from armt_dist.training import train_step

    def make(original):
        def run_micro_batches(*args):
            if plant.here():
                os.kill(os.getpid(), signal.SIGUSR1)
            return original(*args)

        return run_micro_batches

    patch(train_step, "run_micro_batches", make)


def wrong_time(plant: Plant) -> None:
    """Set this process's clock off by the seconds in the file $WRONG_TIME/RANK, whenever there is one."""
    offset = Path(os.environ["WRONG_TIME"], os.environ["RANK"])

    def make(original):
        def now():
            try:
                return original() + float(offset.read_text())
            except OSError:
                return original()

        return now

    patch(time, "time", make)


PLANTS = {
    "nan": nan,
    "loss": loss,
    "memory": memory,
    "defect": defect,
    "slow": slow,
    "write": write,
    "without": without,
    "stop": stop,
    "wrong_time": wrong_time,
}


def start(world: int, arguments: Sequence, plants: Sequence[Plant] = (), **environ: str) -> list[subprocess.Popen]:
    """Start the ranks of one run of the training command; stdout and stderr are text pipes."""
    from armt_dist.distributed.rendezvous import free_port

    port = str(free_port())
    command = [sys.executable, __file__, *map(str, plants), "--", *map(str, arguments)]
    ranks = []
    for rank in range(world):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        environment = {
            **os.environ,
            **{name: str(value) for name, value in where.items()},
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            **environ,
        }
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return ranks


def main() -> None:
    cut = sys.argv.index("--")
    plants = [Plant.parse(text) for text in sys.argv[1:cut]]
    launch = str(ROOT / "launch/train.py")
    sys.argv = [launch, *sys.argv[cut + 1 :]]
    # DeepSpeed chooses its accelerator when it is first imported; on CPU the package sets it before that.
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    if plants:
        clock()
    for plant in plants:
        PLANTS[plant.what](plant)
    runpy.run_path(launch, run_name="__main__")


if __name__ == "__main__":
    main()
