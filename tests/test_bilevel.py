"""Hypergradients: each way on each problem against a dense float64 reference of its own, and every failure by its name.

A problem has the map twice: for the engine, on trees and with the engine's own `descent`, and written out by hand on flat
vectors, from whose dense Jacobians the references are made (forward accumulation, powers, solves; no reverse sweep).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from odlkit import propagate
from odlkit.bilevel import Implicit, LowerLevelError, Status, Truncated, Unrolled, descent, hypergradient
from odlkit.bilevel.solves import SOLVERS, asymmetry, solve

K, WINDOW = 30, 9


@dataclass
class Problem:
    step: Callable  # for the engine, on trees
    T: Callable  # the same by hand: (flat u, flat w, k) -> flat u
    upper: Callable  # on trees
    params: Any
    start: Any
    symmetric: bool


def flat(tree: Any) -> torch.Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree_leaves(tree)])


def like(vector: torch.Tensor, tree: Any) -> Any:
    leaves, spec = tree_flatten(tree)
    parts = vector.split([leaf.numel() for leaf in leaves])
    return tree_unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)], spec)


def draw(seed: int) -> Callable[..., torch.Tensor]:
    """Float64 values that float32 holds exactly, so that both precisions are given the same problem."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).double()


def ridge(cast) -> Problem:
    """``1/2 u'Au - u'(Bw + c) + 1/2 e^l |u|^2`` by gradient descent; w and l are learned, the upper loss sees w directly."""
    r = draw(1)
    Q, B, c, target = r(12, 6), r(6, 3), r(6), r(6)
    A, s = (Q.T @ Q / 12).float().double(), 0.4
    constants = {"A": A, "B": B, "c": c, "target": target}
    A_, B_, c_, target_ = (cast(x) for x in constants.values())

    def loss(u, p):
        return 0.5 * u @ (A_ @ u) - u @ (B_ @ p["w"] + c_) + 0.5 * p["l"].exp() * (u @ u)

    def T(u, w, k):
        return u - s * (A @ u - B @ w[1:] - c + w[0].exp() * u)  # the leaves of a dict are sorted: l, w

    def upper(u, p):
        return 0.5 * (u - target_).square().sum() + 0.1 * p["w"].square().sum()

    params = {"l": cast(torch.tensor(-0.5, dtype=torch.float64)), "w": cast(r(3))}
    return Problem(descent(loss, s), T, upper, params, cast(r(6)), True)


def cleaning(cast) -> Problem:
    """Softmax regression with a weight for every sample; the lower variable is a dict of a matrix and a bias."""
    r = draw(2)
    x, x_clean, labels = r(14, 3), r(9, 3), torch.arange(14) % 3
    onehot, s, decay, clean = nn.functional.one_hot(labels, 3).double(), 0.9, 0.3, torch.arange(9) % 3
    x_, x_clean_ = cast(x), cast(x_clean)

    def loss(u, psi):
        losses = nn.functional.cross_entropy(x_ @ u["W"] + u["b"], labels, reduction="none")
        return (psi.sigmoid() * losses).mean() + decay / 2 * (u["W"].square().sum() + u["b"].square().sum())

    def T(u, psi, k):
        W, b = u[:9].view(3, 3), u[9:]
        error = psi.sigmoid()[:, None] * ((x @ W + b).softmax(1) - onehot) / 14
        return u - s * torch.cat([(x.T @ error + decay * W).reshape(-1), error.sum(0) + decay * b])

    def upper(u, psi):
        return nn.functional.cross_entropy(x_clean_ @ u["W"] + u["b"], clean)

    start = {"W": cast(torch.zeros(3, 3)), "b": cast(torch.zeros(3))}
    return Problem(descent(loss, s), T, upper, cast(r(14)), start, True)


def network(cast) -> Problem:
    """``(u, m) <- (tanh(W u + V m + b), (m + tanh u) / 2)``: a module, a tuple of states, not symmetric."""
    r = draw(3)
    net = nn.Linear(6, 4).double()
    weight, bias = r(4, 6), r(4)
    weight = (0.5 * weight / torch.linalg.matrix_norm(weight, 2)).float().double()
    params = {"bias": cast(bias), "weight": cast(weight)}
    target = cast(r(4))

    def step(u, p, k):
        a, m = u
        return functional_call(net, p, (torch.cat([a, m]),)).tanh(), 0.5 * m + 0.5 * a[:2].tanh()

    def T(u, w, k):
        return torch.cat([torch.tanh(w[4:].view(4, 6) @ u + w[:4]), 0.5 * u[4:] + 0.5 * torch.tanh(u[:2])])

    def upper(u, p):
        return (u[0] - target).square().sum() + u[1].sum() + 0.01 * p["weight"].square().sum()

    return Problem(step, T, upper, params, (cast(r(4)), cast(r(2))), False)


def lasso(cast) -> Problem:
    """A proximal gradient step with a learned threshold and learned data, smoothed: ``v - kappa v / sqrt(v^2 + 1/4)``."""
    r = draw(4)
    Q, s, target = r(10, 5) / 3, 0.35, r(5)
    Q_, target_ = cast(Q), cast(target)

    def shrink(v, kappa):
        return v - kappa * v / (v.square() + 0.25).sqrt()

    def step(u, p, k):
        kappa, b = p
        return shrink(u - s * (Q_.T @ (Q_ @ u - b)), kappa.exp())

    def T(u, w, k):
        return shrink(u - s * (Q.T @ (Q @ u - w[1:])), w[0].exp())

    def upper(u, p):
        return 0.5 * (u - target_).square().sum()

    return Problem(step, T, upper, [cast(torch.tensor(-2.0)), cast(r(10))], cast(r(5)), False)


def averaged(cast) -> Problem:
    """Steps that depend on k: ``u + a_k (D(u) - u)``, ``a_k = (k + 1) / (k + 2)``, D a rotation with a shift, scaled."""
    r = draw(5)
    D = (0.6 * torch.linalg.qr(r(5, 5))[0]).float().double()
    D_ = cast(D)

    def step(u, w, k):
        return u + (k + 1) / (k + 2) * (torch.sin(D_ @ u) + w - u)

    def T(u, w, k):
        return u + (k + 1) / (k + 2) * (torch.sin(D @ u) + w - u)

    return Problem(step, T, lambda u, w: (u * w).sum() + u.square().sum(), cast(r(5)), cast(r(5)), False)


PROBLEMS = {"ridge": ridge, "cleaning": cleaning, "network": network, "lasso": lasso, "averaged": averaged}


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS.keys())
def make(request) -> Callable:
    return request.param


# -- dense references, in float64


def parts(problem: Problem, u: torch.Tensor, w: torch.Tensor):
    """``d upper/du``, ``d upper/dw`` on flat vectors."""

    def loss(x, y):
        return problem.upper(like(x, problem.start), like(y, problem.params))

    return jacobian(loss, (u, w))


def iterates(problem: Problem, steps: int) -> list[torch.Tensor]:
    us = [flat(problem.start)]
    for k in range(steps):
        us.append(problem.T(us[-1], flat(problem.params), k))
    return us


def unrolled_reference(problem: Problem, steps: int, window: int | None = None) -> torch.Tensor:
    """``du^K/dw`` by forward accumulation, from zero ``window`` steps before the end."""
    us, w = iterates(problem, steps), flat(problem.params)
    sensitivity = torch.zeros(len(us[0]), len(w), dtype=torch.float64)
    for k in range(max(steps - (window or steps), 0), steps):
        Ju, Jw = jacobian(lambda x, y, k=k: problem.T(x, y, k), (us[k], w))
        sensitivity = Ju @ sensitivity + Jw
    b, direct = parts(problem, us[-1], w)
    return direct + sensitivity.T @ b


def implicit_reference(problem: Problem, u: torch.Tensor, k: int, terms: int | None = None) -> torch.Tensor:
    """The implicit gradient at ``u``: a dense solve, or the first ``terms`` powers of ``dT/du``."""
    w = flat(problem.params)
    Ju, Jw = jacobian(lambda x, y: problem.T(x, y, k), (u, w))
    b, direct = parts(problem, u, w)
    if terms is None:
        v = torch.linalg.solve(torch.eye(len(u), dtype=torch.float64) - Ju.T, b)
    else:
        v = sum(torch.linalg.matrix_power(Ju.T, j) @ b for j in range(terms))
    return direct + Jw.T @ v


def exact_reference(problem: Problem, k: int) -> torch.Tensor:
    """The implicit gradient at the fixed point of ``T(., w, k)``, found by Newton's method."""
    u, w, eye = iterates(problem, 300)[-1], flat(problem.params), None
    for _ in range(20):
        Ju = jacobian(lambda x: problem.T(x, w, k), u)
        eye = torch.eye(len(u), dtype=torch.float64)
        u = u + torch.linalg.solve(eye - Ju, problem.T(u, w, k) - u)
    assert (problem.T(u, w, k) - u).norm() < 1e-14 * max(1, u.norm())
    return implicit_reference(problem, u, k)


def off(gradient: Any, reference: torch.Tensor) -> float:
    return ((flat(gradient).double() - reference).norm() / reference.norm()).item()


def both(make: Callable, dtype: torch.dtype) -> tuple[Problem, Problem]:
    return make(lambda x: x.to(dtype)), make(lambda x: x.double())


def run(problem: Problem, way, **options):
    options = {"steps": K, **options}
    return hypergradient(problem.step, problem.upper, problem.params, problem.start, way=way, **options)


LIMIT = {torch.float64: 1e-10, torch.float32: 1e-6}
TIGHT = {torch.float64: 1e-13, torch.float32: 1e-7}


# -- each way on each problem


@pytest.mark.parametrize("memory", ["full", "checkpointed", "rebuilt"])
def test_unrolled_is_the_derivative_of_all_steps(make, dtype, memory):
    problem, reference = both(make, dtype)
    result = run(problem, Unrolled(memory))
    assert off(result.gradient, unrolled_reference(reference, K)) <= LIMIT[dtype]
    assert off(result.state, iterates(reference, K)[-1]) <= LIMIT[dtype]
    assert result.value.item() == pytest.approx(
        reference.upper(like(iterates(reference, K)[-1], reference.start), reference.params).item(), rel=LIMIT[dtype]
    )
    assert tree_map(lambda a: (a.shape, a.dtype), result.gradient) == tree_map(lambda a: (a.shape, a.dtype), problem.params)


@pytest.mark.parametrize("memory", ["full", "checkpointed", "rebuilt"])
def test_truncated_drops_the_early_steps_and_nothing_else(make, dtype, memory):
    problem, reference = both(make, dtype)
    result = run(problem, Truncated(WINDOW, memory))
    truncated = unrolled_reference(reference, K, WINDOW)
    assert off(result.gradient, truncated) <= LIMIT[dtype]
    assert off(truncated, unrolled_reference(reference, K)) > 1e-6  # the bias is there to be seen
    longer = run(problem, Truncated(K + 5, memory))
    assert off(longer.gradient, flat(run(problem, Unrolled(memory)).gradient).double()) <= 1e-15


@pytest.mark.parametrize("solver", SOLVERS)
def test_implicit_solves_the_linear_system_at_the_last_iterate(make, dtype, solver):
    problem, reference = both(make, dtype)
    if solver == "cg" and not reference.symmetric:
        with pytest.raises(LowerLevelError, match="is not symmetric: use solver='gmres'"):
            run(problem, Implicit("cg"))
        return
    result = run(problem, Implicit(solver, tol=TIGHT[dtype]))
    assert off(result.gradient, implicit_reference(reference, iterates(reference, K)[-1], K)) <= LIMIT[dtype]
    assert result.adjoint_residual <= max(TIGHT[dtype], torch.finfo(dtype).eps) and result.adjoint_iterations > 1


def test_neumann_is_a_sum_of_powers(make, dtype):
    problem, reference = both(make, dtype)
    result = run(problem, Implicit("neumann", tol=0, max_iter=WINDOW))
    assert off(result.gradient, implicit_reference(reference, iterates(reference, K)[-1], K, WINDOW)) <= LIMIT[dtype]


def test_ridge_against_its_closed_form():
    problem = ridge(lambda x: x.double())
    r = draw(1)
    Q, B, c, target, w, l = r(12, 6), r(6, 3), r(6), r(6), problem.params["w"], problem.params["l"]
    H = (Q.T @ Q / 12).float().double() + l.exp() * torch.eye(6, dtype=torch.float64)
    u = torch.linalg.solve(H, B @ w + c)
    v = torch.linalg.solve(H, u - target)
    closed = torch.cat([-(l.exp() * v @ u)[None], B.T @ v + 0.2 * w])
    assert off(exact_reference(problem, 0), closed) <= 1e-12
    for way in (Unrolled(), Implicit("cg", tol=1e-13), Implicit("gmres", tol=1e-13)):
        result = run(problem, way, steps=5000, tol=1e-15)
        assert off(result.gradient, closed) <= 1e-11 and result.status is Status.CONVERGED and result.iterations < 1000


def test_unrolled_against_finite_differences(make):
    problem = make(lambda x: x.double())
    gradient, h = flat(run(problem, Unrolled()).gradient), 1e-5
    direction = draw(9)(len(gradient))

    def phi(t: float) -> float:
        moved = like(flat(problem.params) + t * direction, problem.params)
        u = problem.start
        for k in range(K):
            u = problem.step(u, moved, k)
        return problem.upper(u, moved).item()

    assert (phi(h) - phi(-h)) / (2 * h) == pytest.approx((gradient @ direction).item(), rel=1e-7)


def test_memory_modes_agree_to_round_off(make):
    problem = make(lambda x: x.double())
    for way in (Unrolled, lambda memory: Truncated(WINDOW, memory)):
        full, segments, steps = (flat(run(problem, way(m)).gradient) for m in ("full", "checkpointed", "rebuilt"))
        assert off(segments, full) <= 1e-15 and off(steps, full) <= 1e-15


def test_on_a_quadratic_unrolling_is_the_neumann_series():
    """Equal K and step: the sum over steps is the sum over powers, because ``dT/dw`` does not depend on ``u``."""
    r = draw(6)
    Q, B, c, target = r(20, 12), r(12, 4), r(12), r(12)
    A = Q.T @ Q / 20
    step = descent(lambda u, w: 0.5 * u @ (A @ u) - u @ (B @ w + c), 1 / torch.linalg.eigvalsh(A)[-1].item())

    def upper(u, w):
        return 0.5 * (u - target).square().sum() + w.sum()

    w, start = r(4), torch.zeros(12, dtype=torch.float64)
    for steps in (1, 7, 50):
        rhg = hypergradient(step, upper, w, start, steps=steps)
        series = hypergradient(step, upper, w, start, steps=steps, way=Implicit("neumann", tol=0, max_iter=steps))
        assert off(series.gradient, rhg.gradient) <= 1e-12
        assert series.adjoint_residual > 1e-4  # far from solved: the equality is of sums, not of limits


def test_a_direct_dependence_alone_and_no_steps():
    problem = ridge(lambda x: x.double())
    result = run(problem, Unrolled(), steps=0)
    assert torch.equal(result.gradient["w"], 0.2 * problem.params["w"]) and result.gradient["l"] == 0
    solution = run(problem, Implicit("cg", tol=1e-13), steps=500).state
    at = hypergradient(problem.step, problem.upper, problem.params, solution, steps=0, way=Implicit("cg", tol=1e-13))
    assert off(at.gradient, exact_reference(problem, 0)) <= 1e-10 and at.iterations == 0


def test_step_sizes_may_be_learned_scheduled_or_tensors():
    r = draw(7)
    A, b, start = torch.diag(torch.tensor([1.0, 2.0, 3.0])).double(), r(3), r(3)

    def loss(u, p):
        return 0.5 * u @ (A @ u) - u @ (b * p["scale"])

    def upper(u, p):
        return u.square().sum()

    params = {"scale": torch.tensor(1.2).double(), "size": torch.tensor(0.2).double()}
    learned = hypergradient(descent(loss, lambda p, k: p["size"] / (1 + 0.1 * k)), upper, params, start, steps=6)

    def phi(scale, size):
        u = start
        for k in range(6):
            u = u - size / (1 + 0.1 * k) * (A @ u - b * scale)
        return u.square().sum()

    expected = jacobian(phi, (params["scale"], params["size"]))
    assert off(learned.gradient, torch.stack(expected)) <= 1e-14
    diagonal = hypergradient(descent(loss, 0.5 / A.diagonal()), upper, params, start, steps=80)
    assert torch.allclose(diagonal.state, b * 1.2 / A.diagonal(), atol=1e-14)


# -- the estimate of the error


WAYS = {
    "RHG": Unrolled(),
    "TRHG": Truncated(4),
    "CG": Implicit("cg"),
    "NS": Implicit("neumann", tol=0, max_iter=8),
    "GMRES": Implicit("gmres", tol=1e-3),
}


@pytest.mark.parametrize("steps", [6, 14, K])
@pytest.mark.parametrize("name", WAYS)
def test_the_error_estimate_is_within_a_factor_of_ten(make, name, steps):
    problem = make(lambda x: x.double())
    way = WAYS[name] if name != "CG" or problem.symmetric else Implicit("fixed point", tol=1e-4)
    result = run(problem, way, steps=steps, error=True)
    true = off(result.gradient, exact_reference(problem, steps))
    assert true > 1e-13 and true / 10 <= result.error <= 10 * true


@pytest.mark.parametrize("make", [ridge, cleaning, network, lasso])
def test_the_error_estimate_in_single_precision(make):
    problem, reference = both(make, torch.float32)
    for way in (Unrolled(), Truncated(4)):
        result = run(problem, way, steps=8, error=True)
        true = off(result.gradient, exact_reference(reference, 8))
        assert true > 1e-5 and true / 10 <= result.error <= 10 * true


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_error_estimate_does_not_depend_on_the_units_of_the_loss(scale):
    problem = ridge(lambda x: x.double())
    loss = problem.step.loss
    plain = run(problem, Unrolled(), steps=9, error=True)
    problem.step = descent(lambda u, p: scale * loss(u, p), problem.step.step_size / scale)
    scaled = run(problem, Unrolled(), steps=9, error=True)
    assert scaled.error == pytest.approx(plain.error, rel=1e-3) and plain.error > 1e-3


def test_the_error_estimate_at_round_off_is_round_off(make):
    result = run(make(lambda x: x.double()), Implicit("gmres", tol=1e-13), steps=2000, error=True)
    assert 1e-15 < result.error < 1e-10


def test_no_error_where_nobody_asked():
    assert run(ridge(lambda x: x.double()), Unrolled()).error is None


# -- tolerances and warm starts


def test_the_lower_level_stops_at_its_tolerance(make):
    problem = make(lambda x: x.double())
    for way in (Unrolled(), Unrolled("checkpointed"), Unrolled("rebuilt"), Truncated(WINDOW), Implicit("gmres", tol=1e-12)):
        result = run(problem, way, steps=5000, tol=1e-6)
        assert result.status is Status.CONVERGED and 5 < result.iterations < 5000 and result.residual <= 1e-6
        us = iterates(problem, result.iterations)
        changes = [((b - a).norm() / a.norm()).item() for a, b in zip(us, us[1:], strict=False)]
        assert changes[-1] <= 1e-6 < min(changes[:-1])  # the first step that meets it is the last
        assert off(result.state, us[-1]) <= 1e-12
        if isinstance(way, Truncated):
            assert off(result.gradient, unrolled_reference(problem, result.iterations, WINDOW)) <= 1e-10
        elif isinstance(way, Unrolled):
            assert off(result.gradient, unrolled_reference(problem, result.iterations)) <= 1e-10


def test_a_tolerance_saves_iterations():
    problem = cleaning(lambda x: x.double())
    loose, tight = (run(problem, Implicit("cg", tol=tol)) for tol in (1e-2, 1e-12))
    assert 0 < loose.adjoint_iterations < tight.adjoint_iterations
    assert tight.adjoint_residual <= 1e-12 < loose.adjoint_residual <= 1e-2
    assert off(loose.gradient, flat(tight.gradient)) < 2e-2


@pytest.mark.parametrize("solver", ["cg", "gmres", "fixed point"])
def test_a_warm_start_saves_iterations(solver):
    problem = cleaning(lambda x: x.double())
    way = Implicit(solver, tol=1e-8)
    first = run(problem, way, steps=200)
    problem.params = problem.params + 1e-4 * draw(8)(14)
    cold, warm = run(problem, way, steps=200), run(problem, way, steps=200, warm=first.warm)
    assert warm.adjoint_iterations <= 0.8 * cold.adjoint_iterations and off(warm.gradient, flat(cold.gradient)) < 1e-6
    misled = run(problem, way, steps=200, warm=-1e6 * first.warm)  # worse than nothing: it is dropped, at one product
    assert misled.adjoint_iterations == cold.adjoint_iterations + 1 and torch.equal(misled.gradient, cold.gradient)


# -- failures are named


def one(value: float = 1.0) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


EVERY = [*(Unrolled(m) for m in ("full", "checkpointed", "rebuilt")), Truncated(3), Implicit("cg"), Implicit("gmres")]


@pytest.mark.parametrize("way", EVERY, ids=str)
def test_nan_is_reported_with_its_iteration(way):
    def step(u, w, k):
        return (u - w).sqrt()  # from 30: 5.4, 2.1, 1.0, 0.05, then the root of a negative number

    with pytest.raises(LowerLevelError, match=r"not finite: \|\|u\^5\|\| = nan") as caught:
        hypergradient(step, lambda u, w: u.sum(), one(), one(30.0), steps=20, way=way)
    error = caught.value
    assert (error.iteration, error.quantity, error.status) == (5, "iterate", Status.NOT_FINITE)
    assert error.result.gradient is None and error.result.iterations == 20
    quiet = hypergradient(step, lambda u, w: u.sum(), one(), one(30.0), steps=20, way=way, strict=False)
    assert quiet.status is Status.NOT_FINITE and quiet.failure == str(error) and quiet.gradient is None


@pytest.mark.parametrize("way", EVERY, ids=str)
def test_divergence_is_reported_with_its_iteration(way):
    def step(u, w, k):
        return -3 * u + w

    with pytest.raises(LowerLevelError, match=r"diverges: \|\|u\^13\|\|") as caught:  # 3^12 < 1e6 < 3^13 * 3/4
        hypergradient(step, lambda u, w: u.sum(), one(), one(), steps=20, way=way)
    assert (caught.value.iteration, caught.value.quantity) == (13, "iterate")
    assert hypergradient(step, lambda u, w: u.sum(), one(), one(), steps=20, way=way, strict=False).status == "diverged"


def test_a_missed_lower_tolerance():
    problem = ridge(lambda x: x.double())
    with pytest.raises(LowerLevelError, match=r"missed its tolerance: residual .* after 3 steps, wanted 1e-08") as caught:
        run(problem, Unrolled(), steps=3, tol=1e-8)
    assert (caught.value.iteration, caught.value.quantity, caught.value.status) == (3, "residual", Status.STEP_LIMIT)
    quiet = run(problem, Unrolled(), steps=3, tol=1e-8, strict=False)
    assert quiet.status is Status.STEP_LIMIT and "missed" in quiet.failure
    assert off(quiet.gradient, unrolled_reference(problem, 3)) <= 1e-10  # what there is, is right for three steps
    assert run(problem, Unrolled(), steps=3).failure == ""


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_missed_adjoint_tolerance(solver):
    problem = cleaning(lambda x: x.double())
    with pytest.raises(
        LowerLevelError, match=rf"by {solver}, missed its tolerance 1e-10 \(residual .* after 3 products"
    ) as c:
        run(problem, Implicit(solver, tol=1e-10, max_iter=2 if solver == "gmres" else 3))
    assert (c.value.iteration, c.value.quantity) == (3, "adjoint residual")
    assert c.value.result.adjoint_residual > 1e-10
    assert run(problem, Implicit(solver, tol=0, max_iter=3)).failure == ""  # nothing was asked for


def continuum(w: float = 0.7):
    """Fixed points ``(w, t)`` for every t: ``D(u) = (w, u_2)``, T = (I + D)/2, upper ``1/2 (w - u_2)^2 + 1/2 (u_1 - 1)^2``.

    phi(w) = 1/2 (w - 1)^2 over the best of them, with slope -0.3 here; a naive implicit gradient says +0.4.
    """

    def step(u, w, k):
        return torch.stack([0.5 * u[0] + 0.5 * w[0], u[1]])

    def upper(u, w):
        return 0.5 * (w[0] - u[1]) ** 2 + 0.5 * (u[0] - 1) ** 2

    return step, upper, one(w), torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize(
    "solver, status",
    [("cg", "not positive definite"), ("neumann", "stagnated"), ("fixed point", "stagnated"), ("gmres", "stagnated")],
)
def test_a_continuum_of_fixed_points_is_no_place_for_implicit_differentiation(solver, status):
    for tol in (1e-6, 0.0):
        with pytest.raises(LowerLevelError, match="singular") as caught:
            hypergradient(*continuum(), steps=60, way=Implicit(solver, tol=tol))
        assert caught.value.status == status and caught.value.result.adjoint_residual > 0.5
    quiet = hypergradient(*continuum(), steps=60, way=Implicit(solver), strict=False)
    assert quiet.status == status and "singular" in quiet.failure


def test_a_loss_without_curvature_in_one_direction_is_singular_too():
    def loss(u, w):
        return 0.5 * u[0] ** 2 - w[0] * u[0]  # the second entry is free

    _, upper, w, start = continuum()
    with pytest.raises(LowerLevelError, match="without curvature"):
        hypergradient(descent(loss, 0.5), upper, w, start, steps=60, way=Implicit("cg"))


def test_a_saddle_is_not_a_minimum():
    def loss(u, w):
        return 0.5 * u[0] ** 2 - 0.5 * u[1] ** 2 - w @ u

    def upper(u, w):
        return u.sum() + u[1]

    two = torch.ones(2, dtype=torch.float64)
    with pytest.raises(LowerLevelError, match="not at a minimum") as caught:
        hypergradient(descent(loss, 0.1), upper, two, two, steps=0, way=Implicit("cg"))
    assert caught.value.status is Status.NOT_DEFINITE
    found = hypergradient(descent(loss, 0.1), upper, two, two, steps=0, way=Implicit("gmres"))
    assert torch.allclose(found.gradient, torch.tensor([1.0, -2.0]).double())


def test_an_expansive_map_has_no_neumann_series():
    def step(u, w, k):
        return 2 * u - w  # fixed point w, which the iteration leaves

    for solver in ("neumann", "fixed point"):
        with pytest.raises(LowerLevelError, match="no contraction there; use solver='gmres'") as caught:
            hypergradient(step, lambda u, w: 3 * u.sum(), one(), one(), steps=0, way=Implicit(solver))
        assert caught.value.status is Status.DIVERGED
    assert hypergradient(step, lambda u, w: 3 * u.sum(), one(), one(), steps=0, way=Implicit("gmres")).gradient.item() == 3


def test_the_error_estimate_fails_where_it_cannot_be_trusted():
    with pytest.raises(
        LowerLevelError, match="error cannot be estimated: the adjoint system, by gmres: stagnated"
    ) as caught:
        hypergradient(*continuum(), steps=60, error=True)
    assert caught.value.quantity == "error estimate" and caught.value.result.gradient is not None
    quiet = hypergradient(*continuum(), steps=60, error=True, strict=False)
    assert quiet.error == math.inf and quiet.gradient.item() == pytest.approx(0.4) and quiet.status is Status.STAGNATED

    def circle(u, w, k):
        return torch.where(u > 0, u - 0.5, u + 0.5) + 0 * w  # two points in turn, no fixed point

    with pytest.raises(LowerLevelError, match="error cannot be estimated"):
        hypergradient(circle, lambda u, w: (u * w).sum(), one(), one(0.25), steps=9, error=True)


def test_a_loss_or_a_gradient_that_is_not_finite():
    def step(u, w, k):
        return 0.5 * u + w

    with pytest.raises(LowerLevelError, match="the upper loss is nan") as caught:
        hypergradient(step, lambda u, w: (-u).log().sum(), one(), one())
    assert caught.value.quantity == "upper loss"
    with pytest.raises(LowerLevelError, match="the hypergradient is not finite") as caught:
        hypergradient(step, lambda u, w: u.sum() + (w - 1).sqrt().sum(), one(), one())  # the root's slope at 0
    assert caught.value.quantity == "hypergradient"

    def pole(u, w, k):
        return u if k < 5 else u / 0 + w

    with pytest.raises(LowerLevelError, match="the residual is") as caught:  # u^5 is finite, T(u^5) is not
        hypergradient(pole, lambda u, w: u.sum(), one(), one(), steps=5)
    assert caught.value.quantity == "residual"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"params": {"w": torch.tensor([1])}},
            "params: expected a tree of floating point tensors, got a leaf Tensor torch.int64",
        ),
        ({"params": 0.5}, "params: .* got a leaf float"),
        ({"start": {}}, "start: .* got an empty tree"),
        ({"step": lambda u, w, k: u[None]}, r"step: expected leaves like those of start, \[\(1, torch.float64\)\], got"),
        ({"step": lambda u, w, k: u.float()}, "step: expected leaves like those of start"),
        ({"upper": lambda u, w: torch.cat([u, w])}, r"upper: expected a scalar, a tensor, got the shape \(2,\)"),
        ({"upper": lambda u, w: u.sum().item()}, "upper: expected a scalar, a tensor, got float"),
        ({"start": (one(),), "step": lambda u, w, k: [0.5 * u[0] + w]}, "step: expected a tree like start"),
        ({"way": "cg"}, "way: expected Unrolled"),
        ({"steps": -1}, "steps, tol: expected"),
        ({"tol": math.nan}, "steps, tol: expected"),
        ({"warm": torch.ones(2)}, "warm: expected the warm of a call with the same lower level"),
    ],
)
def test_bad_arguments_get_one_sentence(change, message):
    given = {"step": lambda u, w, k: 0.5 * u + w, "upper": lambda u, w: u.sum(), "params": one(), "start": one()} | change
    with pytest.raises(ValueError, match=message):
        hypergradient(**given)


@pytest.mark.parametrize(
    "make_way", [lambda: Unrolled("half"), lambda: Truncated(0), lambda: Truncated(2, "half"), lambda: Implicit("qr")]
)
def test_bad_ways_are_refused(make_way):
    with pytest.raises(ValueError, match="expected"):
        make_way()


@pytest.mark.parametrize("way", [Unrolled(), Unrolled("rebuilt"), Truncated(5), Implicit("gmres")])
def test_a_step_that_returns_the_keys_of_a_dict_in_another_order_is_refused(way):
    def run(keys):  # the values of one would be taken for those of the other
        def step(u, w, k):
            return {key: 0.5 * u[key] + {"x": 1, "y": 2}[key] * w for key in keys}

        start = {"x": one(), "y": one()}
        return hypergradient(step, lambda u, w: u["x"].square().sum(), one(), start, steps=60, way=way)

    assert run("xy").state["x"].item() == pytest.approx(2)
    with pytest.raises(ValueError, match="step: expected a tree like start, keys in the same order"):
        run("yx")


@pytest.mark.parametrize("way", [Unrolled(), Unrolled("rebuilt"), Truncated(5), Implicit("gmres")])
def test_a_gradient_that_nothing_depends_on_is_refused_and_one_that_is_zero_is_not(way):
    net = nn.Linear(2, 2).double()
    params, start = dict(net.named_parameters()), torch.zeros(1, 2, dtype=torch.float64)
    for step in (lambda u, p, k: 0.1 * net(u), lambda u, p, k: 0.1 * functional_call(net, p, u).detach()):
        with pytest.raises(ValueError, match="params: expected step or upper to use the params .*functional_call"):
            hypergradient(step, lambda u, p: u.sum(), params, start, steps=40, way=way)
    right = lambda u, p, k: 0.1 * functional_call(net, p, u)  # noqa: E731
    assert any(g.any() for g in hypergradient(right, lambda u, p: u.sum(), params, start, way=way).gradient.values())
    zero = hypergradient(lambda u, w, k: 0.5 * u + w, lambda u, w: u.square().sum(), one(0.0), one(0.0), steps=40, way=way)
    assert zero.gradient.item() == 0


@pytest.mark.parametrize("solver", ["neumann", "fixed point"])
def test_a_delay_keeps_the_residual_for_a_while_and_is_not_singular(solver):
    shift = torch.diag(torch.ones(2, dtype=torch.float64), 1)  # nilpotent: the series has three terms
    w = torch.ones(3, dtype=torch.float64)
    found = hypergradient(lambda u, w, k: shift.T @ u + w, lambda u, w: u[2], w, 0 * w, steps=5, way=Implicit(solver))
    assert torch.allclose(found.gradient, w) and found.adjoint_iterations <= 4


def test_the_words_of_a_status_are_those_of_the_loop():
    assert {*propagate.Status} <= {*Status}


# -- memory


class Saved:
    """The most bytes that autograd held at once for backward passes; a storage that is saved twice counts once."""

    def __init__(self) -> None:
        self.times: dict[int, int] = {}
        self.now = self.peak = 0

    class Handle:
        def __init__(self, book: Saved, tensor: torch.Tensor):
            self.book, self.tensor, self.storage = book, tensor, tensor.untyped_storage()
            self.key = self.storage.data_ptr()
            book.times[self.key] = book.times.get(self.key, 0) + 1
            if book.times[self.key] == 1:
                book.now += self.storage.nbytes()
                book.peak = max(book.peak, book.now)

        def __del__(self) -> None:
            self.book.times[self.key] -= 1
            if self.book.times[self.key] == 0:
                self.book.now -= self.storage.nbytes()

    def of(self, call: Callable) -> int:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: Saved.Handle(self, t), lambda h: h.tensor):
            call()
        return self.peak


def graph_bytes(way, steps: int) -> int:
    r = draw(10)
    x, target = r(40, 30), r(40, 5)

    def loss(u, w):
        return ((x @ u).tanh() - target).square().mean() + w.exp() * u.square().sum()

    def call():
        return hypergradient(
            descent(loss, 0.1),
            lambda u, w: u.square().sum(),
            one(-1.0)[0],
            torch.zeros(30, 5).double(),
            steps=steps,
            way=way,
        )

    return Saved().of(call)


def test_memory_grows_as_each_way_says():
    sizes = [16, 64, 256]
    full, segments, steps, window, implicit = (
        [graph_bytes(way, n) for n in sizes]
        for way in (Unrolled(), Unrolled("checkpointed"), Unrolled("rebuilt"), Truncated(16), Implicit("cg"))
    )

    def growth(sizes):
        return [b / a for a, b in zip(sizes, sizes[1:], strict=False)]

    assert all(3.5 < ratio < 4.2 for ratio in growth(full))  # K
    assert all(1.7 < ratio < 2.2 for ratio in growth(segments))  # sqrt(K)
    assert all(0.99 < ratio < 1.01 for flat in (steps, window, implicit) for ratio in growth(flat))
    assert segments[2] < 0.1 * full[2] and max(steps[2], implicit[2]) < 0.01 * full[2]


# -- nothing is touched


@pytest.mark.parametrize("way", EVERY, ids=str)
def test_nothing_goes_through_grad_and_nothing_is_changed(way):
    net = nn.Linear(3, 3).double()
    params = dict(net.named_parameters())
    before, start = {name: p.detach().clone() for name, p in params.items()}, torch.ones(3).double()
    generator = torch.get_rng_state()
    step = descent(lambda u, p: (functional_call(net, p, (u,)) - u).square().sum() + u.square().sum(), 0.05)
    for context in (torch.enable_grad(), torch.no_grad()):  # the caller's mode does not matter
        with context:
            result = hypergradient(step, lambda u, p: u.sum(), params, start, way=way, error=True)
        assert not any(leaf.requires_grad for leaf in tree_leaves((result.value, result.gradient, result.state)))
    assert all(p.grad is None and p.requires_grad and torch.equal(p, before[name]) for name, p in params.items())
    assert start.grad is None and not start.requires_grad and torch.equal(start, torch.ones(3))
    assert torch.equal(torch.get_rng_state(), generator)


def test_results_stay_on_the_device_of_the_problem(device):
    problem = ridge(lambda x: x.double().to(device))
    for way in EVERY:
        result = run(problem, way, error=True)
        assert all(leaf.device.type == device.type for leaf in tree_leaves((result.gradient, result.state)))


# -- the solvers by themselves


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_against_a_dense_solve(solver, dtype):
    r = draw(11)
    A = torch.eye(40, dtype=torch.float64) + 0.4 * (lambda M: (M + M.T) if solver == "cg" else M)(r(40, 40)) / 40**0.5 / 2
    b = r(40)
    found = solve(solver, lambda v: A.to(dtype) @ v, 1e3 * b.to(dtype), tol=TIGHT[dtype])
    assert found.status is Status.CONVERGED
    assert off(found.value, torch.linalg.solve(A, 1e3 * b)) <= 10 * LIMIT[dtype]


def test_gmres_restarts():
    r = draw(12)
    A, b = torch.eye(150, dtype=torch.float64) + 0.7 * r(150, 150) / 150**0.5, r(150)
    found = solve("gmres", lambda v: A @ v, b, tol=1e-12)
    assert found.status is Status.CONVERGED and found.iterations > 52
    assert off(found.value, torch.linalg.solve(A, b)) <= 1e-9


def test_solves_of_nothing_and_of_nan():
    for solver in SOLVERS:
        zero = solve(solver, lambda v: v, torch.zeros(3))
        assert zero.status is Status.CONVERGED and zero.iterations == 0 and not zero.value.any()
        assert solve(solver, lambda v: v * math.nan, torch.ones(3)).status is Status.NOT_FINITE
        assert solve(solver, lambda v: v, torch.tensor([math.inf])).status is Status.NOT_FINITE


def test_asymmetry_is_measured(dtype):
    r = draw(13)
    A, one_sided = r(200, 200), torch.zeros(200, 200, dtype=torch.float64)
    one_sided[3, 100] = 0.3
    S = (A + A.T).to(dtype)
    assert asymmetry(lambda v: S @ v, S[0]) < torch.finfo(dtype).eps ** 0.5 / 10
    assert asymmetry(lambda v: A.to(dtype) @ v, S[0]) > 0.1
    assert asymmetry(lambda v: v + one_sided.to(dtype) @ v, S[0]) > torch.finfo(dtype).eps ** 0.5


# The gradient for an optimiser.


def test_an_attached_value_hands_its_gradient_on():
    """To leaves as ``.grad``, to what they were computed from by the chain rule, times what the value is multiplied with."""
    root = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    w = {"a": root.exp(), "b": torch.tensor(0.5, dtype=torch.float64, requires_grad=True)}
    step = descent(lambda u, w: (u - w["a"]).square().sum() / 2 + w["b"] * u.square().sum() / 2, 0.3)
    upper = lambda u, w: (u.sum() - 1).square() + w["b"] ** 2  # noqa: E731
    found = hypergradient(step, upper, w, torch.zeros(2, dtype=torch.float64), steps=9)
    value = found.attached(w)
    assert torch.equal(value.detach(), found.value) and root.grad is None
    (3 * value).backward()
    assert torch.allclose(w["b"].grad, 3 * found.gradient["b"], atol=1e-14)
    assert torch.allclose(root.grad, 3 * found.gradient["a"] * root.exp(), atol=1e-14)


def test_a_value_is_attached_to_the_parameters_it_had():
    w = torch.tensor(0.5, dtype=torch.float64)
    found = hypergradient(descent(lambda u, w: (u - w).square() / 2, 0.5), lambda u, w: u**2, w, w)
    with pytest.raises(ValueError, match="params: expected the tree of the gradient"):
        found.attached({"w": w})
