"""The DeepSpeed configuration: mistakes, batch sizes, and limits that follow from the model and the grid."""

import pytest
import torch
from support.paths import ROOT

from armt_dist.config import ConfigError
from armt_dist.schedule.grid import Grid
from armt_dist.zero3 import engine as engines
from armt_dist.zero3.ds_config import batch_sizes, prepare, read_ds_config
from armt_dist.zero3.optimizer import choose

CPU = torch.device("cpu")
ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0}


BAD_DS_CONFIGS = {
    "zero_optimization.stage=2": {"zero_optimization": {"stage": 2}},
    "zero_optimization.stage=None": {},
    "scheduler=": {"scheduler": {"type": "WarmupLR"}, "zero_optimization": ZERO},
    "activation_checkpointing.partition_activations=True": {
        "activation_checkpointing": {"partition_activations": True},
        "zero_optimization": ZERO,
    },
    "zero_optimization.stage3_max_live=3": {"zero_optimization": {**ZERO, "stage3_max_live": 3}},
    "nonsense=1": {"nonsense": 1, "zero_optimization": ZERO},
    "optimizer=5": {"optimizer": 5, "zero_optimization": ZERO},
    "train_batch_size=0": {"train_batch_size": 0, "zero_optimization": ZERO},
    "train_batch_size=5": {"train_batch_size": 5, "zero_optimization": ZERO},
    "train_batch_size: missing": {"train_batch_size": None, "zero_optimization": ZERO},
    "optimizer.params.lr=fast": {"optimizer": {"params": {"lr": "fast"}}, "zero_optimization": ZERO},
}


@pytest.mark.parametrize("says", BAD_DS_CONFIGS)
def test_a_bad_ds_config_is_named(says):
    with pytest.raises(ConfigError) as error:
        prepare({"train_batch_size": 4, **BAD_DS_CONFIGS[says]}, dp=2, world=2, device=CPU)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_batch_sizes():
    cases = [
        ({"train_batch_size": 64}, 4, (64, 16, 1)),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}, 4, (64, 4, 4)),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 4, (24, 2, 3)),
    ]
    for config, dp, expected in cases:
        assert tuple(batch_sizes(config, dp)) == expected


def test_limits_are_derived_and_a_serial_wavefront_is_refused():
    limits, grid = engines.Limits(layer=1000, model=20000), Grid(segments=16, layers=16, sp=4)
    zero = engines.derive_limits({"zero_optimization": {"stage": 3}}, limits, grid, CPU)["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] == 4 * 1000
    assert zero["stage3_max_live_parameters"] == 6 * 1000 + 4000
    assert zero["reduce_bucket_size"] > 20000
    for name in ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "reduce_bucket_size"):
        with pytest.raises(ConfigError, match=name):
            engines.derive_limits({"zero_optimization": {"stage": 3, name: 10}}, limits, grid, CPU)
    fewer = engines.derive_limits({"zero_optimization": {"stage": 3}}, limits, grid, CPU, window=2)["zero_optimization"]
    assert fewer["stage3_prefetch_bucket_size"] == 2 * 1000
    assert fewer["stage3_max_live_parameters"] == 4 * 1000 + 4000
    # Three reductions may be unfinished: of 2, 4 and 6 layers they cover the 3, 7 and 15 layers that ranks are apart.
    for sp, chunks, layers in ((4, 1, 2), (8, 1, 4), (16, 1, 6), (16, 4, 3)):
        cuda = torch.device("cuda")
        spread = grid._replace(sp=sp, chunks=chunks)
        large = engines.Limits(layer=10**8, model=2 * 10**9)
        found = engines.derive_limits({"zero_optimization": {"stage": 3}}, large, spread, cuda)["zero_optimization"]
        assert found["reduce_bucket_size"] == layers * 10**8 and 3 * layers >= (sp - 1) / chunks
        given = {"zero_optimization": {"stage": 3, "reduce_bucket_size": layers * 10**8 - 1}}
        with pytest.raises(ConfigError, match="reduce_bucket_size"):
            engines.derive_limits(given, large, spread, cuda)
    # One rank has no pipeline to serialise: set by hand, it is kept.
    alone = grid._replace(sp=1)
    kept = engines.derive_limits({"zero_optimization": {"stage": 3, "reduce_bucket_size": 10}}, limits, alone, CPU)
    assert kept["zero_optimization"]["reduce_bucket_size"] == 10


def test_tuples_of_a_caller_are_the_lists_of_json():
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "betas": (0.9, 0.95)}}
    prepared = prepare({"train_batch_size": 4, "optimizer": optimizer, "zero_optimization": ZERO}, 2, 2, CPU)
    assert prepared.ds_config["optimizer"]["params"]["betas"] == [0.9, 0.95] and prepared.lr == 1e-3


OFFLOAD = {"stage": 3, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    "device, compilers, given, zero, expected",
    [
        # params beside what was given, zero_force_ds_cpu_optimizer, what is said
        ("cuda", "", {}, ZERO, ({"torch_adam": True, "fused": True}, True, "torch's fused AdamW")),
        ("cuda", "nvcc c++", {}, ZERO, ({"torch_adam": True, "fused": True}, True, "torch's fused AdamW")),
        ("cuda", "", {"foreach": True}, ZERO, ({"torch_adam": True}, True, "torch's AdamW")),
        ("cuda", "nvcc", {"torch_adam": False}, ZERO, ({}, True, "DeepSpeed's AdamW")),
        ("cpu", "", {}, ZERO, ({"torch_adam": True}, True, "torch's AdamW")),
        ("cuda", "c++", {}, OFFLOAD, ({}, True, "DeepSpeed's CPU AdamW")),
        ("cuda", "", {}, OFFLOAD, ({"torch_adam": True, "fused": True}, False, "no C++ compiler")),
        ("cpu", "", {}, OFFLOAD, ({"torch_adam": True}, False, "no C++ compiler")),
    ],
)
def test_the_optimizer_needs_no_compiler(device, compilers, given, zero, expected, tmp_path, monkeypatch):
    installed(compilers, tmp_path, monkeypatch)
    ds = {"optimizer": {"type": "AdamW", "params": given}, "zero_optimization": zero}
    params, forced, name = choose(ds, device)
    assert (params, forced) == (given | expected[0], expected[1]) and expected[2] in name
    assert ds["optimizer"]["params"] is given and "fused" not in given


def test_what_only_nvcc_can_build_is_refused_without_it(tmp_path, monkeypatch):
    for optimizer in ({"type": "Lamb"}, {"type": "AdamW", "params": {"torch_adam": False}}):
        ds = {"optimizer": optimizer, "zero_optimization": ZERO}
        installed("", tmp_path, monkeypatch)
        with pytest.raises(ConfigError, match="nvcc"):
            choose(ds, "cuda")
        choose(ds, "cpu")
        installed("nvcc", tmp_path, monkeypatch)
        choose(ds, "cuda")


def installed(compilers, folder, monkeypatch):
    """Let only these compilers be found."""
    for name in ("nvcc", "c++"):
        file = folder / "bin" / name
        file.unlink(missing_ok=True)
        if name in compilers.split():
            file.parent.mkdir(exist_ok=True)
            file.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(folder) if "nvcc" in compilers else None)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("world", [1, 8, 64])
def test_the_files_that_come_with_it(path, world):
    prepare(read_ds_config(path, []), dp=world, world=world, device=CPU)


def test_a_second_copy_needs_ranks_that_divide_evenly():
    zero = {**ZERO, "zero_hpz_partition_size": 8}
    for world in (1, 4, 8, 16):
        prepare({"train_batch_size": 48, "zero_optimization": zero}, dp=1, world=world, device=CPU)
    with pytest.raises(ConfigError, match="zero_hpz_partition_size=8: 12 ranks do not divide into groups of 8"):
        prepare({"train_batch_size": 48, "zero_optimization": zero}, dp=12, world=12, device=CPU)
