"""DeepSpeed's private parts are still what the code relies on: one test per part, each fails when DeepSpeed changes it.

What a part does in a real engine is tested in tests/ranks/test_deepspeed_behaviour.py. After an update of DeepSpeed
run both, mend what fails in armt_dist/zero3/private.py, and write the new version there. The parts that concern
checkpoint files are tested in test_deepspeed_files.py.
"""

import inspect
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload, stage3
from torch import nn

from armt_dist.zero3 import private


def names(function) -> list[str]:
    """Names of the parameters of a method, without self."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


# --- zero3/private.py ---------------------------------------------------------------------------------------------


def test_collectives_go_through_the_backend(monkeypatch):
    """DeepSpeed looks the backend up at every call, and calls the methods that are counted."""
    called = []
    fake = SimpleNamespace(
        all_gather_into_tensor=lambda **kwargs: called.append(kwargs),
        reduce_scatter_tensor=lambda **kwargs: called.append(kwargs),
    )
    monkeypatch.setattr("deepspeed.comm.comm.cdb", fake)
    assert private.communication_backend() is fake
    whole, part = torch.zeros(4), torch.zeros(2)
    deepspeed.comm.all_gather_into_tensor(whole, part)
    deepspeed.comm.reduce_scatter_tensor(part, whole)
    gather, reduce = called
    assert gather[private.COUNTED["all_gather_into_tensor"].name] is whole
    assert reduce[private.COUNTED["reduce_scatter_tensor"].name] is whole


@pytest.mark.parametrize("name", private.COUNTED)
def test_the_backend_passes_the_whole_tensor_to_the_function_that_it_keeps(name, monkeypatch):
    """Also when the tensors are passed by place."""
    backend, received = object.__new__(TorchBackend), []
    monkeypatch.setattr("deepspeed.comm.comm.cdb", backend)
    private.use_collectives(
        lambda output_tensor, input_tensor, group, async_op: received.append(("all_gather_into_tensor", output_tensor)),
        lambda output, input, op, group, async_op: received.append(("reduce_scatter_tensor", input)),
    )
    whole, part, argument = torch.zeros(4), torch.zeros(2), private.COUNTED[name]
    call = getattr(backend, name)
    call(*(whole if place == argument.position else part for place in range(2)))
    call(**{other: whole if other == argument.name else part for other in ("output_tensor", "input_tensor")})
    assert [method for method, _ in received] == [name] * 2
    assert all(tensor is whole for _, tensor in received)


def test_the_shared_memory_operator_is_not_built(monkeypatch):
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    built = []

    class Builder:
        NAME = ShareMemCommBuilder.NAME

        def load(self):
            built.append(self.NAME)

        def absolute_name(self):
            return self.NAME

    accelerator = SimpleNamespace(create_op_builder=lambda name: Builder())
    monkeypatch.setattr(inspect.getmodule(build_shm_op), "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {Builder.NAME: True}, raising=False)
    build_shm_op()
    assert len(built) == 1, "the table does not decide what is built, so this test proves nothing"
    private.skip_shared_memory_op()
    build_shm_op()
    assert len(built) == 1


def test_operators_are_named_as_their_build_folders():
    from deepspeed.ops.op_builder import CPUAdamBuilder

    assert CPUAdamBuilder().name == CPUAdamBuilder.NAME == "cpu_adam" and "cpu_adam" in private.operators()
    assert "name=self.name" in inspect.getsource(CPUAdamBuilder.jit_load)


def test_a_partitioned_parameter_has_its_whole_size():
    parameter = nn.Parameter(torch.empty(0))
    assert private.whole_numel(nn.Parameter(torch.empty(3, 4))) == 12
    parameter.ds_numel = 12
    assert private.whole_numel(parameter) == 12
    assert "param.ds_numel = param.numel()" in inspect.getsource(deepspeed.zero.Init)


def test_gradients_that_are_not_ready_are_not_reduced():
    """The method that ZeRO-3's hooks call puts a gradient into the bucket only where the mark is absent or True."""
    parameter, added = nn.Parameter(torch.zeros(2)), []
    parameter.ds_numel = 2
    optimizer = SimpleNamespace(
        get_param_comm_dtype=lambda parameter: torch.float32,
        _get_param_partition_group=lambda parameter: None,
        ipg_buckets={torch.float32: SimpleNamespace(params=[], elements=0, process_group=None)},
        reduce_bucket_size=10,
        _apply_autoep_folding_tp_correction=lambda parameter: None,
        _DeepSpeedZeroOptimizer_Stage3__add_grad_to_ipg_bucket=added.append,
    )
    hook = stage3.DeepSpeedZeroOptimizer_Stage3.reduce_independent_p_g_buckets_and_remove_grads
    hook(optimizer, parameter)
    assert len(added) == 1
    private.mark_gradients_ready([parameter], False)
    hook(optimizer, parameter)
    assert len(added) == 1
    private.mark_gradients_ready([parameter], True)
    hook(optimizer, parameter)
    assert len(added) == 2


def test_a_counter_of_the_module_decides_on_its_release():
    source = inspect.getsource(parameter_offload.DeepSpeedZeRoOffload)
    assert "module.ds_grads_remaining = 0" in source, "set in every forward"
    assert "ctx.module.ds_grads_remaining = ctx.module.ds_grads_remaining - 1" in source
    assert "if ctx.module.ds_grads_remaining == 0:" in source
    module = nn.Linear(1, 1)
    private.release_after_next_backward(module)
    assert module.ds_grads_remaining == 1


# --- public, but decisive for numbers or for the tests ------------------------------------------------------------


@pytest.mark.parametrize("name", ["was_step_applied", "get_global_grad_norm", "gradient_accumulation_steps"])
def test_what_the_trainer_asks_the_engine(name):
    assert names(getattr(DeepSpeedEngine, name)) == []


def test_the_learning_rate_is_set_through_the_optimizer():
    assert isinstance(stage3.DeepSpeedZeroOptimizer_Stage3.param_groups, property)


def test_leaf_modules_and_external_parameters():
    layer = nn.Linear(1, 1)
    assert deepspeed.utils.set_z3_leaf_modules(nn.Sequential(layer), [nn.Linear]) == [layer]
    assert deepspeed.utils.z3_leaf_module(layer)
    assert names(deepspeed.zero.register_external_parameter) == ["module", "parameter"]
    assert {"params", "modifier_rank"} <= set(names(deepspeed.zero.GatheredParameters.__init__))


def test_what_the_tests_ask_the_coordinator():
    """tests/ranks/test_wavefront.py counts releases and asks whether gathers run ahead."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    assert names(parameter_offload.DeepSpeedZeRoOffload.get_param_coordinator) == []
    assert names(Coordinator.is_complete_trace) == []
    assert "def release_sub_module(self, submodule: Module, forward=False)" in inspect.getsource(Coordinator)


def test_the_group_of_a_second_copy_is_made_once_and_taken_from_then_on():
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    assert "zero_param_parallel_group" in names(Init.__init__)
    assert "is None" in inspect.getsource(groups._create_zero_param_parallel_group)
    assert private.secondary_group() is None
