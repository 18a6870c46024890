"""DeepSpeed's private parts that checkpoints rest on are still what they were; each test fails if one changes."""

import inspect
import os
import pickle
from types import SimpleNamespace

import pytest
import torch

from armt_dist.checkpoint import deepspeed_files as private


def engine_source(name):
    from deepspeed.runtime.engine import DeepSpeedEngine

    return inspect.getsource(getattr(DeepSpeedEngine, name))


def test_the_engine_saves_through_its_checkpoint_engine_by_content_and_path():
    from armt_dist.checkpoint.save import Writer

    assert "self.checkpoint_engine.save" in engine_source("_save_checkpoint") + engine_source("_save_zero_checkpoint")
    base = Writer.__mro__[1]
    assert list(inspect.signature(base.save).parameters) == ["self", "state_dict", "path"]
    engine = SimpleNamespace(checkpoint_engine="before")
    with private.writing_through(engine, "mine"):
        assert engine.checkpoint_engine == "mine"
    assert engine.checkpoint_engine == "before"


def test_the_engine_copies_its_script_by_one_method():
    assert "self._copy_recovery_script(save_path)" in engine_source("_save_zero_checkpoint")


def test_loading_on_other_ranks_rests_on_these_parts_of_the_optimizer():
    """Whether they do what we think, tests/ranks/test_resharding.py shows."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

    assert "state_dict_list[dist.get_rank(group=self.dp_process_group)]" in inspect.getsource(Zero.load_state_dict)
    rigid = inspect.getsource(Zero._rigid_load_state_dict)
    for key in ("LOSS_SCALER", "'dynamic_loss_scale'", "'overflow'", "OPTIMIZER_STATE_DICT", "FP32_FLAT_GROUPS"):
        assert f"state_dict[{key}]" in rigid, key
    assert "sub_group_to_group_id" in inspect.getsource(Zero._set_fp32_optimizer_param_groups)
    # `trained_layout` has the order of what is saved as `param_shapes`.
    assert "self.optimizer.fp16_groups" in engine_source("_get_zero_param_shapes")


def test_restricted_readers_take_the_classes_that_checkpoints_hold_and_nothing_else(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from armt_dist.checkpoint.save import Writer

    known, unknown = tmp_path / "known.pt", tmp_path / "unknown.pt"
    writer = Writer(copy=False)
    writer.save({"stage": ZeroStageEnum.weights, "scaler": LossScaler(1.0), "x": torch.ones(2)}, str(known))
    writer.write({}, tmp_path, rank=0)
    # Whatever the release of Python, no enum is in the file: 3.11.2 would pickle it as a call of getattr.
    assert b"ZeroStageEnum" not in known.read_bytes()
    torch.save({"x": SimpleNamespace()}, unknown)
    assert private.read_tensors(known)["stage"] == 3
    with pytest.raises(pickle.UnpicklingError):
        private.read_tensors(unknown)
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    with private.restricted_unpickling():
        assert isinstance(torch.load(known)["scaler"], LossScaler)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(unknown)
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before
