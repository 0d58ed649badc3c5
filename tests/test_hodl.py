"""HODL's maps: non-expansive in the metric that belongs to each, expansive in the wrong ones, and differentiable."""

import math

import pytest
import torch
from torch import Tensor

from odlkit.models import hodl
from odlkit.models.hodl import Diagonal, Gram, Matrix, Metric, Saddle
from odlkit.networks import nonexpansive
from odlkit.networks.nonexpansive import AveragedResidual, Chain, LearnedISTA, lipschitz, soft

EYE = torch.eye(2, dtype=torch.float64)
ROTATION = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dictionary(m: int, n: int, seed: int = 0) -> Tensor:
    """Gaussian columns of unit length."""
    q = randn(m, n, seed=seed)
    return q / q.norm(dim=0)


def dense(metric: Metric, *sizes: int) -> Tensor:
    """The matrix of G on a flat u, or of M on ``(u, multiplier)`` with these sizes."""
    eye = torch.eye(sum(sizes), dtype=torch.float64)
    return torch.cat(metric.apply(eye.split(sizes, dim=1)), dim=1) if len(sizes) > 1 else metric.apply(eye)


def jacobian(step, z, params=None, k: int = 0) -> Tensor:
    """The Jacobian of a map at one flat u (n) or one z = (u, multiplier), as a matrix."""
    flat = torch.cat(z) if isinstance(z, tuple) else z
    sizes = [len(part) for part in z] if isinstance(z, tuple) else None

    def function(v: Tensor) -> Tensor:
        out = step(tuple(p[None] for p in v.split(sizes)) if sizes else v[None], params, k)
        return torch.cat([p[0] for p in out]) if sizes else out[0]

    return torch.func.jacrev(function)(flat)


def norm_in(j: Tensor, g: Tensor) -> float:
    """The operator norm of a matrix in ``||.||_G``: the largest ratio over all directions, not over random pairs."""
    root = torch.linalg.cholesky(g).mT
    return torch.linalg.matrix_norm(root @ j @ torch.linalg.inv(root), 2).item()


def radius(j: Tensor) -> float:
    return torch.linalg.eigvals(j).abs().max().item()


def difference(a, b):
    return tuple(p - q for p, q in zip(a, b, strict=True)) if isinstance(a, tuple) else a - b


def inner(metric: Metric, a, b) -> Tensor:
    return sum((p * q).sum(1) for p, q in zip(a, metric.apply(b), strict=True))


def sparse_code_alm(m: int = 12, n: int = 20, share: float = 1.01, beta: float = 2.0, wide: int = 500, check: bool = True):
    """Equation (8): code and noise stacked, A = [Q I], y for each item; the metric and the linearised map."""
    operator = Matrix(torch.cat([dictionary(m, n), torch.eye(m, dtype=torch.float64)], 1))
    bound = operator.singular[0][0].item() ** 2
    metric = Saddle.linearised(operator, share * beta * bound, beta, check=check)
    weight = torch.cat([torch.full((n,), 0.3), torch.ones(m)]).double()
    step = hodl.alm_linearised(lambda v, size, params: soft(v, size * weight), randn(wide, m, seed=3), metric)
    return step, metric, operator


# -- metrics


def metrics() -> dict[str, tuple[Metric, Tensor]]:
    tight = torch.cat([torch.linalg.qr(randn(6, 6)).Q, torch.linalg.qr(randn(6, 6, seed=1)).Q], 1)  # A A^T = 2 I
    wide, tall = randn(4, 9), randn(9, 4)
    eye = lambda n: torch.eye(n, dtype=torch.float64)  # noqa: E731
    return {
        "diagonal": (Diagonal(torch.linspace(1, 5, 9).double()), torch.diag(torch.linspace(1, 5, 9).double())),
        "number": (Diagonal(3.0), 3 * eye(9)),
        "wide": (Gram(Matrix(wide), 60.0, 2.0), 60 * eye(9) - 2 * wide.mT @ wide),
        "tall": (Gram(Matrix(tall), 60.0, 2.0), 60 * eye(4) - 2 * tall.mT @ tall),
        "tight": (Gram(Matrix(tight), 3.0, 1.4, tight=2.0), 3 * eye(12) - 1.4 * tight.mT @ tight),
    }


@pytest.mark.parametrize("name", list(metrics()))
def test_powers_of_a_metric(name):
    metric, g = metrics()[name]
    values, vectors = torch.linalg.eigh(g)
    u = randn(3, len(g), seed=5)
    assert metric.least == pytest.approx(values[0].item(), rel=1e-10)
    for p, mapped in [(1, metric.apply), (-1, metric.inverse), (0.5, metric.root), (-0.5, metric.inverse_root)]:
        torch.testing.assert_close(mapped(u), u @ (vectors * values**p) @ vectors.mT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(metric.norm(u), (u @ g * u).sum(1).sqrt())


def test_a_saddle_metric_is_block_diagonal():
    g, beta = Diagonal(torch.linspace(1, 2, 5).double()), 0.25
    metric, z = Saddle(g, beta), (randn(3, 5), randn(3, 4))
    torch.testing.assert_close(metric.norm(z) ** 2, g.norm(z[0]) ** 2 + z[1].square().sum(1) / beta)
    assert metric.least == 1.0 and Saddle(g, 4.0).least == 0.25
    for back, half in ((metric.inverse_root, metric.root), (metric.inverse, metric.apply)):
        for part, same in zip(back(half(z)), z, strict=True):
            torch.testing.assert_close(part, same)


def test_the_closed_form_of_a_tight_frame_is_the_spectral_one():
    metric = metrics()["tight"][0]
    free, u = Gram(metric.operator, metric.tau, metric.beta), randn(3, 12)
    for p in (0.5, -0.5, -1):
        torch.testing.assert_close(metric.power(u, p), free.power(u, p), rtol=1e-10, atol=1e-12)


def test_metrics_of_images_and_of_each_item():
    d = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    u = torch.ones(3, 2, 4, 4)
    torch.testing.assert_close(Diagonal(d).norm(u), d.sum().sqrt().expand(3))
    operator, taus, betas = (
        Matrix(randn(4, 9)),
        torch.tensor([[40.0], [90.0]]).double(),
        torch.tensor([[1.0], [2.0]]).double(),
    )
    both, v = Gram(operator, taus, betas), randn(2, 9)
    for i in range(2):
        one = Gram(operator, taus[i].item(), betas[i].item())
        torch.testing.assert_close(both.root(v)[i : i + 1], one.root(v[i : i + 1]))
    assert both.least == min(Gram(operator, t.item(), b.item()).least for t, b in zip(taus, betas, strict=True))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Diagonal(torch.tensor([1.0, 0.0])), "d: expected positive numbers, got 0"),
        (lambda: Saddle(Diagonal(), -1.0), "beta: expected positive numbers"),
        (lambda: Gram(Matrix(2 * EYE), 4.0, 1.0), "tau: expected more than beta .* = 0 at .* = 4"),
        (lambda: Gram(object(), 4.0, 1.0), "bound: expected the number"),
        (lambda: Gram(object(), 4.0, 1.0, bound=2.0).root(EYE), "operator: expected a Matrix or one with"),
        (lambda: hodl.averaged(lambda u, p, k: u, 1.5), r"alpha: expected a number in \(0, 1\]"),
        (
            lambda: hodl.aggregated(lambda u, p, k: u, lambda u, p: 0, Diagonal(), 1.0, 0.1),
            r"mu: expected a number in \[0, 1\)",
        ),
        (lambda: hodl.outer_step(Diagonal(), 1.0, 1.0), r"share: expected a number in \(0, 1\)"),
        (lambda: hodl.box(1.0, 0.0), "low, high: expected low <= high"),
        (lambda: LearnedISTA.of_dictionary(EYE, 0.1, 2.5), r"share: expected a number in \(0, 2\]"),
        (lambda: AveragedResidual(torch.nn.Identity(), 1.0), r"theta: expected a number in \(0, 1\)"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_depends_on_params_is_checked_when_it_is_known():
    step = hodl.alm_linearised(
        lambda v, s, p: v, torch.zeros(1, 2).double(), lambda tau: Saddle.linearised(Matrix(EYE), tau, 1.0)
    )
    z = (torch.ones(1, 2).double(), torch.ones(1, 2).double())
    step(z, 1.5, 0)
    with pytest.raises(ValueError, match="tau: expected more than"):
        step(z, 0.9, 0)
    step = hodl.proximal_gradient(lambda u, p: u, lambda v, s, p: v, 1.0, Gram(Matrix(EYE), 2.0, 1.0))
    with pytest.raises(ValueError, match="metric: expected a Diagonal one, got Gram"):
        step(z[0], None, 0)
    pushed = hodl.aggregated(lambda u, p, k: u, lambda u, p: u.sum(), Diagonal(2.0), 0.5, 1.0, lipschitz=2.0)
    with pytest.raises(ValueError, match=r"s: expected less than lambda_min\(G\) / L = 1, got 1"):
        pushed(z[0], None, 0)


# -- proximal gradient and gradient descent


@pytest.mark.parametrize("m, n", [(120, 60), (60, 120)])
def test_the_step_of_equation_9_expands_above_one_over_the_squared_norm(m, n):
    """No half in the fidelity: ``L = 2 ||Q||^2``.  The factor is that of the leading direction; random pairs stay below.

    Eq: HODL (9), Table 2.
    """
    q, b = dictionary(m, n), randn(1, m)
    s = torch.linalg.svdvals(q)
    lipschitz_constant, least = 2 * s[0].item() ** 2, (2 * s[-1].item() ** 2 if m > n else 0.0)
    for share, contracts in ((0.5, True), (0.99, True), (1.0, True), (1.01, False), (2.0, False)):
        gamma = share * 2 / lipschitz_constant
        step = hodl.proximal_gradient(lambda u, p: 2 * (u @ q.mT - b) @ q, lambda v, size, p: v, gamma)
        factor = norm_in(jacobian(step, randn(n)), torch.eye(n).double())
        assert factor == pytest.approx(max(abs(1 - gamma * lipschitz_constant), abs(1 - gamma * least)), abs=1e-10)
        assert (factor <= 1 + 1e-12) == contracts
    thresholded = hodl.proximal_gradient(
        lambda u, p: 2 * (u @ q.mT - b) @ q, lambda v, size, p: soft(v, 0.1 * size), gamma / 2
    )
    u, v = randn(500, n, seed=1), randn(500, n, seed=2)
    assert (difference(*(thresholded(w, None, 0) for w in (u, v))).norm(dim=1) <= (u - v).norm(dim=1)).all()


def test_random_pairs_miss_what_the_leading_direction_shows():
    q = dictionary(100, 200)
    gamma = 1.2 / torch.linalg.matrix_norm(q, 2).item() ** 2
    step = hodl.gradient_descent(lambda u, p: 2 * u @ q.mT @ q, gamma)
    u = randn(2000, 200, seed=1)
    assert (step(u, None, 0).norm(dim=1) / u.norm(dim=1)).max() < 1
    top = torch.linalg.svd(q).Vh[:1]
    assert (step(top, None, 0).norm() / top.norm()).item() == pytest.approx(1.4)


def test_gradient_descent_without_a_step_size_expands():
    """The printed row is ``u - grad f(u)``.  Eq: HODL Table 2."""
    q = dictionary(100, 200)
    plain = jacobian(hodl.gradient_descent(lambda u, p: u @ q.mT @ q, 1.0), randn(200))
    top = torch.linalg.matrix_norm(q, 2).item() ** 2
    assert norm_in(plain, torch.eye(200).double()) == pytest.approx(top - 1) and top - 1 > 4
    safe = jacobian(hodl.gradient_descent(lambda u, p: u @ q.mT @ q, 2 / top), randn(200))
    assert norm_in(safe, torch.eye(200).double()) <= 1 + 1e-12


def test_a_preconditioned_step_is_non_expansive_in_its_metric_only():
    """Badly scaled columns, G = diag of the row sums of |Q^T Q| (so ``Q^T Q <= G``), separable prox.  Eq: HODL Table 2."""
    q = dictionary(30, 40) * torch.logspace(-1, 1, 40).double()
    gram = q.mT @ q
    metric = Diagonal(gram.abs().sum(0))
    assert torch.linalg.eigvalsh(torch.diag(metric.d) - gram)[0] >= 0
    b = randn(400, 30, seed=4)
    step = hodl.proximal_gradient(lambda u, p: (u @ q.mT - b) @ q, lambda v, size, p: soft(v, 0.02 * size), 1.99, metric)
    u, v = randn(400, 40, seed=1), randn(400, 40, seed=2)
    ratio = metric.norm(step(u, None, 0) - step(v, None, 0)) / metric.norm(u - v)
    linear = hodl.gradient_descent(lambda u, p: u @ gram, 1.99, metric)
    assert ratio.max() <= 1 and norm_in(jacobian(linear, u[0]), torch.diag(metric.d)) <= 1 + 1e-12
    assert norm_in(jacobian(linear, u[0]), torch.eye(40).double()) > 1.05


def test_half_quadratic_is_non_expansive_for_every_penalty():
    """Source: HODL Table 1."""
    q, b = dictionary(20, 30), randn(1, 20)
    for penalty in (0.01, 1.0, 100.0):

        def solve(v, size, p):
            return torch.linalg.solve(torch.eye(30).double() + size * q.mT @ q, (v + size * b @ q).mT).mT

        step = hodl.half_quadratic(solve, lambda v, size, p: soft(v, 0.1 * size), penalty)
        u, v = randn(300, 30, seed=1), randn(300, 30, seed=2)
        assert ((step(u, None, 0) - step(v, None, 0)).norm(dim=1) <= (u - v).norm(dim=1)).all()
        assert norm_in(jacobian(step, u[0]), torch.eye(30).double()) <= 1 + 1e-12


# -- augmented Lagrangian


def linear_alm(seed: int, n: int = 8, m: int = 5):
    """An exact u-step for ``f = <u, H u> / 2 - <c, u>``, and its Jacobian: G and beta over four decades."""
    generator = torch.Generator().manual_seed(seed)
    h, a, b = randn(n, n, seed=seed), randn(m, n, seed=seed + 50), randn(1, m, seed=seed + 90)
    h = h.mT @ h / n
    d = 10 ** (4 * torch.rand(n, generator=generator).double() - 2)
    beta = 10 ** (4 * torch.rand(1, generator=generator).item() - 2)
    metric, inverse = Saddle(Diagonal(d), beta), torch.linalg.inv(h + torch.diag(d) + beta * a.mT @ a)
    c = randn(n, seed=7)
    step = hodl.alm_exact(lambda q, params: (q + c) @ inverse, Matrix(a), b, metric)
    return step, metric, (h, a, b, c, d, beta)


@pytest.mark.parametrize("seed", range(5))
def test_the_exact_augmented_lagrangian_is_firm_in_its_metric(seed):
    """``D^T M D - D^T M <= 0`` in its symmetric part.  Eq: HODL Table 2."""
    step, metric, _ = linear_alm(seed)
    j, g = jacobian(step, (randn(8), randn(5))), dense(metric, 8, 5)
    excess = j.mT @ g @ j - (j.mT @ g + g @ j) / 2
    assert torch.linalg.eigvalsh(excess)[-1] <= 1e-10 * g.abs().max()
    assert norm_in(j, g) <= 1 + 1e-9


def test_errata_the_other_metrics_of_the_augmented_lagrangian_expand():
    """Neither the identity nor ``diag(G, beta I)``.  Eq: HODL Table 2."""
    worst = {"identity": 0.0, "diag(G, beta I)": 0.0, "diag(G, I / beta)": 0.0}
    for seed in range(40):
        step, metric, (_, _, _, _, d, beta) = linear_alm(seed)
        j = jacobian(step, (randn(8), randn(5)))
        ones = torch.ones(5).double()
        for name, diagonal in (("identity", torch.ones(13).double()), ("diag(G, beta I)", torch.cat([d, beta * ones])),
                               ("diag(G, I / beta)", torch.cat([d, ones / beta]))):  # fmt: skip
            worst[name] = max(worst[name], norm_in(j, torch.diag(diagonal)))
    assert worst["diag(G, I / beta)"] <= 1 + 1e-9
    assert worst["identity"] > 5 and worst["diag(G, beta I)"] > 1.5


def test_the_exact_step_solves_its_subproblem_and_ends_at_the_saddle_point():
    """Eq: HODL Table 2."""
    step, metric, (h, a, b, c, d, beta) = linear_alm(3)
    u0, l0 = randn(1, 8, seed=1), randn(1, 5, seed=2)
    u = step((u0, l0), None, 0)[0].detach().requires_grad_()
    gap = u @ a.mT - b
    value = (
        (u @ h * u).sum() / 2
        - (u * c).sum()
        + (l0 * gap).sum()
        + beta / 2 * gap.square().sum()
        + (d * (u - u0) ** 2).sum() / 2
    )
    assert torch.autograd.grad(value, u)[0].abs().max() < 1e-10
    kkt = torch.cat([torch.cat([h, a.mT], 1), torch.cat([a, torch.zeros(5, 5).double()], 1)])
    saddle = torch.linalg.solve(kkt, torch.cat([c, b[0]]))
    fixed = step((saddle[None, :8], saddle[None, 8:]), None, 0)
    torch.testing.assert_close(torch.cat(fixed, 1)[0], saddle, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [1.01, 1.2])
def test_the_linearised_augmented_lagrangian_is_firm_in_its_metric(share):
    """Nonlinear, so on random pairs and pairs along the leading direction of A.  Eq: HODL (8), Table 2."""
    step, metric, operator = sparse_code_alm(share=share)
    pairs = [(randn(500, 32, seed=s), randn(500, 12, seed=s + 10)) for s in (1, 2)]
    along = randn(500, 1, seed=5) * operator.singular[1][:1]
    pairs.append((pairs[0][0] + along, pairs[0][1]))
    for other in pairs[1:]:
        before = difference(pairs[0], other)
        after = difference(step(pairs[0], None, 0), step(other, None, 0))
        assert (metric.norm(after) <= metric.norm(before)).all()
        assert (metric.norm(after) ** 2 - inner(metric, after, before)).max() <= 1e-11
        ratios = [(w.norm(after) / w.norm(before)).max() for w in (Saddle(metric.metric, 1 / metric.beta), Diagonal())]
        if other is pairs[1]:  # diag(G, beta I) and the identity
            assert ratios[0] > 1.02 and ratios[1] > 1.3


def test_code_and_noise_stacked_have_one_more_than_the_squared_norm():
    """``||[Q I]||^2 = ||Q||^2 + 1``.  Eq: HODL (8)."""
    operator = sparse_code_alm()[2]
    expected = torch.linalg.matrix_norm(dictionary(12, 20), 2).item() ** 2 + 1
    assert (
        operator.eigenvalue_range(randn(1, 32))[1] == pytest.approx(expected) and Gram(operator, 50.0, 1.0).bound == expected
    )


def test_tau_below_its_bound_loses_the_metric_first_and_convergence_later():
    """tau / (beta ||A||^2) = 0.76: M is indefinite and the steps still shrink; 0.5: they grow without bound."""
    moves = {}
    for share in (1.01, 0.76, 0.5):
        step, metric, _ = sparse_code_alm(share=share, wide=4, check=False)
        z, moves[share] = (torch.zeros(4, 32).double(), torch.zeros(4, 12).double()), []
        for k in range(300):
            z, old = step(z, None, k), z
            moves[share].append(torch.cat(difference(z, old), 1).norm().item())
        assert (torch.linalg.eigvalsh(dense(metric, 32, 12))[0] > 0) == (share > 1)
    assert moves[1.01][-1] < 0.05 * moves[1.01][0] and moves[0.76][-1] < 0.05 * moves[0.76][0]
    assert moves[0.5][-1] > 1e3 * moves[0.5][0]


# -- averaging and conjugation


def linear(matrix: Tensor) -> hodl.Map:
    return lambda u, params, k: u @ matrix.mT


@pytest.mark.parametrize("alpha, expected, rel", [(1.0, 1.0, 1e-12), (0.9, 4.905605e-5, 1e-5), (0.5, 2**-50, 1e-9)])
def test_a_rotation_converges_iff_it_is_averaged(alpha, expected, rel):
    """``||u^100||`` from a unit vector.  Eq: HODL (3)."""
    step, u = hodl.averaged(linear(ROTATION), alpha), EYE[:1]
    for k in range(100):
        u = step(u, None, k)
    assert u.norm().item() == pytest.approx(expected, rel=rel)


def test_without_conjugation_two_non_expansive_maps_diverge():
    """G = diag(1, 100), D_num = G^(-1/2) R G^(1/2), D_net = R: spectral radius 10 and 4.5, with conjugation 1 and 0."""
    metric, net = Diagonal(torch.tensor([1.0, 100.0]).double()), linear(ROTATION)
    number = hodl.conjugated(net, metric)
    assert norm_in(jacobian(number, EYE[0]), torch.diag(metric.d)) == pytest.approx(1)
    raw, right = hodl.compose(number, net), hodl.compose(number, hodl.conjugated(net, metric))
    assert radius(jacobian(raw, EYE[0])) == pytest.approx(10)
    assert radius(jacobian(hodl.averaged(raw, 0.5), EYE[0])) == pytest.approx(4.5)
    assert norm_in(jacobian(right, EYE[0]), torch.diag(metric.d)) == pytest.approx(1)
    assert radius(jacobian(hodl.averaged(right, 0.5), EYE[0])) == pytest.approx(0, abs=1e-12)


def test_conjugation_with_a_genuine_proximal_gradient_step():
    """f = <u, H u> / 2, G = diag(2, 200), a rotation by 283 degrees: 2.756 without conjugation, 0.567 with it."""
    h = 0.99 * torch.tensor([[1.0, 9.0], [9.0, 100.0]]).double()
    metric, angle = Diagonal(torch.tensor([2.0, 200.0]).double()), math.radians(283)
    net = linear(math.cos(angle) * EYE + math.sin(angle) * ROTATION)
    number = hodl.proximal_gradient(lambda u, p: u @ h, lambda v, size, p: v, 1.0, metric)
    assert norm_in(jacobian(number, EYE[0]), torch.diag(metric.d)) < 1
    for inside, expected in ((net, 2.756), (hodl.conjugated(net, metric), 0.567)):
        assert radius(jacobian(hodl.averaged(hodl.compose(number, inside), 0.5), EYE[0])) == pytest.approx(
            expected, abs=1e-3
        )


def test_conjugation_on_code_and_multiplier():
    """A network on z that is 1-Lipschitz in l2, conjugated by ``M^(1/2)``, composed with the augmented Lagrangian."""
    step, metric, _ = sparse_code_alm()
    rotation = torch.linalg.qr(randn(44, 44, seed=9)).Q
    net = lambda z, params, k: (torch.cat(z, 1) @ rotation).split([32, 12], dim=1)  # noqa: E731
    both = hodl.averaged(hodl.compose(step, hodl.conjugated(net, metric)), 0.9)
    one, two = ((randn(500, 32, seed=s), randn(500, 12, seed=s + 10)) for s in (1, 2))
    assert (metric.norm(difference(both(one, None, 0), both(two, None, 0))) <= metric.norm(difference(one, two))).all()
    raw = hodl.compose(step, net)
    assert (metric.norm(difference(raw(one, None, 0), raw(two, None, 0))) > metric.norm(difference(one, two))).any()


def test_untied_maps_repeat_their_last_parameters():
    step = hodl.untied(lambda u, p, k: u * p)
    assert [step(1.0, [2.0, 3.0], k) for k in range(4)] == [2.0, 3.0, 3.0, 3.0]


# -- aggregation


def quadratic(h: Tensor):
    return lambda u, params: (u @ h * u).sum() / 2


@pytest.mark.parametrize("share, factor", [(0.99, 0.9901), (1.99, 0.99), (2.01, 1.01), (3.0, 2.0)])
def test_the_outer_move_is_non_expansive_up_to_twice_the_printed_step(share, factor):
    """``I - s G^-1 H`` with H = I, G = diag(1, 100).  Eq: HODL (4), Theorem 3.1."""
    metric = Diagonal(torch.tensor([1.0, 100.0]).double())
    move = hodl.aggregated(linear(0 * EYE), quadratic(EYE), metric, 0.5, lambda k: share * metric.least)
    j = jacobian(move, EYE[0]) / 0.5
    assert norm_in(j, torch.diag(metric.d)) == pytest.approx(factor)


@pytest.mark.parametrize("k, without", [(1, 2.6876), (9, 1.2315)])
def test_the_outer_move_needs_the_inverse_metric(k, without):
    """G = diag(1, 100), l = (u_1 + u_2)^2 / 4, so L = 1; k is the paper's, ours is one less.  Eq: HODL (4)."""
    h, metric = torch.full((2, 2), 0.5).double(), Diagonal(torch.tensor([1.0, 100.0]).double())
    factors = []
    for g in (metric, Diagonal()):
        move = hodl.aggregated(linear(0 * EYE), quadratic(h), g, 0.5, 0.99)
        factors.append(norm_in(jacobian(move, EYE[0], k=k - 1) / 0.5, torch.diag(metric.d)))
    assert factors[0] <= 1 + 1e-12 and factors[1] == pytest.approx(without, abs=1e-4)


def test_aggregation_is_equation_4_in_its_own_words():
    """Eq: HODL (4), (5), Algorithm 1."""
    metric, u, target = Diagonal(torch.tensor([2.0, 5.0]).double()), randn(3, 2), randn(3, 2, seed=1)
    T = hodl.averaged(linear(0.5 * ROTATION), 0.7)
    upper = lambda u, params: (params * (u - target) ** 2).sum() / 2  # noqa: E731
    s, k, mu = hodl.outer_step(metric, 3.0), 4, 0.3
    assert s == pytest.approx(0.99 * 2 / 3)
    step = hodl.aggregated(T, upper, metric, mu, s, hodl.box(-0.2, 0.2), lipschitz=3.0)
    v_u = u - s / (k + 2) * 3.0 * (u - target) / metric.d  # the paper's k is ours plus one
    expected = (mu * v_u + (1 - mu) * T(u, None, k)).clamp(-0.2, 0.2)
    torch.testing.assert_close(step(u, 3.0, k), expected)
    torch.testing.assert_close(hodl.aggregated(T, upper, metric, 0.0, s)(u, 3.0, k), T(u, None, k))


def test_the_sum_and_the_mean_give_the_same_iteration_when_s_is_relative():
    T, metric, u = linear(0.5 * EYE), Diagonal(), randn(4, 2)
    upper = lambda u, params: params * u.square().sum() / 2  # noqa: E731  (L = params)
    a, b = (hodl.aggregated(T, upper, metric, 0.5, hodl.outer_step(metric, c), lipschitz=c)(u, c, 3) for c in (1.0, 1 / 8))
    torch.testing.assert_close(a, b)


def test_projections():
    u = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(hodl.ball(1.0)(u), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
    pair = hodl.box(0.0, 1.0)((u, -u))
    torch.testing.assert_close(pair[0], u.clamp(0, 1)), torch.testing.assert_close(pair[1], 0 * u)


# -- derivatives


def test_gradients_with_respect_to_params_and_start():
    """Weights, threshold, step size and metric of D_net and D_num, through three steps of aHODL.  Eq: HODL (3), (4)."""
    q, b, target = dictionary(4, 6), randn(2, 4), randn(2, 6, seed=1)
    net = LearnedISTA.of_dictionary(q, 0.05)

    def run(w, v, threshold, log_step, d, u):
        params = {"net": {"W": w, "V": v, "threshold": threshold}, "step": log_step, "d": d}
        metric = lambda p: Diagonal(p["d"].exp())  # noqa: E731
        inside = hodl.conjugated(hodl.network(net, b, weights=lambda p: p["net"]), metric)
        number = hodl.proximal_gradient(
            lambda u, p: (u @ q.mT - b) @ q, lambda v, size, p: soft(v, 0.01 * size), lambda p: p["step"].exp(), metric
        )
        T = hodl.averaged(hodl.compose(number, inside), 0.8)
        step = hodl.aggregated(T, lambda u, p: (u - target).square().sum() / 2, metric, 0.4, 0.5)
        for k in range(3):
            u = step(u, params, k)
        return u

    start = [net.W, net.V, net.threshold, torch.tensor(-1.0), randn(6, seed=2) / 4, randn(2, 6, seed=3)]
    assert torch.autograd.gradcheck(run, [x.detach().double().clone().requires_grad_() for x in start])


def test_gradients_with_respect_to_tau_and_beta():
    """Linearised and exact augmented Lagrangian, conjugated network included.  Eq: HODL Table 2."""
    operator, y = Matrix(randn(3, 5)), randn(2, 3)
    bound = operator.singular[0][0].item() ** 2

    def run(beta, excess, u, multiplier):
        linearised = lambda p: Saddle.linearised(operator, p[0] * bound * (1 + p[1]), p[0])  # noqa: E731
        exact = lambda p: Saddle(Diagonal(p[1]), p[0])  # noqa: E731

        def solve(q, p):
            system = (1 + p[1]) * torch.eye(5).double() + p[0] * operator.matrix.mT @ operator.matrix
            return torch.linalg.solve(system, q.mT).mT

        net = hodl.conjugated(lambda z, p, k: (z[0].sin(), z[1].tanh()), linearised)
        z, params = (u, multiplier), (beta, excess)
        z = hodl.compose(hodl.alm_linearised(lambda v, size, p: soft(v, 0.1 * size), y, linearised), net)(z, params, 0)
        return hodl.alm_exact(solve, operator, y, exact)(z, params, 1)

    values = [torch.tensor(0.7), torch.tensor(0.3), randn(2, 5, seed=1), randn(2, 3, seed=2)]
    assert torch.autograd.gradcheck(run, [x.double().requires_grad_() for x in values])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_kept(dtype):
    q, b = dictionary(4, 6).to(dtype), randn(2, 4).to(dtype)
    net = LearnedISTA.of_dictionary(q, 0.05)
    inside = hodl.conjugated(hodl.network(net, b), Diagonal(2.0))
    number = hodl.proximal_gradient(lambda u, p: (u @ q.mT - b) @ q, lambda v, s, p: soft(v, 0.01 * s), 0.1, Diagonal(2.0))
    step = hodl.aggregated(
        hodl.averaged(hodl.compose(number, inside), 0.9), lambda u, p: u.square().sum(), Diagonal(2.0), 0.1, 0.5
    )
    assert step(torch.zeros(2, 6, dtype=dtype), dict(net.named_parameters()), 0).dtype == dtype


# -- networks


def test_a_learned_ista_starts_as_one_proximal_gradient_step():
    q, b, u = dictionary(8, 12), randn(3, 8), randn(3, 12, seed=1)
    gamma = 1.5 / torch.linalg.matrix_norm(q, 2).item() ** 2
    step = hodl.proximal_gradient(lambda u, p: (u @ q.mT - b) @ q, lambda v, size, p: soft(v, 0.1 * size), gamma)
    torch.testing.assert_close(LearnedISTA.of_dictionary(q, 0.1, 1.5)(u, b), step(u, None, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_project_makes_the_recomputed_bound_hold(dtype):
    """The nearest matrix: singular values below 1 stay.  Eq: HODL Algorithm 1."""
    net = LearnedISTA(40, 20, 0.1, dtype)
    net.W.data = randn(40, 40).to(dtype) / 8
    before = torch.linalg.svdvals(net.W.detach().double())
    assert net.bound() == pytest.approx(before[0].item()) and net.bound() > 1.2
    assert nonexpansive.project(torch.nn.Sequential(net))[0].bound() <= 1
    torch.testing.assert_close(torch.linalg.svdvals(net.W.detach().double()), before.clamp_max(1), rtol=0, atol=1e-4)
    net.threshold.data.fill_(-0.1)  # its magnitude counts: a negative soft threshold would expand
    u, v, b = randn(300, 40, seed=1).to(dtype), randn(300, 40, seed=2).to(dtype), randn(300, 20).to(dtype)
    assert ((net(u, b) - net(v, b)).norm(dim=1) <= (u - v).norm(dim=1) * (1 + 1e-6)).all()


def test_power_iteration_underestimates_what_bound_recomputes():
    """torch's spectral normalization after its first iterations leaves a norm above 1, which is why `bound` has an SVD."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(256, 256, bias=False))
    net = LearnedISTA(256, 4)
    net.W.data = layer.weight.detach()
    assert 1.001 < net.bound() < 1.05


def test_residual_networks_are_averaged():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inside = LearnedISTA(10, 4, 0.01, torch.float64)
    inside.W.data = -torch.eye(10).double()
    net, b = AveragedResidual(inside, 0.25), torch.zeros(1, 4).double()
    j = torch.func.jacrev(lambda u: net(u[None], b)[0])(randn(10))
    assert net.bound() == pytest.approx(1.0) and torch.linalg.matrix_norm(j, 2) <= net.bound() + 1e-12
    inside.W.data = torch.eye(10).double()
    plain = torch.func.jacrev(lambda u: u + inside(u[None], b)[0])(randn(10))
    assert torch.linalg.matrix_norm(plain, 2).item() == pytest.approx(2)  # x + N(x)
    inside.W.data *= 3
    assert net.bound() == pytest.approx(0.75 + 0.25 * 3) and lipschitz(Chain([net, net])) == pytest.approx(1.5**2)
    assert torch.equal(Chain([net, net])(EYE[:1].repeat(1, 5), b), net(net(EYE[:1].repeat(1, 5), b), b))
    convolutions = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.ReLU())
    assert lipschitz(convolutions) > 0
    with pytest.raises(ValueError, match="net: expected"):
        lipschitz(torch.nn.BatchNorm2d(3))


def test_errata_a_relu_layer_cannot_produce_signed_codes_and_a_bounded_pair_halves_odd_functions():
    """The paper's D_net: ReLU(W u + b) >= 0.  Two layers: the identity, relu(u) - relu(-u), costs ``||W1|| ||W2|| = 2``.

    Source: HODL section 6.1.
    """
    codes = randn(1000, 20)
    best = (codes - codes.clamp_min(0)).square().sum() / codes.square().sum()
    assert 0.4 < best < 0.6  # even the best non-negative code loses half of the energy
    first, second = torch.cat([EYE, -EYE]), torch.cat([EYE, -EYE], 1)
    torch.testing.assert_close(torch.relu(codes[:, :2] @ first.mT) @ second.mT, codes[:, :2])
    assert math.prod(torch.linalg.matrix_norm(w, 2).item() for w in (first, second)) == pytest.approx(2)


def test_errata_one_fixed_point_does_not_mean_a_contraction():
    """``D(u) = u - u^3 / 10`` on [-1, 1]: one fixed point, Lipschitz constant 1.  Source: HODL section 3.3."""
    u = torch.linspace(-1, 1, 201).double()
    moved = u - u**3 / 10
    assert ((moved == u) == (u.abs() < 1e-3)).all() and (moved.diff() <= u.diff()).all()
    small = torch.tensor([0.0, 1e-3]).double()
    assert ((small - small**3 / 10).diff() / small.diff()).item() > 1 - 1e-6
    x = 1.0
    for _ in range(100_000):
        x -= x**3 / 10
    assert 1 / x**2 == pytest.approx(2e4, rel=1e-2)  # slower than every geometric rate
