"""The associative memory of ARMT as pure maths: state in, state out.

Shapes: B batch, N positions, M memory tokens, D model width, h memory heads,
        f = 2·nu·d_mem/h features a head, d = D/h channels a head.
"""

import math
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .backbone import Context
from .fields import LEARNED
from .memory_gradients import EPS, Add, Options, Read, Write, float32, heads
from .memory_kind import Memory, MemoryUpdate

# Where a learned decay starts.
FIRST_DECAY = 0.99


class State(NamedTuple):
    """What one layer hands from segment to segment, float32 whatever the compute dtype (z·q can come close to 0)."""

    A: Tensor  # [B, h, f, d] associations
    z: Tensor  # [B, h, f] normaliser


class Update(NamedTuple):
    """The rank-M change that one segment makes to a State, float32: A = λA + kᵀ dv, z = λz + Σ gamma k."""

    k: Tensor  # [B, h, M, f]
    dv: Tensor  # [B, h, M, d]
    gamma: Tensor  # [B, h, M]
    decay: Tensor | None = None  # λ, [1] or []; None: 1

    def onto(self, state: State) -> State:
        """Return the state after this update (ARMT paper, equation of the write)."""
        return State(*Add.apply(*faded(state, self.decay), self.k, self.dv, self.gamma))


def faded(state: "Associations", decay: Tensor | None) -> State:
    """Return A and z of any associative memory as the next segment finds them: times λ."""
    return State(state.A, state.z) if decay is None else State(state.A * decay, state.z * decay)


class Associations(Protocol):
    """Any state that holds A and z."""

    @property
    def A(self) -> Tensor:
        """[B, h, f, d] associations."""

    @property
    def z(self) -> Tensor:
        """[B, h, f] normaliser."""


AssociativeT = TypeVar("AssociativeT", bound=Associations)


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Deterministic parameter-free projection: concat_{j=1..nu} r * roll(r, j), r = [relu(x), relu(-x)].

    [..., n/2] -> [..., nu·n].
    """
    r = torch.cat([x, -x], -1).relu()
    return torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], -1)


# Fields of ARMTConfig that are arguments of AssociativeMemory.
OPTIONS = ("nu", "n_heads", "maths", "use_denom", "correction", "gating", "state_decay")


class AssociativeMemory(Memory[AssociativeT]):
    """One layer's associative memory (ARMT, arXiv 2407.04841, section 3), for any state that holds A and z.

    `maths="default"` L2-normalises phi per head; `maths="paper"` follows the first published code: no normalisation,
    and 1e-5 added to ‖k‖² as well. `use_denom`, `correction`, `gating` and `n_heads` are options of the authors' code.
    `state_decay` is ours: λ, or "learned" for one parameter a layer.
    """

    by_hand: ClassVar[bool] = True
    """Whether gradients are those written by hand, with fewer operations; False: autograd's of the maths below."""

    def __init__(
        self,
        hidden_size: int,
        d_mem: int,
        *,
        nu: int = 3,
        n_heads: int = 1,
        maths: str = "default",
        use_denom: bool = True,
        correction: bool = True,
        gating: bool = False,
        state_decay: float | str | None = None,
    ):
        super().__init__()
        normalise, norm_eps = maths == "default", EPS if maths == "paper" else 0.0
        self.options = Options(nu, n_heads, normalise, norm_eps, use_denom, correction)
        self.W_mq = nn.Linear(hidden_size, d_mem, bias=False)
        self.W_mk = nn.Linear(hidden_size, d_mem, bias=False)
        self.W_mv = nn.Linear(hidden_size, hidden_size, bias=False)
        self.W_mb = nn.Linear(hidden_size, hidden_size if gating else n_heads)
        self.state_decay = state_decay
        if state_decay == LEARNED:
            self.decay_logit = nn.Parameter(torch.empty(1))

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build one layer's memory from an `ARMTConfig`."""
        return cls(config.hidden_size, config.d_mem, **{name: getattr(config, name) for name in OPTIONS})

    def reset_parameters(self) -> None:
        """Give W_mq, W_mk and W_mb torch's default and W_mv zeros, so that a pretrained model starts unharmed."""
        for linear in (self.W_mq, self.W_mk, self.W_mb):
            linear.reset_parameters()
        nn.init.zeros_(self.W_mv.weight)
        if self.state_decay == LEARNED:
            nn.init.constant_(self.decay_logit, math.log(FIRST_DECAY / (1 - FIRST_DECAY)))

    def empty(self, batch: int, device: torch.device | str) -> State:
        """Return the memory before the first segment: zeros, float32."""
        h = self.options.n_heads
        f = 2 * self.options.nu * self.W_mq.out_features // h
        d = self.W_mv.out_features // h
        return State(torch.zeros(batch, h, f, d, device=device), torch.zeros(batch, h, f, device=device))

    def decay(self, state: AssociativeT) -> Tensor | None:
        """Return λ as float32 [1] or []; None where it is 1. What a segment finds of the state is λ (A, z)."""
        if self.state_decay is None:
            return None
        if self.state_decay == LEARNED:
            return torch.sigmoid(self.decay_logit.to(state.A.dtype))
        return torch.full((), float(self.state_decay), dtype=state.A.dtype, device=state.A.device)

    def read(self, x: Tensor, state: AssociativeT) -> Tensor:
        """Add qA / (z·q + 1e-5), q = phi(W_mq x). [B, N, D] -> [B, N, D]. An empty state adds exactly 0."""
        projected = self.W_mq(x)
        found = faded(state, self.decay(state))
        if self.by_hand:
            return Read.apply(x, projected, *found, self.options)
        with float32(x):
            return x + self.merge_heads(self.recall(self.features(projected), found)).to(x.dtype)

    def update(self, m: Tensor, state: AssociativeT) -> Update:
        """Compute what the memory positions m [B, M, D] of a layer's output add: k = phi(W_mk m), β(v − v̄), γ."""
        key, value, strength = self.W_mk(m), self.W_mv(m), self.W_mb(m)
        decay = self.decay(state)
        found = faded(state, decay)
        if self.by_hand:
            k, dv, gamma = Write.apply(key, value, strength, *found, self.options)
            return Update(k, dv, gamma, decay)
        with float32(m):
            k, v = self.features(key), heads(value.float(), self.options)
            # [B, h, M, 1], or [B, h, M, d] with gating
            beta = heads(torch.sigmoid(strength.float()), self.options)
            return Update(k, beta * (v - self.recall(k, found)), self.gamma(k, found), decay)

    def recall(self, q: Tensor, state: State) -> Tensor:
        """Compute qA / (z·q + 1e-5), or qA where `use_denom` is off. [B, h, N, f] -> [B, h, N, d]."""
        values = q @ state.A
        return values / ((q @ state.z.unsqueeze(-1)) + EPS) if self.options.use_denom else values

    @torch.no_grad()
    def gamma(self, k: Tensor, state: State) -> Tensor:
        """Measure how much of k is new to z: clip(1 − (z·k + 1e-5) / ‖k‖², 0, 1), or 1 for an empty z. [B, h, M]."""
        if not self.options.correction:
            return torch.ones_like(k[..., 0])
        seen = (k @ state.z.unsqueeze(-1)).squeeze(-1) + EPS
        gamma = (1 - seen / (k.square().sum(-1) + self.options.norm_eps)).clamp(0, 1)
        # phi and γ are not negative, so only an empty z sums to 0.
        return torch.where(state.z.sum(-1, keepdim=True) == 0, 1.0, gamma)

    def features(self, x: Tensor) -> Tensor:
        """Compute phi per head, float32. [B, N, d_mem] -> [B, h, N, f]."""
        phi = dpfp(heads(x.float(), self.options), self.options.nu)
        return normalize(phi, dim=-1) if self.options.normalise else phi

    def merge_heads(self, x: Tensor) -> Tensor:
        """Join the heads. [B, h, N, c] -> [B, N, h·c]."""
        return x.transpose(1, 2).flatten(-2)


class PlainMemory(AssociativeMemory[State]):
    """An associative memory whose layer attends to its own segment only."""

    def initial_state(self, batch: int, device: torch.device | str) -> State:
        """Return the empty memory: zeros, float32."""
        return self.empty(batch, device)

    def write(self, m: Tensor, state: State, context: Context) -> MemoryUpdate[State]:
        """Return what the memory positions m [B, M, D] of the layer's output add to `state`."""
        return self.update(m, state)
