"""The memory's read, update and write as one node of the graph each: the maths of `memory`, its gradients by hand.

A cell of a small segment takes as long as its operations take to start. Here they are about half as many as autograd's.

Shapes: B batch, N positions, M memory tokens, h memory heads, c = d_mem/h, n = 2c, f = nu·n features a head,
        d = D/h channels a head; E = B·h. The hidden size D and d_mem are those of all heads.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-5
# The least length by which features are divided, as in torch.nn.functional.normalize.
LEAST_LENGTH = 1e-12


class Options(NamedTuple):
    """What the maths of an associative memory depends on; see `memory.AssociativeMemory`."""

    nu: int
    n_heads: int
    normalise: bool
    norm_eps: float
    use_denom: bool
    correction: bool


def float32(x: Tensor) -> AbstractContextManager:
    """Return a context in which autocast, if it is on, leaves the memory's products in float32."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class Read(torch.autograd.Function):
    """x + qA / (z·q + 1e-5), q = phi(projected).

    x [B, N, D], projected [B, N, d_mem], A [B, h, f, d], z [B, h, f] -> [B, N, D] in x's dtype.

    With p = |p| q, the features before they are normalised, it is pA / (z·p + 1e-5 |p|): only the sizes are divided.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, projected: Tensor, A: Tensor, z: Tensor, options: Options) -> Tensor:
        with float32(x):
            tiled = tile(projected, options, A.dtype)
            p = products(tiled).flatten(0, 1)
            length = lengths(p) if options.normalise else None
            values = torch.bmm(p, A.flatten(0, 1)).view(*tiled.shape[:3], -1)
            divisor = length
            if options.use_denom:
                normaliser = z.flatten(0, 1).unsqueeze(-1)
                divisor = (
                    torch.bmm(p, normaliser).add_(EPS)
                    if length is None
                    else torch.baddbmm(length, p, normaliser, beta=EPS)
                )
            out = torch.empty_like(x)
            by_head = heads(x, options), heads(out, options)
            if divisor is None:
                torch.add(by_head[0], values, out=by_head[1])
            else:
                torch.addcdiv(by_head[0], values, divisor.view(*tiled.shape[:3], 1), out=by_head[1])
        ctx.save_for_backward(tiled, p, length, divisor, A, z)
        ctx.options, ctx.projected_dtype = options, projected.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tiled, p, length, divisor, A, z = ctx.saved_tensors
        options: Options = ctx.options
        dA = dz = None
        with float32(grad):
            # d(pA)
            d_values = grad.new_empty(*tiled.shape[:3], A.shape[-1], dtype=A.dtype)
            if divisor is None:
                d_values.copy_(heads(grad, options))
            else:
                torch.div(heads(grad, options), divisor.view(*tiled.shape[:3], 1), out=d_values)
            d_values = d_values.flatten(0, 1)
            dp = torch.bmm(d_values, A.flatten(0, 1).mT)
            if ctx.needs_input_grad[2]:
                dA = torch.bmm(p.mT, d_values).view_as(A)
            if options.use_denom:
                # Minus the gradient of z·p: Σ d_values·values / divisor, where Σ d_values·(pA) = p·dp.
                shrink = (p * dp).sum(-1, keepdim=True).div_(divisor)
                if ctx.needs_input_grad[3]:
                    dz = minus_product(p.mT, shrink).view_as(z)
                dp.baddbmm_(shrink, z.flatten(0, 1).unsqueeze(-2), alpha=-1)
            if length is not None:
                # |p| changes nothing, so the gradient is at right angles to p. Computed from d|p|, it is less exact.
                q = p / length
                dp.addcmul_(q, (q * dp).sum(-1, keepdim=True), value=-1)
            return grad, through_products(dp, tiled, ctx.projected_dtype), dA, dz, None


class Write(torch.autograd.Function):
    """An update's k = phi(key), dv = β(v − v̄) and γ, as `memory.Update` has them.

    key [B, M, d_mem], value [B, M, D], strength [B, M, h] or [B, M, D], A [B, h, f, d], z [B, h, f]
    -> k [B, h, M, f], dv [B, h, M, d], γ [B, h, M], in A's dtype; γ has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, strength: Tensor, A: Tensor, z: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        with float32(key):
            tiled = tile(key, options, A.dtype)
            k = products(tiled)
            length = None
            if options.normalise:
                length = lengths(k)
                k.div_(length)
            found = torch.matmul(k, A)
            seen = torch.matmul(k, z.unsqueeze(-1)).add_(EPS)
            beta = torch.sigmoid(heads(strength, options).to(A.dtype))
            dv = torch.empty_like(found)
            if options.use_denom:
                torch.addcdiv(heads(value, options), found, seen, value=-1, out=dv)
            else:
                torch.sub(heads(value, options), found, out=dv)
            dv.mul_(beta)
            gamma = novelty(k, seen.squeeze(-1), z, options) if options.correction else torch.ones_like(k[..., 0])
        ctx.save_for_backward(tiled, k, length, found, seen, beta, dv, A, z)
        ctx.options, ctx.dtypes = options, (key.dtype, value.dtype, strength.dtype)
        ctx.mark_non_differentiable(gamma)
        # There would be zeros for γ.
        ctx.set_materialize_grads(False)
        return k, dv, gamma

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dk: Tensor | None, d_dv: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        tiled, k, length, found, seen, beta, dv, A, z = ctx.saved_tensors
        dk = torch.zeros_like(k) if dk is None else dk
        d_dv = torch.zeros_like(dv) if d_dv is None else d_dv
        options: Options = ctx.options
        key_dtype, value_dtype, strength_dtype = ctx.dtypes
        dA = dz = None
        with float32(dk):
            # d(sigmoid)/β = 1 − β
            by_beta = d_dv * dv if beta.shape == dv.shape else dot(d_dv, dv)
            d_strength = merged_like(by_beta, strength_dtype)
            torch.addcmul(by_beta, by_beta, beta, value=-1, out=heads(d_strength, options))
            # d(v − v̄)
            d_value = d_dv * beta
            d_found = d_value / seen if options.use_denom else d_value
            k3, d_found3, A3 = k.flatten(0, 1), d_found.flatten(0, 1), A.flatten(0, 1)
            if ctx.needs_input_grad[3]:
                dA = minus_product(k3.mT, d_found3).view_as(A)
            dk = torch.baddbmm(dk.flatten(0, 1), d_found3, A3.mT, alpha=-1)
            if options.use_denom:
                d_seen = dot(d_found, found).div_(seen).flatten(0, 1)
                dk.baddbmm_(d_seen, z.flatten(0, 1).unsqueeze(-2))
                if ctx.needs_input_grad[4]:
                    dz = torch.bmm(k3.mT, d_seen).view_as(z)
            if length is not None:
                # d(p / |p|) = (dk − k (k·dk)) / |p|
                dk.addcmul_(k3, dot(k3, dk), value=-1).div_(length.flatten(0, 1))
            d_key = through_products(dk, tiled, key_dtype)
            return d_key, d_value.transpose(1, 2).flatten(-2).to(value_dtype), d_strength, dA, dz, None


class Add(torch.autograd.Function):
    """The state after an update: A + kᵀ dv and z + Σ γ k.

    A [B, h, f, d], z [B, h, f], k [B, h, M, f], dv [B, h, M, d], γ [B, h, M], which has no gradient -> A, z.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, z: Tensor, k: Tensor, dv: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(k, dv, gamma)
        k3, gamma3 = k.flatten(0, 1), gamma.flatten(0, 1).unsqueeze(-2)
        with float32(A):
            return (
                torch.baddbmm(A.flatten(0, 1), k3.mT, dv.flatten(0, 1)).view_as(A),
                torch.baddbmm(z.flatten(0, 1).unsqueeze(-2), gamma3, k3).view_as(z),
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dA: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
        k, dv, gamma = ctx.saved_tensors
        dA3, dz3 = dA.flatten(0, 1), dz.flatten(0, 1).unsqueeze(-2)
        with float32(dA):
            dk = torch.bmm(dv.flatten(0, 1), dA3.mT).baddbmm_(gamma.flatten(0, 1).unsqueeze(-1), dz3)
            return dA, dz, dk.view_as(k), torch.bmm(k.flatten(0, 1), dA3).view_as(dv), None


def novelty(k: Tensor, seen: Tensor, z: Tensor, options: Options) -> Tensor:
    """Compute γ = clip(1 − seen / ‖k‖², 0, 1), or 1 for an empty z. seen = z·k + 1e-5 [B, h, M] -> [B, h, M].

    A normalised k has ‖k‖ = 1, or is 0, where γ has no effect.
    """
    if not options.normalise:
        seen = seen / k.square().sum(-1).add_(options.norm_eps)
    # seen is positive, so γ is less than 1. True is 1.
    return torch.rsub(seen, 1).clamp_min_(z.any(-1, keepdim=True).logical_not_())


def heads(x: Tensor, options: Options) -> Tensor:
    """Separate the heads, as a view. [B, N, h·c] -> [B, h, N, c]."""
    return x.unflatten(-1, (options.n_heads, -1)).transpose(1, 2)


def merged_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return room for x [B, h, N, c] with its heads joined: [B, N, h·c]."""
    batch, h, positions, c = x.shape
    return x.new_empty(batch, positions, h * c, dtype=dtype)


def tile(projected: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    """Repeat r = [relu(x), relu(-x)] often enough for `rolled`. [B, N, d_mem] -> [B, h, N, nu + 1, 2, c]."""
    x = heads(projected, options).unsqueeze(-2)
    x = x.expand(-1, -1, -1, options.nu + 1, -1)
    tiled = x.new_empty(*x.shape[:-1], 2, x.shape[-1], dtype=dtype)
    positive, negative = tiled.unbind(-2)
    # relu; clamp_min does not convert to the dtype of `out`.
    torch.ops.aten.threshold.out(x, 0, 0, out=positive)
    # relu(-x) = relu(x) - x without rounding.
    torch.sub(positive, x, out=negative)
    return tiled


def once(tiled: Tensor) -> Tensor:
    """Return r of `tile`. -> [..., n]."""
    return tiled.select(-3, 0).flatten(-2)


def rolled(tiled: Tensor) -> Tensor:
    """Return roll(r, j), j = 1..nu, as a view: each begins n - 1 further than the one before. -> [..., nu, n]."""
    nu, n = tiled.shape[-3] - 1, 2 * tiled.shape[-1]
    return tiled.flatten(-3).unfold(-1, n, n - 1).narrow(-2, 1, nu)


def products(tiled: Tensor) -> Tensor:
    """Compute r * roll(r, j), j = 1..nu, DPFP's features before they are normalised. -> [B, h, N, f]."""
    return (rolled(tiled) * once(tiled).unsqueeze(-2)).flatten(-2)


def lengths(p: Tensor) -> Tensor:
    """Return by what features [..., f] are divided. -> [..., 1]."""
    return torch.linalg.vector_norm(p, dim=-1, keepdim=True).clamp_min_(LEAST_LENGTH)


def through_products(dp: Tensor, tiled: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of `tile`'s argument from that of `products` [E, N, f]. -> [B, N, d_mem].

    r[i] is in r[i] r[i - j] and in r[i + j] r[i]. dp_j[i] r[i - j] and dp_j[i + j] r[i + j], 2 nu numbers for each i,
    are laid out so that one sum adds them up: of the second, a row of whole copies is read j further.
    """
    r = once(tiled)
    nu, n = tiled.shape[-3] - 1, r.shape[-1]
    dp = dp.view(*r.shape[:-1], nu, n)
    copies = 1 + math.ceil(2 * nu / n)
    room = dp.new_empty(*r.shape[:-1], 2 * nu, copies, n)
    own = r[..., None, None, :].expand(*r.shape[:-1], 1, copies, n)
    torch.mul(dp.unsqueeze(-2), own, out=room.narrow(-3, 0, nu))
    # One begins copies·n + 1 after the other: 1 in the first row, 2 in the second, and so on.
    terms = room.flatten(-3).narrow(-1, 1, 2 * nu * copies * n - 1).unfold(-1, n, copies * n + 1)
    torch.mul(dp, rolled(tiled), out=terms.narrow(-2, nu, nu))
    dr = torch.ops.aten.threshold_backward(terms.sum(-2), r, 0)
    positive, negative = dr.chunk(2, -1)
    dx = merged_like(positive, dtype)
    torch.sub(positive, negative, out=dx.unflatten(-1, (r.shape[1], -1)).transpose(1, 2))
    return dx


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sums of a * b over their last dimension. [..., c] -> [..., 1]."""
    return torch.matmul(a.unsqueeze(-2), b.unsqueeze(-1)).squeeze(-1)


def minus_product(a: Tensor, b: Tensor) -> Tensor:
    """Return -ab. [E, i, j], [E, j, k] -> [E, i, k]."""
    # beta=0: what the sum begins with is not read.
    room = a.new_empty(()).expand(len(a), a.shape[1], b.shape[2])
    return torch.baddbmm(room, a, b, beta=0, alpha=-1)
