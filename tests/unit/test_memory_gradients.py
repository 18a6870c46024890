"""The memory's gradients by hand against autograd's of the plain maths, and how few operations a cell is."""

from functools import partial

import pytest
import torch
from support.float64 import in_float64
from support.operations import Operations, attention_in_one

from armt_dist.model.configuration_armt import ARMTConfig
from armt_dist.model.memory import PlainMemory, State
from armt_dist.model.memory_gradients import Add, Options, Read, Write
from armt_dist.model.memory_kind import apply
from armt_dist.model.modeling_armt import ARMTForCausalLM
from armt_dist.runtime.cells import EagerCells

B, N, M, D, D_MEM = 2, 5, 3, 12, 8
DEFAULTS = dict(nu=3, n_heads=1, maths="default", use_denom=True, correction=True, gating=False, state_decay=None)
VARIANTS = [
    {},
    dict(n_heads=2),
    dict(n_heads=4, gating=True),
    # The features of a head are rolled by more than they are many.
    dict(nu=5, n_heads=4),
    dict(nu=1),
    dict(maths="paper"),
    dict(maths="paper", n_heads=2, use_denom=False),
    dict(maths="paper", correction=False, gating=True),
    dict(use_denom=False),
    dict(use_denom=False, correction=False, n_heads=2),
    dict(correction=False),
    dict(state_decay=0.9, n_heads=2),
    dict(state_decay="learned", gating=True),
]
NAMES = [",".join(f"{name}={value}" for name, value in variant.items()) or "default" for variant in VARIANTS]


def memory_of(variant, dtype):
    """A memory in which nothing is zero, and inputs: x [B, N, D], m [B, M, D], a state. bfloat16 can hold them all."""
    torch.manual_seed(1)

    def drawn(*shape, std=1.0):
        return torch.randn(*shape, dtype=torch.double).mul(std).bfloat16()

    memory = PlainMemory(D, D_MEM, **{**DEFAULTS, **variant}).to(dtype)
    for parameter in memory.parameters():
        parameter.data.copy_(drawn(*parameter.shape, std=0.3))
    x, m = drawn(B, N, D).to(dtype), drawn(B, M, D).to(dtype)
    A, z = memory.empty(B, "cpu")
    return memory, x, m, State(A + drawn(*A.shape), z + drawn(*z.shape).abs())


def results(variant, by_hand, empty=False, dtype=torch.double):
    """What a read, an update and its application give, then the gradients of all inputs and parameters."""
    memory, x, m, state = memory_of(variant, dtype)
    memory.by_hand = by_hand
    leaves = [x, m, *map(torch.zeros_like if empty else torch.clone, state)]
    x, m, *state = (leaf.requires_grad_() for leaf in leaves)
    update = memory.update(m, State(*state))
    outputs = [memory.read(x, State(*state)), update.k, update.dv, *update.onto(State(*state))]
    gradients = [torch.linspace(-1, 2, output.numel()).view(output.shape).to(output.dtype) for output in outputs]
    sources = [x, m, *state, *memory.parameters()]
    found = torch.autograd.grad(outputs, sources, gradients, allow_unused=True, materialize_grads=True)
    names = ["read", "k", "dv", "A", "z", *(f"d {name}" for name in ("x", "m", "A", "z"))]
    names += [f"d {name}" for name, _ in memory.named_parameters()]
    return dict(zip(names, [*outputs, *found], strict=True))


@pytest.mark.parametrize("empty", [False, True], ids=["written", "empty"])
@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
@in_float64()
def test_equals_autograd_of_the_plain_maths(variant, empty):
    plain, by_hand = (results(variant, how, empty) for how in (False, True))
    for name, expected in plain.items():
        torch.testing.assert_close(
            by_hand[name], expected, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert all(plain[name].any() for name in ("d x", "d m", "d W_mk.weight", "d W_mv.weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_no_less_exact_than_the_plain_maths(variant, dtype):
    """Both against float64, from the same weights and inputs."""
    plain, by_hand = (results(variant, how, dtype=dtype) for how in (False, True))
    with in_float64():
        exact = results(variant, by_hand=False)
    for name, true in exact.items():
        errors = [(found[name].double() - true).norm() / (true.norm() + 1e-12) for found in (plain, by_hand)]
        assert errors[1] <= 2 * errors[0] + 4 * torch.finfo(torch.float32).eps, f"{name}: {errors}"


GRADCHECK = partial(torch.autograd.gradcheck, eps=1e-7, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
@in_float64()
def test_gradients_are_those_of_small_differences(variant):
    memory, x, m, state = memory_of(variant, torch.float64)
    options: Options = memory.options
    x, m, A, z = (leaf.requires_grad_() for leaf in (x, m, *state))
    q, key, value, strength = (linear.detach().requires_grad_() for linear in (
        memory.W_mq(x), memory.W_mk(m), memory.W_mv(m), memory.W_mb(m)
    ))  # fmt: skip
    assert GRADCHECK(lambda *inputs: Read.apply(*inputs, options), (x, q, A, z))
    assert GRADCHECK(lambda *inputs: Write.apply(*inputs, options)[:2], (key, value, strength, A, z))
    k, dv, gamma = (each.detach() for each in Write.apply(key, value, strength, A, z, options))
    assert GRADCHECK(lambda *inputs: Add.apply(*inputs, gamma), (A, z, k.requires_grad_(), dv.requires_grad_()))


@pytest.mark.parametrize("variant", [{}, dict(n_heads=2, gating=True)], ids=["default", "heads"])
def test_the_products_stay_in_float32_under_autocast(variant):
    memory, x, m, state = memory_of(variant, torch.float32)
    found = []
    for autocast in (False, True):
        # Projections in bfloat16 both times: only the memory's own arithmetic is compared.
        q, key, value, strength = (
            torch.randn(B, rows, width, generator=torch.Generator().manual_seed(i)).bfloat16().requires_grad_()
            for i, (rows, width) in enumerate([(N, D_MEM), (M, D_MEM), (M, D), (M, memory.W_mb.out_features)])
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            read = Read.apply(x, q, *state, memory.options)
            update = Write.apply(key, value, strength, *state, memory.options)
            after = Add.apply(*state, *update)
            total = read.sum() + sum(each.sum() for each in after)
            gradients = torch.autograd.grad(total, (q, key, value, strength))
        assert all(each.dtype == torch.float32 for each in (*update, *after))
        found.append([read, *update, *after, *gradients])
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)


def test_features_that_are_zero_stay_finite():
    """Where no two neighbours of relu([x, -x]) are positive there is nothing to divide by."""
    memory, x, m, state = memory_of({"n_heads": 4}, torch.float32)
    x, m = x.mul(0).requires_grad_(), m.mul(0).requires_grad_()
    read, update = memory.read(x, state), memory.update(m, state)
    (read.sum() + sum(each.sum() for each in update.onto(state))).backward()
    assert torch.equal(read, x) and all(p.grad is None or p.grad.isfinite().all() for p in memory.parameters())


LLAMA_1B = dict(
    model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_of_llama_1b_is_few_operations(dtype):
    config = ARMTConfig(base_config=LLAMA_1B, segment_tokens=1024, num_mem_tokens=16, d_mem=64)
    with torch.device("meta"):
        model = ARMTForCausalLM(config).to(dtype)
        x = torch.empty(1, 1040, 2048, dtype=dtype)
    layer = model.layers[0]
    context, state = model.context(x, None), layer.memory.initial_state(1, x.device)
    cells = EagerCells(layer, trains=True)
    cells.sums = [torch.empty_like(p, dtype=torch.float32) for p in cells.parameters]
    with attention_in_one():
        with torch.no_grad(), Operations() as forward:
            apply(state, layer.cell(x, state, context)[1])
        cell = cells.rerun(x, state, context, None)
        gradients = tuple(map(torch.empty_like, cell.outputs))
        with Operations() as backward:
            cells.back(cell, gradients)
    print(dtype, forward.kernels, backward.kernels)
    assert forward.kernels <= 70 and backward.kernels <= 130
