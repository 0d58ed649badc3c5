"""One call for the hypergradient ``dphi/dw`` of ``phi(w) = upper(u^K(w), w)``, with the state of everything it rests on.

The lower level is a map ``T(u, w, k)`` whose fixed point is sought.  How to differentiate is an argument: see
`odlkit.bilevel.ways`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from odlkit.bilevel.solves import Solve, Status, ravel, size, solve, unravel
from odlkit.bilevel.ways import Implicit, Leaves, Linearised, Lower, Tape, Truncated, Unrolled, change, descent

Way = Unrolled | Truncated | Implicit
FULL = Unrolled()


@dataclass
class Result:
    """A hypergradient and what it rests on."""

    value: Tensor  # upper(u^K, w)
    gradient: Any  # like params; None where the lower level or the upper loss is not finite, or diverged
    state: Any  # u^K, like start, without a graph
    status: Status  # CONVERGED: the lower tolerance was met; STEP_LIMIT: K steps were taken; else what failed first
    residual: float  # ||u^K - T(u^K)|| / ||u^K||
    iterations: int  # K, or fewer where the tolerance was met earlier
    error: float | None = None  # estimate of the relative error against the exact gradient at the lower fixed point
    adjoint_iterations: int = 0  # products with (I - dT/du)^T; 0 where unrolled
    adjoint_residual: float | None = None
    warm: Tensor | None = None  # the adjoint solution: give it to the next call
    failure: str = ""  # what LowerLevelError says

    def attached(self, params: Any) -> Tensor:
        """The value, with the gradient where autograd looks for it: ``result.attached(params).backward()``.

        ``params`` are those that `hypergradient` had, with their graph: leaves get ``.grad``, whatever they were computed
        from gets its own by the chain rule.  Raises ``ValueError`` where the trees differ or there is no gradient.
        """
        leaves, spec = tree_flatten(params)
        slopes, own = tree_flatten(self.gradient)
        if spec != own:
            raise ValueError(f"params: expected the tree of the gradient, {own}, got {spec}")
        return _Attached.apply(self.value, slopes, *leaves)


class _Attached(torch.autograd.Function):
    """A number whose derivatives are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slopes: Leaves, *leaves: Tensor) -> Tensor:
        """The number."""
        ctx.slopes = slopes
        return value.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        """Its derivatives times ``v``."""
        return None, None, *(v * slope for slope in ctx.slopes)


class LowerLevelError(RuntimeError):
    """The lower level, its linearised system or the upper loss failed.

    ``quantity`` says what, ``iteration`` where, ``status`` how; ``result`` holds everything up to that point.
    """

    result: Result

    def __init__(self, text: str, status: Status, iteration: int, quantity: str):
        super().__init__(text)
        self.status, self.iteration, self.quantity = status, iteration, quantity


def hypergradient(
    step: Callable[[Any, Any, int], Any],
    upper: Callable[[Any, Any], Tensor],
    params: Any,
    start: Any,
    *,
    steps: int = 100,
    way: Way = FULL,
    tol: float = 0.0,
    error: bool = False,
    warm: Tensor | None = None,
    strict: bool = True,
) -> Result:
    """The gradient in ``w = params`` of ``upper(u^K(w), w)``, ``u^{k+1} = step(u^k, w, k)``, ``u^0 = start``, K = ``steps``.

    ``params`` and ``start`` are trees of floating point tensors of any shapes; ``step(u, w, k)`` returns a tree like
    ``start`` and must be a function of its arguments; ``upper(u, w)`` is a scalar, whose direct dependence on ``w`` counts.
    ``start`` is a constant.  Nothing is written to ``.grad``.  ``way``: `Unrolled`, `Truncated` or `Implicit`.  With
    ``tol > 0`` the lower level stops when ``||u^{k+1} - u^k|| <= tol ||u^k||``.  ``steps=0`` differentiates at ``start``:
    implicitly, where ``start`` is a solution found elsewhere.

    ``error=True`` estimates the relative error of the gradient against the exact hypergradient at the lower level's fixed
    point (of ``step(., w, K)``): see `estimate` for cost and limits.

    Raises `LowerLevelError` with the iteration and the quantity when an iterate is not finite or has grown beyond
    ``1e6 max(||u^0||, sqrt(n))``, when a tolerance is missed, when the adjoint system is singular or, for CG, not symmetric,
    when the loss or its gradient is not finite, or when the error cannot be estimated; with ``strict=False`` the result's
    ``status`` and ``failure`` say so.  Raises `ValueError` for trees that do not fit
    and where neither ``step`` nor ``upper`` uses ``params``, but a module's own parameters, say.
    """
    if steps < 0 or not tol >= 0:
        raise ValueError(f"steps, tol: expected steps >= 0 and tol >= 0, got {steps} and {tol}")
    if not isinstance(way, Way):
        raise ValueError(f"way: expected Unrolled(...), Truncated(...) or Implicit(...), got {way!r}")
    lower = Lower(step, upper, params, start)
    if warm is not None and warm.numel() != sum(leaf.numel() for leaf in lower.start):
        raise ValueError(f"warm: expected the warm of a call with the same lower level, got {tuple(warm.shape)}")
    tape = way.run(lower, steps, tol)
    with torch.no_grad():
        residual = change(lower.iterate(tape.u, tape.k, tape.k + 1)[0], tape.u)
    value, v, direct = lower.loss(tape.u)
    status = Status.CONVERGED if tape.met else Status.STEP_LIMIT
    result = Result(value, None, tree_unflatten(tape.u, lower.spec), status, residual, tape.k)
    try:
        check_finite(lower, tape, residual, value)
        text = f"the lower level missed its tolerance: residual {residual:.1e} after {tape.k} steps, wanted {tol:.0e}"
        missed = LowerLevelError(text, Status.STEP_LIMIT, tape.k, "residual") if tol > 0 and not tape.met else None
        if missed and strict:
            raise missed
        through, adjoint = way.pull(lower, tape, v, warm)
        gradient = [a + b for a, b in zip(direct, through, strict=True)]
        if not any(bool(g.any()) for g in gradient):
            check_used(lower, tape)
        result.gradient = tree_unflatten(gradient, lower.params_spec)
        if adjoint is not None:
            result.adjoint_iterations, result.adjoint_residual = adjoint.iterations, adjoint.residual
            result.warm = adjoint.value
        if missed:
            raise missed
        if isinstance(way, Implicit) and adjoint is not None:
            check_adjoint(way, adjoint, tape.k)
        if not math.isfinite(size(ravel(gradient))):
            text = f"the hypergradient is not finite at u^{tape.k}"
            raise LowerLevelError(text, Status.NOT_FINITE, tape.k, "hypergradient")
        if error:
            result.error = math.inf
            result.error = estimate(lower, way, tape, residual, gradient, adjoint)
    except LowerLevelError as failure:
        result.status, result.failure, failure.result = failure.status, str(failure), result
        if strict:
            raise
    return result


def check_finite(lower: Lower, tape: Tape, residual: float, value: Tensor) -> None:
    """Raise for what is wrong with ``u^K``.  Only then are the steps taken again, to find the first bad iterate."""
    limit = 1e6 * max(size(ravel(lower.start)), math.sqrt(sum(leaf.numel() for leaf in lower.start)))

    def check(u: Leaves, k: int) -> None:
        norm = size(ravel(u))
        if not math.isfinite(norm):
            text = f"the lower level is not finite: ||u^{k}|| = {norm}"
            raise LowerLevelError(text, Status.NOT_FINITE, k, "iterate")
        if norm > limit:
            text = f"the lower level diverges: ||u^{k}|| = {norm:.1e}, over 1e6 times its start"
            raise LowerLevelError(text, Status.DIVERGED, k, "iterate")

    try:
        check(tape.u, tape.k)
    except LowerLevelError:
        u = lower.start
        with torch.no_grad():
            for k in range(tape.k):
                u, _, _ = lower.iterate(u, k, k + 1)
                check(u, k + 1)
        raise
    for quantity, number in (("residual", residual), ("upper loss", value.item())):
        if not math.isfinite(number):
            text = f"the {quantity} is {number} at u^{tape.k}"
            raise LowerLevelError(text, Status.NOT_FINITE, tape.k, quantity)


def check_used(lower: Lower, tape: Tape) -> None:
    """Raise where no parameter has a part in the first step, in the last or in the upper loss: zero would say nothing."""
    with torch.enable_grad():
        parts = [lower.upper(tree_unflatten(tape.u, lower.spec), lower.params)]
        for u, k in ((lower.start, 0), (tape.u, tape.k)):
            parts += lower.iterate(u, k, k + 1)[0]
    parts = [part.sum() for part in parts if part.requires_grad]
    if not parts or all(g is None for g in torch.autograd.grad(parts, lower.leaves, allow_unused=True)):
        hint = "a module's own parameters are not params: torch.func.functional_call(module, params, ...)"
        raise ValueError(f"params: expected step or upper to use the params they are given, got none that does; {hint}")


def check_adjoint(way: Implicit, adjoint: Solve, k: int) -> None:
    """Raise for what is wrong with the linear system of `Implicit`, and say what would help."""
    if adjoint.status is Status.CONVERGED or (adjoint.status is Status.STEP_LIMIT and way.tol == 0):
        return
    why = {
        Status.STEP_LIMIT: f"missed its tolerance {way.tol:.0e}",
        Status.NOT_SYMMETRIC: "is not symmetric: use solver='gmres'",
        Status.NOT_DEFINITE: "has a direction without curvature: the lower level is singular or not at a minimum there",
        Status.STAGNATED: "has a residual that no longer falls: I - dT/du is singular or out of reach",
        Status.DIVERGED: "diverges: the lower map is no contraction there; use solver='gmres'",
        Status.NOT_FINITE: "is not finite",
    }[adjoint.status]
    at = f"residual {adjoint.residual:.1e} after {adjoint.iterations} products, at u^{k}"
    text = f"the adjoint system, by {way.solver}, {why} ({at})"
    raise LowerLevelError(text, adjoint.status, adjoint.iterations, "adjoint residual")


def estimate(lower: Lower, way: Way, tape: Tape, residual: float, gradient: Leaves, adjoint: Solve | None) -> float:
    """The relative error of ``gradient``: its distance to the implicit gradient at a Newton-corrected inner point.

    ``e = (I - dT/du)^{-1} (T(u^K) - u^K)``,  ``g' = `` the implicit gradient at ``u^K + e`` with a tight adjoint solve,
    ``error = ||g - g'|| / ||g'||``.  The correction squares the inner error, so ``g'`` is far nearer to the exact
    hypergradient than ``g`` is; it is repeated until the residual has fallen to a twentieth.

    Costs two or more linear solves, by CG for a `descent` or where the way is CG, else by GMRES: some tens of products with
    ``dT/du``, each about two steps (CG) or four (GMRES), at the memory of one step.  Not to be trusted near round-off (below
    ``1e-5`` in float32; ``10 eps`` is the least that is returned), nor where ``T`` has kinks between ``u^K`` and its fixed
    point, nor where there are several fixed points.  Where ``I - dT/du`` is singular, or Newton's method comes no nearer, it
    raises `LowerLevelError`.
    """
    hessian = isinstance(lower.step, descent)
    symmetric = hessian or (isinstance(way, Implicit) and way.solver == "cg")
    solver, eps = "cg" if symmetric else "gmres", torch.finfo(ravel(lower.start).dtype).eps

    def failed(what: str, status: Status) -> LowerLevelError:
        return LowerLevelError(f"the error cannot be estimated: {what}", status, tape.k, "error estimate")

    u, norms = tape.u, []
    while True:
        point = Linearised(lower, u, tape.k, hessian)
        minus = -ravel([leaf.detach() for leaf in point.F])
        norms.append(size(minus))
        near = 0.05 if len(norms) > 1 else 0.0
        if norms[-1] <= norms[0] * max(near, 10 * eps / max(residual, eps)):  # the second: u is exact to round-off
            break
        if len(norms) > 5 or not norms[-1] <= min(norms):
            raise failed(f"Newton's method goes from residual {norms[0]:.1e} to {norms[-1]:.1e}", Status.DIVERGED)
        move = solve(solver, point.transposed if symmetric else point.forward, minus, tol=1e-2)
        if move.status is not Status.CONVERGED:
            raise failed(f"Newton's system, by {solver}: {move.status}, residual {move.residual:.1e}", move.status)
        u = [a + b for a, b in zip(u, unravel(move.value, u), strict=True)]
    _, b, direct = lower.loss(u)
    same = isinstance(way, Implicit) and (way.solver == "cg" or not hessian)  # the unknown of the same system
    v = solve(solver, point.transposed, ravel(b), adjoint.value if adjoint and same else None, tol=eps**0.75)
    if not v.residual <= math.sqrt(eps):
        raise failed(f"the adjoint system, by {solver}: {v.status}, residual {v.residual:.1e}", v.status)
    exact = ravel([a + b for a, b in zip(direct, point.to_params(v.value), strict=True)])
    return max(size(ravel(gradient) - exact) / max(size(exact), sys.float_info.min), 10 * eps)
