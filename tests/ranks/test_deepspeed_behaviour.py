"""DeepSpeed's private parts in a real ZeRO-3 engine of one rank: each has its effect, and is needed for it."""

import pytest
import torch
from support.ranks import spawn
from torch import nn

WIDTH = 4


class TwoCalls(nn.Module):
    """A layer that is called twice in a forward pass, as with two rounds."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.layer(self.layer(x)).square().sum()


def engine_around(model, **zero):
    """A ZeRO-3 engine that keeps no parameter whole after use."""
    import deepspeed

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000, **zero}
    ds = {"train_batch_size": 1, "gradient_clipping": 0.0, "zero_optimization": zero, "steps_per_print": 2**31}
    ds["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=ds)[0]


def start():
    from armt_dist.zero3.communication import start_communication

    start_communication()


def releases(ranks, told: bool) -> tuple[int, int]:
    """Releases of a layer in the backward pass of two calls, and the elements of its partitioned parameter."""
    from armt_dist.zero3.private import release_after_next_backward, whole_numel

    start()
    torch.manual_seed(0)
    model = TwoCalls()
    engine = engine_around(model)
    if told:
        model.layer.register_forward_hook(
            lambda layer, _, output: output.register_hook(lambda _: release_after_next_backward(layer)) and None
        )
    coordinator, found = engine.optimizer.parameter_offload.get_param_coordinator(), []
    release = coordinator.release_sub_module

    def counted(module, forward=False):
        found.append(module is model.layer and not forward)
        release(module, forward)

    coordinator.release_sub_module = counted
    engine.backward(engine(torch.ones(1, WIDTH, requires_grad=True)))
    assert model.layer.weight.numel() == 0, "the parameter is not partitioned, so nothing is tested"
    return sum(found), whole_numel(model.layer.weight)


@pytest.mark.parametrize(("told", "expected"), [(False, 1), (True, 2)])
def test_a_layer_is_released_after_the_backward_of_every_call(told, expected):
    """Told nothing, DeepSpeed releases it once: when it does more by itself, the hook is no longer needed."""
    assert spawn(1, releases, told) == [(expected, WIDTH * WIDTH)]


def gradients(ranks) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """The engine's gradient of a layer, the true one, and the bytes that were moved."""
    from deepspeed.utils import safe_get_full_grad

    from armt_dist.zero3.collective_bytes import CollectiveBytes
    from armt_dist.zero3.private import mark_gradients_ready

    start()
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    weight, x = layer.weight.detach().clone().requires_grad_(), torch.randn(1, WIDTH)
    engine, counted = engine_around(layer), CollectiveBytes()
    mark_gradients_ready([layer.weight], True)
    engine.backward(engine(x).square().sum())
    (x @ weight.T).square().sum().backward()
    return safe_get_full_grad(layer.weight).clone(), weight.grad, counted.bytes


def test_bytes_are_counted_where_zero3_moves_them():
    ((found, expected, moved),) = spawn(1, gradients)
    torch.testing.assert_close(found, expected)
    assert moved["reduce_scatter_tensor"] == WIDTH * WIDTH * 4
    assert moved["all_gather_into_tensor"] >= WIDTH * WIDTH * 4


def test_communication_must_have_been_started():
    from armt_dist.zero3.communication import start_communication

    with pytest.raises(RuntimeError, match=r"rendezvous\.start"):
        start_communication()


def joined(ranks) -> tuple[bool, bool, bool]:
    """Whether DeepSpeed has joined, calls the functions that we gave it, and has left after `stop`."""
    from armt_dist.distributed import rendezvous
    from armt_dist.distributed.collectives import all_gather_single, reduce_scatter_single
    from armt_dist.zero3.communication import start_communication
    from armt_dist.zero3.private import communication_backend

    assert communication_backend() is None
    start_communication()
    backend = communication_backend()
    start_communication()
    ours = backend.all_gather_function, backend.reduce_scatter_function
    same = ours == (all_gather_single, reduce_scatter_single)
    once = communication_backend() is backend
    rendezvous.stop()
    return same, once, not torch.distributed.is_initialized()


def test_deepspeed_joins_once_and_leaves():
    assert spawn(1, joined) == [(True, True, True)]
