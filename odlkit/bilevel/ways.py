"""Ways to differentiate ``phi(w) = upper(u^K(w), w)`` through ``u^{k+1} = T(u^k, w, k)``: unrolled, truncated, implicit.

All share the chain rule ``dphi/dw = d upper/dw + (du^K/dw)^T v^K`` with ``v^K = d upper/du``.  A way has two methods: `run`,
the lower level with whatever has to be remembered, and `pull`, the second term.  ``u`` and ``w`` are trees of tensors; here
they are lists of leaves, and `Lower` puts them together again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten  # torch has no public name for them yet

from odlkit.bilevel.solves import SOLVERS, Solve, Status, asymmetry, ravel, size, solve, unravel

Leaves = list[Tensor]


def vjp(outputs: Leaves, inputs: Leaves, v: Leaves, again: bool = False, graph: bool = False) -> Leaves:
    """``(d outputs / d inputs)^T v``; zero where there is no dependence.  ``again``: the graph is used once more."""
    pairs = [(out, w) for out, w in zip(outputs, v, strict=True) if out.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in inputs]
    outs, ws = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(outs, inputs, ws, retain_graph=again or graph, create_graph=graph, materialize_grads=True)
    )


@dataclass(frozen=True)
class descent:
    """The lower-level map of a loss: ``T(u, w, k) = u - step_size * d loss/du (u, w)``, differentiable in ``u`` and ``w``.

    ``loss(u, w)`` is a scalar; ``step_size`` a number, a tensor, or a function ``(w, k)`` that returns one.
    """

    loss: Callable[[Any, Any], Tensor]
    step_size: Any

    def __call__(self, u: Any, params: Any, k: int = 0) -> Any:
        s = self.step_size(params, k) if callable(self.step_size) else self.step_size
        leaves, slopes, spec = self.slopes(u, params)
        if isinstance(s, Tensor):
            return tree_unflatten([a - s * g for a, g in zip(leaves, slopes, strict=True)], spec)
        return tree_unflatten([a.sub(g, alpha=s) for a, g in zip(leaves, slopes, strict=True)], spec)

    def slopes(self, u: Any, params: Any) -> tuple[Leaves, Leaves, Any]:
        """The leaves of ``u``, of ``d loss/du``, and their tree; with a graph where gradients are being recorded."""
        record = torch.is_grad_enabled()
        leaves, spec = tree_flatten(u)
        with torch.enable_grad():
            leaves = [leaf if record and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
            loss = self.loss(tree_unflatten(leaves, spec), params)
            slopes = torch.autograd.grad(loss, leaves, create_graph=record, materialize_grads=True)
        return leaves, list(slopes), spec


class Lower:
    """A lower level at fixed parameters: the map on leaves, the parameters with and without gradient."""

    def __init__(self, step: Any, upper: Any, params: Any, start: Any):
        self.step, self.upper = step, upper
        leaves, self.params_spec = tree_flatten(params)
        self.start, self.spec = tree_flatten(start)
        for name, part in (("params", leaves), ("start", self.start)):
            bad = [leaf for leaf in part if not (isinstance(leaf, Tensor) and leaf.is_floating_point())]
            if bad or not part:
                got = f"a leaf {type(bad[0]).__name__} {getattr(bad[0], 'dtype', '')}".strip() if bad else "an empty tree"
                raise ValueError(f"{name}: expected a tree of floating point tensors, got {got}")
        self.start = [leaf.detach() for leaf in self.start]
        self.leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        self.params = tree_unflatten(self.leaves, self.params_spec)
        self.frozen = tree_unflatten([leaf.detach() for leaf in leaves], self.params_spec)

    def loss(self, u: Leaves) -> tuple[Tensor, Leaves, Leaves]:
        """``upper(u, w)`` and its two partial derivatives."""
        u = [leaf.detach().requires_grad_() for leaf in u]
        with torch.enable_grad():
            value = self.upper(tree_unflatten(u, self.spec), self.params)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"upper: expected a scalar, a tensor, got {got}")
        found = vjp([value], [*u, *self.leaves], [torch.ones_like(value)])
        return value.detach(), found[: len(u)], found[len(u) :]

    def iterate(self, u: Leaves, first: int, last: int, tol: float = 0.0, keep: dict[int, Any] | None = None, every=1):
        """``(u^k, k, met)`` from ``u = u^first`` to ``k = last`` or to a relative change ``<= tol``; ``keep`` is filled.

        Through frozen parameters where no gradient is recorded.  Trees are taken apart at the ends only: a bare loop.
        """
        params = self.params if torch.is_grad_enabled() else self.frozen
        tree, k, met = tree_unflatten(u, self.spec), first, False
        while k < last and not met:
            if keep is not None and (k - first) % every == 0:
                keep[k] = tree
            old, tree, k = tree, self.step(tree, params, k), k + 1
            met = tol > 0 and change(tree_leaves(tree), tree_leaves(old)) <= tol
        leaves, spec = tree_flatten(tree)
        if spec != self.spec:
            raise ValueError(f"step: expected a tree like start, keys in the same order, {self.spec}, got {spec}")
        if [(leaf.shape, leaf.dtype) for leaf in leaves] != [(leaf.shape, leaf.dtype) for leaf in u]:
            kinds = [[(*leaf.shape, leaf.dtype) for leaf in part] for part in (u, leaves)]
            raise ValueError(f"step: expected leaves like those of start, {kinds[0]}, got {kinds[1]}")
        return leaves, k, met


def change(new: Leaves, old: Leaves) -> float:
    """``||new - old|| / ||old||``."""
    with torch.no_grad():
        x = ravel(old)
        return size(ravel(new) - x) / max(size(x), torch.finfo(x.dtype).tiny)


@dataclass
class Tape:
    """What a run of the lower level leaves behind: ``u^k``, ``k``, whether the tolerance was met, and what `pull` needs."""

    u: Leaves
    k: int
    met: bool
    kept: dict[int, Any] = field(default_factory=dict)  # trees u^j for some j < k
    graph: Leaves | None = None  # u^k with its graph down to the parameters


@dataclass(frozen=True)
class Unrolled:
    """Reverse mode through all K steps (RHG).

    ``v^k = (dT/du)^T v^{k+1}``,  ``dphi/dw = d upper/dw + sum_k (dT/dw)^T v^{k+1}``, both at ``u^k``, k = K-1 ... 0.

    ``memory="full"`` keeps the graph of all steps, as fast as a bare loop.  ``"checkpointed"`` keeps each
    ``ceil(sqrt(K))``-th iterate and rebuilds one segment's graph at a time: memory ``O(sqrt(K))``.  ``"rebuilt"`` keeps all
    iterates and rebuilds one step's graph at a time: K copies of ``u`` and one step.  These two run the steps twice, so
    ``step`` must be a function: no dropout, no generator that moves on.  Source: Franceschi et al., ICML 2017.
    """

    memory: str = "full"

    def __post_init__(self) -> None:
        if self.memory not in ("full", "checkpointed", "rebuilt"):
            raise ValueError(f"memory: expected 'full', 'checkpointed' or 'rebuilt', got {self.memory!r}")

    def run(self, lower: Lower, steps: int, tol: float) -> Tape:
        return self.run_from(lower, lower.start, 0, steps, tol)

    def run_from(self, lower: Lower, u: Leaves, first: int, steps: int, tol: float) -> Tape:
        if self.memory == "full":
            with torch.enable_grad():
                graph, k, met = lower.iterate(u, first, steps, tol)
            return Tape([leaf.detach() for leaf in graph], k, met, graph=graph)
        kept: dict[int, Any] = {}
        every = 1 if self.memory == "rebuilt" else math.ceil(math.sqrt(max(steps - first, 1)))
        with torch.no_grad():
            u, k, met = lower.iterate(u, first, steps, tol, kept, every)
        return Tape(u, k, met, kept)

    def pull(self, lower: Lower, tape: Tape, v: Leaves, warm: Tensor | None = None) -> tuple[Leaves, Solve | None]:
        if tape.graph is not None:
            graph, tape.graph = tape.graph, None
            return vjp(graph, lower.leaves, v), None
        total, end = [torch.zeros_like(leaf) for leaf in lower.leaves], tape.k
        for k in sorted(tape.kept, reverse=True):
            u = [leaf.detach().requires_grad_() for leaf in tree_leaves(tape.kept.pop(k))]
            with torch.enable_grad():
                new, _, _ = lower.iterate(u, k, end)
            below = u if tape.kept else []  # nobody needs the derivative in u^0
            found = vjp(new, [*below, *lower.leaves], v)
            v, end = found[: len(below)], k
            total = [a + b for a, b in zip(total, found[len(below) :], strict=True)]
        return total, None


@dataclass(frozen=True)
class Truncated:
    """Reverse mode through the last ``window`` steps only (TRHG): `Unrolled` without the terms ``k < K - window``.

    The first ``K - window`` steps run without a graph.  The bias stays when K grows: it is that of a Neumann series of
    ``window`` terms.  With a lower tolerance, where K is not known in advance, iterates are kept and the window is rebuilt.
    Source: Shaban et al., AISTATS 2019.
    """

    window: int
    memory: str = "full"

    def __post_init__(self) -> None:
        Unrolled(self.memory)
        if self.window < 1:
            raise ValueError(f"window: expected at least 1 step, got {self.window}")

    def run(self, lower: Lower, steps: int, tol: float) -> Tape:
        kept: dict[int, Any] = {}
        first, met = max(steps - self.window, 0), False
        with torch.no_grad():
            if tol > 0:
                u, steps, met = lower.iterate(lower.start, 0, steps, tol, kept)
                first = max(steps - self.window, 0)
                u = tree_leaves(kept[first]) if kept else u
            else:
                u, _, _ = lower.iterate(lower.start, 0, first)
        tape = Unrolled(self.memory).run_from(lower, u, first, steps, 0.0)
        tape.met = met
        return tape

    def pull(self, lower: Lower, tape: Tape, v: Leaves, warm: Tensor | None = None) -> tuple[Leaves, Solve | None]:
        return Unrolled(self.memory).pull(lower, tape, v)


class Linearised:
    """``F = u - T(u, w, k)`` or, for the Hessian, ``F = d loss/du`` at a point, with its graph: products with ``dF``."""

    def __init__(self, lower: Lower, u: Leaves, k: int, hessian: bool = False):
        self.u, self.leaves = [leaf.detach().requires_grad_() for leaf in u], lower.leaves
        with torch.enable_grad():
            if hessian:
                self.F = lower.step.slopes(tree_unflatten(self.u, lower.spec), lower.params)[1]
            else:
                self.F = [a - b for a, b in zip(self.u, lower.iterate(self.u, k, k + 1)[0], strict=True)]

    def transposed(self, v: Tensor) -> Tensor:
        """``(dF/du)^T v``."""
        return ravel(vjp(self.F, self.u, unravel(v, self.u), again=True))

    def forward(self, x: Tensor) -> Tensor:
        """``(dF/du) x``, as the derivative of the linear map ``v -> (dF/du)^T v``."""
        v = [torch.zeros_like(leaf, requires_grad=True) for leaf in self.u]
        with torch.enable_grad():
            back = vjp(self.F, self.u, v, graph=True)
        return ravel(vjp(back, v, unravel(x, self.u)))

    def to_params(self, v: Tensor) -> Leaves:
        """``-(dF/dw)^T v``."""
        return [-g for g in vjp(self.F, self.leaves, unravel(v, self.u), again=True)]


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem at ``u^K``, as if it were the fixed point (CG, NS).

    ``(I - dT/du)^T v = d upper/du``,  ``dphi/dw = d upper/dw + (dT/dw)^T v``.

    ``solver="cg"`` needs a symmetric positive definite ``I - dT/du``; a `descent` uses its Hessian, which is symmetric, any
    other map is tested with a random pair.  ``"neumann"`` and ``"fixed point"`` need a contraction (the first sums at most
    ``max_iter`` terms from zero, the second starts from ``warm``); ``"gmres"`` an invertible matrix.  Stops at a relative
    residual ``tol``, and missing it in ``max_iter`` iterations is a failure; ``tol=0`` takes all iterations and asks for
    nothing.  Memory: one step, whatever K.  Source: Pedregosa, ICML 2016 (CG); Lorraine et al., AISTATS 2020 (Neumann).
    """

    solver: str = "cg"
    tol: float = 1e-6
    max_iter: int = 500

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(map(repr, SOLVERS))}, got {self.solver!r}")

    def run(self, lower: Lower, steps: int, tol: float) -> Tape:
        with torch.no_grad():
            return Tape(*lower.iterate(lower.start, 0, steps, tol))

    def pull(self, lower: Lower, tape: Tape, v: Leaves, warm: Tensor | None = None) -> tuple[Leaves, Solve | None]:
        hessian = self.solver == "cg" and isinstance(lower.step, descent)
        point, b = Linearised(lower, tape.u, tape.k, hessian), ravel(v)
        if self.solver == "cg" and not hessian and warm is None:  # a warm start comes from a call that has tested it
            skew = asymmetry(point.transposed, b)
            if not skew <= math.sqrt(torch.finfo(b.dtype).eps):
                nothing = [torch.full_like(leaf, torch.nan) for leaf in lower.leaves]
                return nothing, Solve(torch.zeros_like(b), Status.NOT_SYMMETRIC, skew, 0)
        found = solve(self.solver, point.transposed, b, warm, tol=self.tol, max_iter=self.max_iter)
        return point.to_params(found.value), found
