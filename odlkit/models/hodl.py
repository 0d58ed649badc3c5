"""HODL: hierarchical optimization-derived learning.  The lower level is a fixed point ``u = T(u, omega)``, the upper a loss.

A map has the signature ``(u, params, k) -> u``: ``u`` is a tensor or a tuple of tensors whose first dimension is the batch,
``params`` any pytree, ``k`` the number of steps made before (the paper's k is one more).  Maps are plain functions,
differentiable in u and params, so `odlkit.bilevel` differentiates through them; nothing here loops or trains.

    D = D_num o D_net            compose(proximal_gradient(...) or alm_linearised(...), conjugated(net, metric))
    T = I + alpha (D - I)        averaged(D, alpha)
    aHODL (4), sHODL (5)         aggregated(T, upper, metric, mu, s), and mu = 0

D has to be non-expansive in ``||u||_G^2 = <u, G u>``; each D_num below says in which G it is.  The two settings that the
paper compares with: *UNH* learns the numbers of D_num only, ``averaged(D_num, alpha)`` or D_num itself; *ENA* is
``compose(D_num, net)`` without alpha and with a network whose Lipschitz constant nobody bounds, often `untied`.

What depends on params may be given as a function of params: step sizes, thresholds, penalties, metrics, data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from odlkit.linear import LinearMap, Operator

Map = Callable[[Any, Any, int], Any]


def at(thing: Any, params: Any) -> Any:
    """``thing``, or ``thing(params)`` if it is a function of params (operators can be called too, and are left alone)."""
    return thing(params) if callable(thing) and not hasattr(thing, "A") else thing


def smallest(value: Any) -> float:
    """The least entry of a number or tensor."""
    return value.detach().min().item() if isinstance(value, Tensor) else float(value)


def positive(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless every entry of a number or tensor is positive."""
    if not smallest(value) > 0:
        raise ValueError(f"{name}: expected positive numbers, got {smallest(value):.6g}")


# -- metrics


class Metric:
    """Base class: a subclass gives ``power(u, p) = G^p u`` and ``least``, a lower bound of G's eigenvalues."""

    least: float

    def power(self, u: Any, p: float) -> Any:
        raise NotImplementedError

    def apply(self, u: Any) -> Any:
        """``G u``."""
        return self.power(u, 1)

    def inverse(self, u: Any) -> Any:
        """``G^-1 u``."""
        return self.power(u, -1)

    def root(self, u: Any) -> Any:
        """``G^(1/2) u``."""
        return self.power(u, 0.5)

    def inverse_root(self, u: Any) -> Any:
        """``G^(-1/2) u``."""
        return self.power(u, -0.5)

    def norm(self, u: Any) -> Tensor:
        """``||u||_G = sqrt(<u, G u>)`` of each item, ``(B,)``."""
        mapped = self.apply(u)
        pairs = zip(u, mapped, strict=True) if isinstance(u, tuple) else [(u, mapped)]
        squares: Any = sum((a * b).flatten(1).sum(1) for a, b in pairs)
        return squares.clamp_min(0).sqrt()


class Diagonal(Metric):
    """``G = diag(d)``, d a number or a tensor that broadcasts to u.  Raises ``ValueError`` unless d > 0."""

    def __init__(self, d: Tensor | float = 1.0):
        positive("d", d)
        self.d = d

    @property
    def least(self) -> float:  # type: ignore[override]
        return smallest(self.d)

    def power(self, u: Any, p: float) -> Any:
        return tree_map(lambda part: part * self.d**p, u)


class Matrix(Operator):
    """``A = matrix`` (m, n) on the last dimension: ``(B, n) -> (B, m)``."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    def A(self, x: Tensor) -> Tensor:
        return x @ self.matrix.mT

    def A_adjoint(self, y: Tensor) -> Tensor:
        return y @ self.matrix

    @cached_property
    def singular(self) -> tuple[Tensor, Tensor]:
        """The singular values, largest first, and the right singular vectors as rows."""
        _, values, right = torch.linalg.svd(self.matrix, full_matrices=False)
        return values, right

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        values, (m, n) = self.singular[0].detach(), self.matrix.shape
        return (values[-1].item() ** 2 if m >= n else 0.0), values[0].item() ** 2


class Gram(Metric):
    """``G = tau I - beta A^T A``, the metric of the linearised augmented Lagrangian; positive iff ``tau > beta ||A||^2``.

    ``bound`` is ``||A||^2``; a `Matrix` finds it by itself.  Powers are exact: with ``tight = c``, which says
    ``A A^T = c I``, ``P = A^T A / c`` is a projector and ``G^p = tau^p (I - P) + (tau - c beta)^p P``; a `Matrix` uses its
    singular vectors otherwise.  ``tau`` and ``beta`` are numbers or tensors that broadcast to u, ``(B, 1)`` for one each.
    Raises ``ValueError`` unless ``tau > beta ||A||^2`` (``check=False``: for controls) and where no bound or power is known.
    Eq: HODL Table 2, linearised.
    """

    def __init__(self, operator: LinearMap, tau: Any, beta: Any, *, bound: float | None = None, tight: float | None = None,
                 check: bool = True):  # fmt: skip
        if bound is None:
            bound = tight
        if bound is None and isinstance(operator, Matrix):
            bound = operator.singular[0].detach()[0].item() ** 2
        if bound is None:
            raise ValueError("bound: expected the number ||A||^2 for an operator that is not a Matrix, got None")
        self.operator, self.tau, self.beta, self.bound, self.tight = operator, tau, beta, bound, tight
        if check:
            positive("beta", beta)
            if not self.least > 0:
                room = f"tau - beta ||A||^2 = {self.least:.6g} at ||A||^2 = {bound:.6g}"
                raise ValueError(f"tau: expected more than beta ||A||^2, got {room}")

    @property
    def least(self) -> float:  # type: ignore[override]
        return smallest(self.tau - self.beta * self.bound)

    def power(self, u: Tensor, p: float) -> Tensor:
        if p == 1:
            return self.tau * u - self.beta * self.operator.A_adjoint(self.operator.A(u))
        if self.tight is not None:
            seen = self.operator.A_adjoint(self.operator.A(u)) / self.tight
            return self.tau**p * (u - seen) + (self.tau - self.beta * self.tight) ** p * seen
        if not isinstance(self.operator, Matrix):
            raise ValueError("operator: expected a Matrix or one with A A^T = tight I for powers of G, got neither")
        values, right = self.operator.singular
        return self.tau**p * u + (((self.tau - self.beta * values**2) ** p - self.tau**p) * (u @ right.mT)) @ right


class Saddle(Metric):
    """``M = diag(G, I / beta)`` on ``z = (u, multiplier)``: the metric in which the augmented Lagrangian is firm.

    (Not ``diag(G, beta I)``, nor the identity.)  G is any metric on u, ``beta`` a number or a tensor that broadcasts to the
    multiplier.  Raises ``ValueError`` unless beta > 0.  Eq: HODL Table 2, Assumption 3.2.
    """

    def __init__(self, metric: Metric, beta: Any):
        positive("beta", beta)
        self.metric, self.beta = metric, beta

    @classmethod
    def linearised(cls, operator: LinearMap, tau: Any, beta: Any, **known: Any) -> Saddle:
        """``M = diag(tau I - beta A^T A, I / beta)``; ``known`` and errors as in `Gram`."""
        return cls(Gram(operator, tau, beta, **known), beta)

    @property
    def least(self) -> float:  # type: ignore[override]
        return min(self.metric.least, smallest(1 / self.beta))

    def power(self, u: tuple, p: float) -> tuple:
        return self.metric.power(u[0], p), u[1] / self.beta**p


# -- D_num


def proximal_gradient(grad_f: Callable, prox: Callable, step_size: Any, metric: Any = None) -> Map:
    """``D(u) = prox_g^{G/gamma}(u - gamma G^-1 grad f(u))``, averaged in ``||.||_G`` for ``gamma < 2 / L``, ``f'' <= L G``.

    ``grad_f(u, params)``; ``prox(v, step, params) = argmin_w g(w) + ||w - v||^2 / (2 step)`` with ``step`` elementwise,
    ``gamma / d``.  G is the identity or `Diagonal` (only then is the prox of a separable g separable).  The objective
    ``||Q u - b||^2`` of the paper, without 1/2, has ``L = 2 ||Q||^2``.  Contractive if also ``f'' >= m G``, m > 0.
    Raises ``ValueError`` for another metric.  Eq: HODL Table 2, (9).
    """

    def step(u: Any, params: Any, k: int) -> Any:
        gamma, g = at(step_size, params), at(metric, params)
        if g is not None:
            if not isinstance(g, Diagonal):
                raise ValueError(f"metric: expected a Diagonal one, got {type(g).__name__}")
            gamma = gamma / g.d
        return prox(tree_map(lambda a, b: a - gamma * b, u, grad_f(u, params)), gamma, params)

    return step


def gradient_descent(grad_f: Callable, step_size: Any, metric: Any = None) -> Map:
    """``D(u) = u - eta G^-1 grad f(u)``, non-expansive in ``||.||_G`` iff ``eta <= 2 / L``, ``f'' <= L G``, f convex.

    (Printed without a step size.)  ``metric`` is any `Metric`, None for the identity.  Eq: HODL Table 2.
    """

    def step(u: Any, params: Any, k: int) -> Any:
        eta, g, slope = at(step_size, params), at(metric, params), grad_f(u, params)
        return tree_map(lambda a, b: a - eta * b, u, slope if g is None else g.inverse(slope))

    return step


def half_quadratic(prox_f: Callable, prox_g: Callable, penalty: Any) -> Map:
    """``D(u) = prox_{g / rho}(prox_{f / rho}(u))``: proximal gradient on a Moreau envelope, non-expansive for every rho > 0.

    Both are called as ``prox(v, 1 / rho, params)``.  The metric is the identity.  Source: HODL Table 1, HQS.
    """

    def step(u: Any, params: Any, k: int) -> Any:
        size = 1 / at(penalty, params)
        return prox_g(prox_f(u, size, params), size, params)

    return step


def alm_exact(argmin: Callable, operator: Any, y: Any, metric: Any) -> Map:
    """The augmented Lagrangian on ``z = (u, multiplier)``, firmly non-expansive in ``M = diag(G, I / beta)``.

    ``u+ = argmin f(u) + <lambda, A u - y> + beta/2 ||A u - y||^2 + 1/2 ||u - u^k||_G^2``,
    ``lambda+ = lambda + beta (A u+ - y)``.

    ``metric`` is the `Saddle`; ``argmin(q, params) = argmin_u f(u) + <u, (G + beta A^T A) u> / 2 - <q, u>`` is called with
    ``q = G u^k + A^T (beta y - lambda)``, a linear solve for a quadratic f.  Eq: HODL Table 2, (8).
    """

    def step(z: tuple, params: Any, k: int) -> tuple:
        (u, multiplier), m, op, data = z, at(metric, params), at(operator, params), at(y, params)
        new = argmin(m.metric.apply(u) + op.A_adjoint(m.beta * data - multiplier), params)
        return new, multiplier + m.beta * (op.A(new) - data)

    return step


def alm_linearised(prox: Callable, y: Any, metric: Any) -> Map:
    """The augmented Lagrangian with ``G = tau I - beta A^T A``, whose u-step is one prox; firm in ``M = diag(G, I / beta)``.

    ``u+ = prox_{f / tau}(u - A^T (lambda + beta (A u - y)) / tau)``, ``lambda+ = lambda + beta (A u+ - y)``.

    ``metric`` is `Saddle.linearised`, which holds A, tau and beta, so that map and metric cannot differ; ``prox`` is called
    as ``prox(v, 1 / tau, params)``.  For (8), u stacks the code and the noise, ``A = [Q I]``, ``||A||^2 = ||Q||^2 + 1``.
    Eq: HODL Table 2, (8), linearised.
    """

    def step(z: tuple, params: Any, k: int) -> tuple:
        (u, multiplier), m, data = z, at(metric, params), at(y, params)
        op, tau, beta = m.metric.operator, m.metric.tau, m.beta
        new = prox(u - op.A_adjoint(multiplier + beta * (op.A(u) - data)) / tau, 1 / tau, params)
        return new, multiplier + beta * (op.A(new) - data)

    return step


# -- D_net, and how maps are put together


def network(net: Callable, *data: Any, weights: Callable = lambda params: params) -> Map:
    """``u -> net(u, *data)`` with the parameters ``weights(params)``, a dictionary of names, by ``functional_call``.

    ``net`` is a module, ``weights`` says where in params its parameters are; each of ``data`` may be a function of params.
    """
    from torch.func import functional_call

    def step(u: Any, params: Any, k: int) -> Any:
        return functional_call(net, weights(params), (u, *(at(part, params) for part in data)))  # type: ignore[arg-type]

    return step


def conjugated(net: Map, metric: Any) -> Map:
    """``u -> G^(-1/2) net(G^(1/2) u)``: what is 1-Lipschitz in l2 becomes 1-Lipschitz in ``||.||_G``.

    Source: HODL section 4.2, last paragraph.
    """

    def step(u: Any, params: Any, k: int) -> Any:
        g = at(metric, params)
        return g.inverse_root(net(g.root(u), params, k))

    return step


def compose(outer: Map, *inner: Map) -> Map:
    """``outer o inner``: ``compose(D_num, D_net)``; non-expansive in a metric if all are in the same.

    Source: HODL section 4.2.
    """

    def step(u: Any, params: Any, k: int) -> Any:
        for part in (*inner[::-1], outer):
            u = part(u, params, k)
        return u

    return step


def averaged(D: Map, alpha: Any) -> Map:
    """``T(u) = u + alpha (D(u) - u)``, with the fixed points of D.  Eq: HODL (3).

    For a D that is no more than non-expansive alpha has to be below 1: a rotation is.  Raises ``ValueError`` for a number
    outside (0, 1].
    """
    if isinstance(alpha, int | float) and not 0 < alpha <= 1:
        raise ValueError(f"alpha: expected a number in (0, 1], got {alpha}")

    def step(u: Any, params: Any, k: int) -> Any:
        a = at(alpha, params)
        return tree_map(lambda old, new: old + a * (new - old), u, D(u, params, k))

    return step


def untied(D: Map) -> Map:
    """Step k takes ``params[k]``, the last of them from there on: ENA with its own weights for every layer."""

    def step(u: Any, params: Sequence, k: int) -> Any:
        return D(u, params[min(k, len(params) - 1)], k)

    return step


# -- the hierarchical solvers


def outer_step(metric: Metric, lipschitz: float, share: float = 0.99) -> float:
    """``s = share lambda_min(G) / L_l``, L_l the Lipschitz constant of the upper loss's gradient in u.

    ``v_u`` is non-expansive for ``s_k <= 2 lambda_min(G) / L_l``; Theorem 3.1 asks for a share below 1.  ``metric`` is that
    of all omega, so its ``least`` bounds every one.  Raises ``ValueError`` for a share outside (0, 1).
    Eq: HODL Theorem 3.1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number in (0, 1), got {share}")
    positive("lipschitz", lipschitz)
    return share * metric.least / lipschitz


def aggregated(T: Map, upper: Callable, metric: Any, mu: float, s: Any, project: Callable | None = None,
               lipschitz: float | None = None) -> Map:  # fmt: skip
    """aHODL: ``u+ = Proj_{U,G}(mu (u - s_k G^-1 d_u l(u, omega)) + (1 - mu) T(u))``, ``s_k = s / (k + 1)``, the paper's k.

    ``upper(u, params)`` is a scalar, the sum over a batch of separate problems.  ``mu = 0`` is sHODL, without ``upper``.
    ``s`` is a number (`outer_step`) or a function of the number of steps made before, which returns s_k.  ``project(u)`` is
    the projection in ``||.||_G``: `box` for a `Diagonal` G, `ball` for a multiple of the identity; None for U = R^n.
    Raises ``ValueError`` for a mu outside [0, 1) and, where ``lipschitz`` = L_l is given, for ``s >= lambda_min(G) / L_l``.
    Eq: HODL (4), (5), Algorithm 1.
    """
    if not 0 <= mu < 1:
        raise ValueError(f"mu: expected a number in [0, 1), got {mu}")

    def step(u: Any, params: Any, k: int) -> Any:
        new = T(u, params, k)
        if mu:
            g, size = at(metric, params), s(k) if callable(s) else s / (k + 2)
            if lipschitz is not None and not callable(s) and not s < g.least / lipschitz:
                raise ValueError(f"s: expected less than lambda_min(G) / L = {g.least / lipschitz:.6g}, got {s:.6g}")
            slope = g.inverse(torch.func.grad(upper)(u, params))
            new = tree_map(lambda old, v_l, d: mu * (old - size * d) + (1 - mu) * v_l, u, new, slope)
        return new if project is None else project(new)

    return step


def box(low: float, high: float) -> Callable:
    """The projection on ``low <= u <= high``, in every diagonal metric.  Raises ``ValueError`` unless ``low <= high``."""
    if not low <= high:
        raise ValueError(f"low, high: expected low <= high, got {low} and {high}")
    return lambda u: tree_map(lambda part: part.clamp(low, high), u)


def ball(radius: float) -> Callable:
    """The projection of each item on ``||u|| <= radius``, in a metric that is a multiple of the identity."""
    positive("radius", radius)

    def project(u: Tensor) -> Tensor:
        size = u.flatten(1).norm(dim=1).clamp_min(radius).view(-1, *[1] * (u.dim() - 1))
        return u * (radius / size)

    return project
