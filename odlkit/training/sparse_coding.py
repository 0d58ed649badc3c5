"""Sparse coding with HODL, UNH and ENA, regularised (9) and constrained (8): problems, methods, one way to train them.

All methods of a problem start from the same iteration (before training UNH and ENA *are* proximal gradient or ALM, and
HODL's D_net is one such step, or the identity), see the same batches for the same number of steps and depth K, and are
differentiated by `odlkit.bilevel`:

    UNH   D_num with learned numbers                       the step size, or beta and tau
    ENA   a network for every layer, nothing bounded       LISTA; D-LADMM
    HODL  T = u + alpha (D_num o D_net - u), sigma(W) <= 1: W is projected while it is trained
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from odlkit.bilevel import LowerLevelError, hypergradient
from odlkit.linear import Operator
from odlkit.models import hodl
from odlkit.networks.metric import dct_atoms
from odlkit.networks.nonexpansive import AveragedResidual, LearnedISTA, soft
from odlkit.operators import Wavelet

ALPHA = 0.9
NUMBERS = 5e-2  # Adam's rate for single numbers
SIDE = 16  # of a patch
PENALTY, ROOM = 5.0, 0.01  # beta, and tau = (1 + ROOM) beta ||A||^2, before training


# -- the problems


@dataclass
class Regularised:
    """``min_u ||Q u - b||^2 / 2 + weight ||u||_1`` with known codes; the loss is ``||u^K - u||^2 / 2``, a batch's mean.

    The columns of Q (m, n) have norm 1, codes are Bernoulli(0.1) times normal, ``b = Q u + 0.01 n``.  (The paper's (9)
    has no 1/2: there the same problem has twice the weight and half the step size.)  Eq: HODL (9).
    """

    q: Tensor  # (m, n)
    codes: Tensor  # (N, n)
    data: Tensor  # (N, m)
    tested: int  # how many of them, the last, are kept for testing
    weight: float = 0.03

    @classmethod
    def drawn(cls, m: int, n: int, seed: int, train: int = 10_000, tested: int = 300) -> Regularised:
        """The paper's synthetic data; raises ``ValueError`` for sizes that are not positive."""
        if min(m, n, train, tested) < 1:
            raise ValueError(f"m, n, train, tested: expected positive numbers, got {m}, {n}, {train}, {tested}")
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(m, n, generator=generator)
        q /= q.norm(dim=0)
        size = (train + tested, n)
        codes = torch.randn(size, generator=generator) * (torch.rand(size, generator=generator) < 0.1)
        return cls(q, codes, codes @ q.mT + 0.01 * torch.randn(train + tested, m, generator=generator), tested)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random training pairs ``(b, u)``."""
        chosen = torch.randint(len(self.data) - self.tested, (size,), generator=generator)
        return self.data[chosen], self.codes[chosen]

    def test(self) -> tuple[Tensor, Tensor]:
        """The pairs ``(b, u)`` kept for testing."""
        return self.data[-self.tested :], self.codes[-self.tested :]

    def start(self, b: Tensor) -> Tensor:
        return b.new_zeros(len(b), self.q.shape[1])

    def loss(self, b: Tensor, codes: Any) -> Callable[[Tensor, Any], Tensor]:
        return lambda u, params: (u - codes).square().sum() / (2 * len(u))

    def double(self) -> Regularised:
        return replace(self, q=self.q.double(), codes=self.codes.double(), data=self.data.double())


class CodeAndNoise(Operator):
    """``A (u, u_n) = Q u + u_n`` on the last dimension, ``(B, n + m) -> (B, m)``.  Eq: HODL (8)."""

    def __init__(self, q: Tensor):
        self.q = q

    def A(self, x: Tensor) -> Tensor:
        n = self.q.shape[1]
        return x[:, :n] @ self.q.mT + x[:, n:]

    def A_adjoint(self, y: Tensor) -> Tensor:
        return torch.cat([y @ self.q, y], 1)


@dataclass
class Constrained:
    """``min weight ||u||_1 + ||u_n||_1`` s.t. ``Q u + u_n = b``, patches b, ``Q Q^T = frame I``; the state is
    ``(stacked u and u_n, multiplier)``.

    No truth is used: the loss is ``weight ||u^K||_1 + ||b - Q u^K||_1``, mean over the batch.  It is convex but not smooth,
    so Theorem 3.1 does not cover it.  Eq: HODL (8).
    """

    q: Tensor  # (m, n)
    data: Tensor  # (N, m)
    frame: float
    weight: float = 1.0

    def __post_init__(self) -> None:
        gram = self.q @ self.q.mT
        if not torch.allclose(gram, self.frame * torch.eye(len(gram)).to(gram), atol=1e-4):
            raise ValueError(f"q: expected a tight frame, Q Q^T = {self.frame} I, got another matrix")
        if self.data.shape[1:] != self.q.shape[:1]:
            raise ValueError(f"data: expected (N, {self.q.shape[0]}), got {tuple(self.data.shape)}")

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, None]:
        """Random patches; nobody knows their codes."""
        return self.data[torch.randint(len(self.data), (size,), generator=generator)], None

    def start(self, b: Tensor) -> tuple[Tensor, Tensor]:
        return b.new_zeros(len(b), sum(self.q.shape)), torch.zeros_like(b)

    def loss(self, b: Tensor, nothing: Any = None) -> Callable[[tuple, Any], Tensor]:
        def value(z: tuple, params: Any) -> Tensor:
            u = z[0][:, : self.q.shape[1]]
            return (self.weight * u.abs().sum() + (b - u @ self.q.mT).abs().sum()) / len(b)

        return value

    def restored(self, z: tuple) -> Tensor:
        """``Q u``, the patches without the noise."""
        return z[0][:, : self.q.shape[1]] @ self.q.mT

    def double(self) -> Constrained:
        return replace(self, q=self.q.double(), data=self.data.double())


def frame() -> Tensor:
    """``Q = [DCT | Haar]`` on patches of 16 x 16: (256, 512), two orthonormal bases, ``Q Q^T = 2 I``."""
    count = SIDE * SIDE
    basis = torch.eye(count, dtype=torch.float64).view(count, 1, SIDE, SIDE)
    haar = Wavelet("haar", 4).A_adjoint(basis).reshape(count, count)
    return torch.cat([dct_atoms(SIDE).reshape(count, count).mT, haar.mT], 1).float()


def salt_and_pepper(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """``share`` of the pixels replaced by 0 or 1, both as often.  Raises ``ValueError`` for a share outside [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number in [0, 1], got {share}")
    draw = torch.rand(x.shape, generator=generator).to(x)
    return torch.where(draw < share / 2, 0.0, torch.where(draw < share, 1.0, x)).to(x)


def to_patches(x: Tensor) -> Tensor:
    """``(B, 1, H, W)`` to non-overlapping patches ``(B H W / 256, 256)``; sides are cut to multiples of 16."""
    h, w = (side // SIDE * SIDE for side in x.shape[-2:])
    rows = x[..., :h, :w].reshape(-1, h // SIDE, SIDE, w // SIDE, SIDE)
    return rows.permute(0, 1, 3, 2, 4).reshape(-1, SIDE * SIDE)


def to_images(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_patches`: ``(B, 1, height, width)``."""
    rows = patches.reshape(-1, height // SIDE, width // SIDE, SIDE, SIDE)
    return rows.permute(0, 1, 3, 2, 4).reshape(-1, 1, height, width)


# -- the methods


@dataclass
class Method:
    """One way to solve and learn: the lower-level map of a batch of data, its parameters, what keeps them in their set."""

    name: str
    map: Callable[..., hodl.Map]  # (problem, b) -> T(u, params, k); aHODL's wants the truth too
    params: Any
    net: LearnedISTA | None = None  # whose W is normalised
    normalise: str | None = None  # "clip" its singular values at 1, or "divide" it by the largest
    metric: Callable[[Any, Any], hodl.Metric] | None = None  # (problem, params) -> the one in which T is non-expansive

    def project(self) -> None:
        """Put the parameters back into their set: ``sigma(W) <= 1``.  Eq: HODL Algorithm 1."""
        if self.net is not None and self.normalise == "divide":
            with torch.no_grad():
                self.net.W.div_(max(1.0, self.net.bound() * (1 + 1e-6)))
        elif self.net is not None and self.normalise == "clip":
            self.net.project()

    def sigma(self) -> float | None:
        """``sigma_max(W)`` by singular values in float64; None without a network that is shared by the layers."""
        return None if self.net is None else self.net.bound()

    def double(self) -> Any:
        """The parameters, detached, in float64."""
        return tree_map(lambda leaf: leaf.detach().double(), self.params)


def weights(net: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters by name: what the optimiser changes in place is what the module has."""
    return dict(net.named_parameters())


def regularised(name: str, problem: Regularised, depth: int) -> Method:
    """``pg``, ``unh``, ``ena``, ``hodl``, and HODL's controls ``hodl-divided`` and ``hodl-free`` (W not normalised).

    D_num is proximal gradient with ``gamma = (2 / L) sigmoid(number)``, from 1 / L on.  Raises ``ValueError`` otherwise.
    """
    L = torch.linalg.matrix_norm(problem.q.double(), 2).item() ** 2
    logit = torch.zeros(())

    def numerical(p: Regularised, b: Tensor) -> hodl.Map:
        gram, right = p.q.mT @ p.q, b @ p.q
        prox = lambda v, step, params: soft(v, step * p.weight)  # noqa: E731
        return hodl.proximal_gradient(lambda u, params: u @ gram - right, prox, lambda w: 2 / L * w["step"].sigmoid())

    if name in ("pg", "unh"):
        return Method(name, numerical, {"step": logit})
    net = LearnedISTA.of_dictionary(problem.q, problem.weight)
    if name == "ena":
        layers = [{key: value.detach().clone() for key, value in weights(net).items()} for _ in range(depth)]
        return Method(name, lambda p, b: hodl.untied(hodl.network(net, b)), layers)
    ways = {"hodl": "clip", "hodl-divided": "divide", "hodl-free": None}
    if name not in ways:
        raise ValueError(f"name: expected pg, unh, ena, {', '.join(ways)}, got {name!r}")

    def composed(p: Regularised, b: Tensor) -> hodl.Map:
        inner = hodl.network(net, b, weights=lambda params: params["net"])
        return hodl.averaged(hodl.compose(numerical(p, b), inner), ALPHA)

    params = {"step": logit, "net": weights(net)}
    return Method(name, composed, params, net, ways[name], lambda p, params: hodl.Diagonal())


def aggregated(method: Method, mu: float) -> Method:
    """``method`` trained as aHODL (4): the step towards the truth needs the truth, so it is for training only.

    L_l = 1 for the sum of ``||u - truth||^2 / 2`` over the batch, so ``s = 0.99``.  Eq: HODL (4).
    """

    def lower(p: Regularised, b: Tensor, codes: Tensor) -> hodl.Map:
        upper = lambda u, params: (u - codes).square().sum() / 2  # noqa: E731
        one = hodl.Diagonal()
        return hodl.aggregated(method.map(p, b), upper, one, mu, hodl.outer_step(one, 1.0))

    return replace(method, name=f"ahodl-{mu:g}", map=lower)


def saddle(p: Constrained, numbers: dict[str, Tensor]) -> hodl.Saddle:
    """``M = diag(tau I - beta A^T A, I / beta)`` with ``tau = (1 + room) beta ||A||^2``: positive for all parameters."""
    beta = numbers["beta"].exp()
    bound = p.frame + 1
    tau = beta * bound * (1 + numbers["room"].exp())
    return hodl.Saddle.linearised(CodeAndNoise(p.q), tau, beta, tight=bound, check=False)


def thresholds(p: Constrained) -> Tensor:
    """What multiplies ``1 / tau`` in the u-step's threshold: the weight for the code, 1 for the noise."""
    return torch.cat([torch.full((p.q.shape[1],), p.weight), torch.ones(p.q.shape[0])]).to(p.q)


def alm(p: Constrained, b: Tensor) -> hodl.Map:
    """The linearised augmented Lagrangian of (8), u and u_n at once, on ``z = ((u, u_n), multiplier)``.

    Eq: HODL (8), Table 2.
    """
    sizes = thresholds(p)
    prox = lambda v, step, params: soft(v, step * sizes)  # noqa: E731
    return hodl.alm_linearised(prox, b, lambda params: saddle(p, params))


def admm(p: Constrained, b: Tensor) -> hodl.Map:
    """ADMM on (8): a linearised step in u with ``tau = (1 + room) beta ||Q||^2``, then u_n exactly, then the multiplier.

    ``u_n+ = soft(b - Q u+ - lambda / beta, 1 / beta)``.  It has the fixed points of `alm`.  Source: HODL Table 4.
    """
    n = p.q.shape[1]

    def step(z: tuple, params: Any, k: int) -> tuple:
        u, noise, multiplier = z[0][:, :n], z[0][:, n:], z[1]
        beta = params["beta"].exp()
        tau = beta * p.frame * (1 + params["room"].exp())
        new = soft(u - (multiplier + beta * (u @ p.q.mT + noise - b)) @ p.q / tau, p.weight / tau)
        gap = b - new @ p.q.mT
        noise = soft(gap - multiplier / beta, 1 / beta)
        return torch.cat([new, noise], 1), multiplier + beta * (noise - gap)

    return step


def learned_layers(exact: bool) -> Callable[[Constrained, Tensor], hodl.Map]:
    """D-LADMM, one layer a step: `alm` or, with ``exact``, `admm`, with its own Q^T, thresholds, beta and step.

    Source: HODL [13].
    """

    def lower(p: Constrained, b: Tensor) -> hodl.Map:
        n = p.q.shape[1]

        def layer(z: tuple, w: Any, k: int) -> tuple:
            u, noise, multiplier = z[0][:, :n], z[0][:, n:], z[1]
            beta, size = w["beta"].exp(), w["noise"].exp()
            r = multiplier + beta * (u @ p.q.mT + noise - b)
            new = soft(u - size * (r @ w["W"].mT), size * w["threshold"].abs())
            gap = b - new @ p.q.mT
            noise = soft(gap - multiplier / beta, 1 / beta) if exact else soft(noise - size * r, size)
            return torch.cat([new, noise], 1), multiplier + beta * (noise - gap)

        return hodl.untied(layer)

    return lower


def constrained(name: str, problem: Constrained, depth: int) -> Method:
    """``alm``, ``admm`` (untrained), ``unh-alm``, ``unh-admm``, ``ena-alm``, ``ena-admm``, ``hodl``, and its controls.

    ``hodl-free`` does not normalise W, ``hodl-plain`` leaves out the conjugation by the metric's root.  D_net is
    ``(x + soft(W x + V b, theta)) / 2`` on ``x = (u, u_n)``, at first the identity up to a small threshold.
    """
    numbers = {"beta": torch.tensor(math.log(PENALTY)), "room": torch.tensor(math.log(ROOM))}
    exact = name.endswith("admm")
    if name in ("alm", "admm", "unh-alm", "unh-admm"):
        return Method(name, admm if exact else alm, numbers, metric=None if exact else saddle)
    if name in ("ena-alm", "ena-admm"):
        step = 1 / (PENALTY * (1 + ROOM) * (problem.frame + (not exact)))
        layer = {"W": problem.q.mT, "threshold": torch.full((problem.q.shape[1],), problem.weight),
                 "beta": numbers["beta"], "noise": torch.tensor(math.log(step))}  # fmt: skip
        layers = [{key: value.clone() for key, value in layer.items()} for _ in range(depth)]
        return Method(name, learned_layers(exact), layers)
    if name not in ("hodl", "hodl-free", "hodl-plain"):
        raise ValueError(f"name: expected alm, admm, unh-alm, unh-admm, ena-alm, ena-admm, hodl, ..., got {name!r}")
    inner = LearnedISTA(sum(problem.q.shape), problem.q.shape[0], 1e-3)
    net = AveragedResidual(inner)

    def composed(p: Constrained, b: Tensor) -> hodl.Map:
        on_u = hodl.network(net, b, weights=lambda params: params["net"])
        on_z = lambda z, params, k: (on_u(z[0], params, k), z[1])  # noqa: E731
        metric = lambda params: saddle(p, params)  # noqa: E731
        on_z = on_z if name == "hodl-plain" else hodl.conjugated(on_z, metric)
        return hodl.averaged(hodl.compose(alm(p, b), on_z), ALPHA)

    params = numbers | {"net": weights(net)}
    return Method(name, composed, params, inner, None if name == "hodl-free" else "clip", saddle)


# -- training and what is measured


def train(method: Method, problem: Regularised | Constrained, depth: int, *, steps: int = 300, batch: int = 32,
          rate: float = 1e-3, seed: int = 0, every: int = 20, clip: float = 10.0) -> dict[str, Any]:  # fmt: skip
    """Minimise ``phi_K(omega) = loss(u^K(omega))`` by Adam on the hypergradient through all K = ``depth`` steps (sHODL).

    ``rate``, for single numbers `NUMBERS`, falls linearly to a twentieth over the last third of the steps; ``every`` so
    many steps, and at the end, omega is projected.  The batches depend on ``seed`` alone, so all methods see the same.  A
    batch on which the lower level fails (the iterate is not finite or has grown beyond reason) changes nothing and is
    counted.  Returns the loss and the norm of the hypergradient of every other step, how many were ``skipped``, and the
    seconds of processor time a step.  Raises `odlkit.bilevel.LowerLevelError` when more than a tenth has failed.
    Eq: HODL Algorithm 1.
    """
    leaves = tree_leaves(method.params)
    groups = [{"params": [leaf], "lr": rate if leaf.dim() else NUMBERS} for leaf in leaves]
    optimiser = torch.optim.Adam(groups)
    left = lambda i: min(1.0, max(0.05, 3 * (1 - i / max(steps, 1))))  # noqa: E731
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, left)
    generator, losses, sizes = torch.Generator().manual_seed(seed), [], []
    skipped = 0
    clock = time.process_time()
    for i in range(steps):
        b, truth = problem.batch(batch, generator)
        upper = problem.loss(b, truth)
        labels = (truth,) if method.name.startswith("ahodl") else ()
        try:
            found = hypergradient(method.map(problem, b, *labels), upper, method.params, problem.start(b), steps=depth)
        except LowerLevelError:
            skipped += 1
            if skipped > steps / 10:
                raise
            continue
        size = math.sqrt(sum(g.square().sum().item() for g in tree_leaves(found.gradient)))
        for leaf, g in zip(leaves, tree_leaves(found.gradient), strict=True):
            leaf.grad = g * min(1.0, clip / max(size, 1e-12))
        optimiser.step()
        decay.step()
        if (i + 1) % every == 0:
            method.project()
        losses.append(found.value.item())
        sizes.append(size)
    method.project()
    seconds = (time.process_time() - clock) / max(steps, 1)
    return {"loss": losses, "gradient": sizes, "skipped": skipped, "seconds": seconds}


@torch.no_grad()
def follow(step: hodl.Map, params: Any, u: Any, steps: int, keep: tuple[int, ...] = (), metric: hodl.Metric | None = None,
           ) -> tuple[dict[int, Any], Tensor, Tensor]:  # fmt: skip
    """Iterate and measure: the states ``u^k`` for k in ``keep``, ``||u^{k+1} - u^k||`` and ``||u^k||``, each ``(steps, B)``.

    Both norms are those of ``metric`` (None: l2).  A map that is non-expansive in it cannot lengthen its step.
    """
    metric = hodl.Diagonal() if metric is None else metric
    states, moves, sizes = {}, [], []
    for k in range(steps):
        if k in keep:
            states[k] = u
        new = step(u, params, k)
        moves.append(metric.norm(tree_map(lambda a, b: a - b, new, u)))
        sizes.append(metric.norm(u))
        u = new
    states[steps] = u
    return states, torch.stack(moves), torch.stack(sizes)


def worst_ratio(moves: Tensor, sizes: Tensor, first: int = 0) -> float:
    """The largest ``||u^{k+1} - u^k|| / ||u^k - u^{k-1}||`` of any item for k > ``first``: at most 1 if T is non-expansive.

    Steps below 1e-9 of the iterate are left out: there the round-off of an arithmetic with 16 digits begins to count.
    """
    seen = moves[first:-1] > 1e-9 * sizes[first:-1].clamp_min(1.0)
    ratios = (moves[first + 1 :] / moves[first:-1].clamp_min(1e-300))[seen]
    return ratios.max().item() if ratios.numel() else 0.0


def nmse(u: Tensor, truth: Tensor) -> float:
    """``10 log10(sum ||u - truth||^2 / sum ||truth||^2)`` over the batch, in dB."""
    return 10 * math.log10((u - truth).double().square().sum().item() / truth.double().square().sum().item())
