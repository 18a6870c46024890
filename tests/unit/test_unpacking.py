"""Parameters and gradients laid out in a few operations, against DeepSpeed's own, with made-up numbers of ranks."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armt_dist.zero3 import unpacking
from armt_dist.zero3.private import unpack_with_few_operations

SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def theirs():
    """DeepSpeed's own functions, whether ours have taken their place in this process or not."""
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus

    wait = getattr(AllGatherCoalescedHandle.wait, "few_operations", AllGatherCoalescedHandle.wait)
    return SimpleNamespace(
        wait=wait, handle=AllGatherCoalescedHandle, status=ZeroParamStatus, collectives=coalesced_collectives
    )


def gather(theirs, values, world):
    """A handle whose gather is over, of partitioned parameters with these values."""
    sizes = [math.ceil(value.numel() / world) for value in values]
    flat = torch.full((world, sum(sizes)), math.nan)
    parameters, offset = [], 0
    for value, size in zip(values, sizes, strict=True):
        padded = torch.full((world * size,), math.nan)
        padded[: value.numel()] = value.flatten()
        flat[:, offset : offset + size] = padded.view(world, size)
        offset += size
        parameter = torch.nn.Parameter(torch.empty(0))
        parameter.ds_numel, parameter.ds_shape = value.numel(), value.shape
        parameter.ds_tensor, parameter.ds_status = torch.empty(0), theirs.status.INFLIGHT
        parameter.ds_tensor.ds_numel = size
        parameters.append(parameter)
    rows = [flat.view(-1).narrow(0, i * sum(sizes), sum(sizes)) for i in range(world)]
    return theirs.handle(SimpleNamespace(wait=lambda: None), parameters, rows, world), parameters


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, world=st.integers(2, 17))
def test_parameters_are_those_of_deepspeed(theirs, shapes, world):
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in shapes]
    expected, found = gather(theirs, values, world), gather(theirs, values, world)
    theirs.wait(expected[0])
    unpacking.wait_and_unpack(found[0], theirs.wait, theirs.status.AVAILABLE)
    assert found[0].complete
    for own, other, value in zip(found[1], expected[1], values, strict=True):
        assert torch.equal(own.data, other.data) and torch.equal(own.data, value)
        assert own.ds_status == other.ds_status and own.dtype == other.dtype


def test_what_is_no_single_buffer_is_left_to_deepspeed(theirs):
    handle, parameters = gather(theirs, [torch.arange(6.0)], 3)
    handle.partitions = [row.clone() for row in handle.partitions]
    taken = []
    unpacking.wait_and_unpack(handle, lambda *args: taken.append(args), theirs.status.AVAILABLE)
    assert taken == [(handle, True)]


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, world=st.integers(2, 17), data=st.data())
def test_reductions_are_those_of_deepspeed(theirs, shapes, world, data):
    rank = data.draw(st.integers(0, world - 1))
    torch.manual_seed(1)
    gradients = [torch.randn(shape) for shape in shapes]
    sent = {}

    def reduce(name):
        def send(whole, own, group=None):
            # Padding may be anything, and is read by nobody.
            sent[name] = whole.clone()
            own.mul_(world)

        return send

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs.collectives, "_torch_reduce_scatter_fn", reduce("theirs"))
        patch.setattr(theirs.collectives.dist, "get_rank", lambda group=None: rank)
        patch.setattr(theirs.collectives.dist, "get_world_size", lambda group=None: world)
        expected = theirs.collectives.reduce_scatter_coalesced([g.clone() for g in gradients])
    found = unpacking.reduce_scatter([g.clone() for g in gradients], rank, world, reduce("ours"))
    assert sent["ours"].shape == sent["theirs"].shape
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


def test_both_are_put_in_place_once(monkeypatch, theirs):
    from deepspeed.runtime.zero import stage3

    monkeypatch.setattr(theirs.handle, "wait", theirs.wait)
    monkeypatch.setattr(stage3, "reduce_scatter_coalesced", stage3.reduce_scatter_coalesced)
    unpack_with_few_operations()
    first = theirs.handle.wait
    unpack_with_few_operations()
    assert theirs.handle.wait is first is not theirs.wait and hasattr(first, "few_operations")
    assert stage3.reduce_scatter_coalesced.__module__ == "armt_dist.zero3.private"
