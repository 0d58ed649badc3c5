"""Sparse coding with UNH, ENA and HODL: one start, one projection, and what becomes of the iteration beyond its depth."""

import pytest
import torch

from odlkit import data
from odlkit.bilevel import LowerLevelError
from odlkit.metrics import psnr
from odlkit.models import hodl
from odlkit.training import sparse_coding as sc

DEPTH = 8
ALL = ("pg", "unh", "ena", "hodl", "hodl-divided", "hodl-free")


@pytest.fixture(scope="module")
def wide() -> sc.Regularised:
    """A dictionary with twice as many columns as rows."""
    return sc.Regularised.drawn(40, 80, seed=0, train=2000, tested=50)


def followed(method: sc.Method, problem: sc.Regularised, steps: int):
    exact = problem.double()
    b, truth = exact.test()
    return (*sc.follow(method.map(exact, b), method.double(), exact.start(b), steps, (DEPTH,)), truth)


@pytest.fixture(scope="module")
def trained(wide):
    """Name -> (method, what training recorded), all with the same batches."""
    found = {}
    for name in ("hodl", "hodl-free"):
        method = sc.regularised(name, wide, DEPTH)
        found[name] = method, sc.train(method, wide, DEPTH, steps=150)
    return found


def test_a_trained_hodl_contracts_beyond_its_depth_and_the_free_one_diverges(wide, trained):
    """Contraction rests on the projection: W is projected or it is not, nothing else differs.  Eq: HODL (5), (9)."""
    method, log = trained["hodl"]
    states, moves, sizes, truth = followed(method, wide, 20 * DEPTH)
    start = sc.nmse(followed(sc.regularised("hodl", wide, DEPTH), wide, DEPTH)[0][DEPTH], truth)
    assert sum(log["loss"][-10:]) < 0.7 * sum(log["loss"][:10]) and sc.nmse(states[DEPTH], truth) < start - 1
    assert method.sigma() <= 1 and sc.worst_ratio(moves, sizes) <= 1
    assert moves[10 * DEPTH].norm() < 1e-2 * moves[DEPTH].norm()
    free, _ = trained["hodl-free"]
    states, moves, sizes, truth = followed(free, wide, 20 * DEPTH)
    assert free.sigma() > 1.05 and sc.worst_ratio(moves, sizes, DEPTH) > 1.01
    assert sc.nmse(states[20 * DEPTH], truth) > 20 > sc.nmse(states[DEPTH], truth) + 20


def test_all_methods_start_from_one_iteration(wide):
    """ENA before training is UNH before training; HODL is D_num after one such step, averaged.  Eq: HODL (3)."""
    exact = wide.double()
    b, _ = exact.test()
    u = torch.randn(len(b), 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = {name: sc.regularised(name, wide, DEPTH) for name in ALL}
    new = {name: m.map(exact, b)(u, m.double(), 3) for name, m in step.items()}
    pg = step["pg"].map(exact, b)
    twice = pg(new["pg"], step["pg"].double(), 0)
    assert torch.equal(new["pg"], new["unh"]) and torch.allclose(new["ena"], new["pg"], atol=1e-6)
    for name in ("hodl", "hodl-divided", "hodl-free"):
        assert torch.allclose(new[name], u + sc.ALPHA * (twice - u), atol=1e-6)


def test_batches_depend_on_the_seed_alone(wide):
    one, other = (sc.train(sc.regularised(n, wide, 2), wide, 2, steps=1, seed=5)["loss"] for n in ("unh", "ena"))
    assert one == pytest.approx(other, rel=1e-5)
    assert one != sc.train(sc.regularised("unh", wide, 2), wide, 2, steps=1, seed=6)["loss"]


def test_division_and_projection_reach_norm_one_and_differ(wide):
    ends = {}
    for way in ("hodl", "hodl-divided"):
        method = sc.regularised(way, wide, 2)
        with torch.no_grad():
            method.net.W += 0.02 * torch.randn(80, 80, generator=torch.Generator().manual_seed(2))
        before = method.net.W.clone()
        method.project()
        assert method.sigma() <= 1
        ends[way] = (method.net.W - before).norm().item()
    assert 0 < ends["hodl"] < 0.5 * ends["hodl-divided"]


def test_aggregation_uses_labels_in_training_only(wide):
    """With mu = 0 aHODL is sHODL; with mu > 0 the map needs the truth and steps towards it.  Eq: HODL (4)."""
    method, exact = sc.regularised("hodl", wide, DEPTH), wide.double()
    b, truth = exact.test()
    u, params = exact.start(b), method.double()
    plain = method.map(exact, b)(u, params, 0)
    assert torch.equal(sc.aggregated(method, 0.0).map(exact, b, truth)(u, params, 0), plain)
    near = sc.aggregated(method, 0.5).map(exact, b, truth)(u, params, 0)
    assert torch.allclose(near, 0.5 * (u + 0.99 / 2 * (truth - u)) + 0.5 * plain)
    with pytest.raises(TypeError):
        sc.aggregated(method, 0.5).map(exact, b)


# -- the constrained problem


@pytest.fixture(scope="module")
def patches() -> sc.Constrained:
    """A tight frame of two orthonormal bases of R^12, and data that are not in it."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(44, 12, generator=generator, dtype=torch.float64)
    bases = [torch.linalg.qr(part)[0] for part in (draws[:12], draws[12:24])]
    return sc.Constrained(torch.cat(bases, 1), draws[24:], 2.0, weight=0.4)


CONSTRAINED = ("alm", "admm", "unh-alm", "unh-admm", "ena-alm", "ena-admm", "hodl", "hodl-free", "hodl-plain")


def test_alm_and_admm_have_the_same_fixed_points(patches):
    """Each one's end is a fixed point of the other, satisfies the constraint and is optimal.  Eq: HODL (8), Table 2."""
    start, ends = patches.start(patches.data), {}
    methods = {name: sc.constrained(name, patches, 1) for name in ("alm", "admm")}
    for m in methods.values():
        m.params["beta"] = torch.tensor(-0.5)
    steps = {name: m.map(patches, patches.data) for name, m in methods.items()}
    for name, m in methods.items():
        z = start
        for _ in range(2000):
            z = steps[name](z, m.double(), 0)
        ends[name] = z
    for name, other in (("alm", "admm"), ("admm", "alm")):
        z, moved = ends[name], steps[other](ends[name], methods[other].double(), 0)
        assert max((a - b).abs().max().item() for a, b in zip(z, moved, strict=True)) < 1e-3
        u, noise = z[0][:, :24], z[0][:, 24:]
        assert (u @ patches.q.mT + noise - patches.data).abs().max() < 1e-3
        assert (z[1] @ patches.q).abs().max() <= patches.weight + 1e-3 and z[1].abs().max() <= 1 + 1e-3  # dual feasible
        value = patches.weight * u.abs().sum(1) + noise.abs().sum(1)
        assert (value + (z[1] * patches.data).sum(1)).abs().max() < 1e-2 * value.min()  # primal minus dual value
    values = [patches.loss(patches.data)(z, None).item() for z in ends.values()]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert patches.loss(patches.data)(start, None).item() > 1.2 * values[0]


def test_alm_and_hodl_contract_in_their_metric_and_not_in_another(patches):
    """Eq: HODL Assumption 3.2, Table 2."""
    for name in ("alm", "hodl"):
        method = sc.constrained(name, patches, 1)
        params = method.double()
        metric = method.metric(patches, params)
        run = method.map(patches, patches.data)
        _, moves, sizes = sc.follow(run, params, patches.start(patches.data), 100, metric=metric)
        assert metric.least > 0 and sc.worst_ratio(moves, sizes) <= 1
        _, moves, sizes = sc.follow(run, params, patches.start(patches.data), 100)
        assert sc.worst_ratio(moves, sizes) > 1


def test_layers_start_as_their_solver_and_all_train(patches):
    z = tuple(torch.randn_like(part) for part in patches.start(patches.data))
    for name in CONSTRAINED:
        method = sc.constrained(name, patches, 3)
        new = method.map(patches, patches.data)(z, method.double(), 2)
        if name.startswith("ena"):
            solver = sc.constrained(name[4:], patches, 3)
            expected = solver.map(patches, patches.data)(z, solver.double(), 0)
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(new, expected, strict=True))
    small = sc.Constrained(patches.q.float(), patches.data.float(), 2.0, weight=0.4)
    for name in ("unh-alm", "unh-admm", "ena-alm", "ena-admm", "hodl", "hodl-free", "hodl-plain"):
        method, losses = sc.constrained(name, small, 3), []
        for steps in (0, 12):
            sc.train(method, small, 3, steps=steps, batch=20, every=5)
            states = sc.follow(method.map(small, small.data), method.params, small.start(small.data), 3)[0]
            losses.append(small.loss(small.data)(states[3], None).item())
        assert losses[1] < losses[0], name
        assert method.normalise != "clip" or method.sigma() <= 1


def test_errata_the_untrained_solver_is_far_above_the_noisy_picture():
    """Table 3 has UNH and ENA near or below 15 dB, the noisy picture; no training is needed to exceed that by 7 dB."""
    x = data.sample("camera", 64)
    problem = sc.Constrained(sc.frame(), sc.to_patches(sc.salt_and_pepper(x, 0.1, torch.Generator().manual_seed(0))), 2.0)
    noisy = psnr(sc.to_images(problem.data, 64, 64), x).item()
    for name in ("alm", "admm"):
        method = sc.constrained(name, problem, 25)
        step = method.map(problem, problem.data)
        z = sc.follow(step, method.params, problem.start(problem.data), 25)[0][25]
        restored = sc.to_images(problem.restored(z), 64, 64)
        assert psnr(restored, x).item() > noisy + 7 > 20


def test_frame_patches_and_noise():
    q = sc.frame()
    assert q.shape == (256, 512)
    assert torch.allclose(q @ q.mT, 2 * torch.eye(256), atol=1e-5)
    x = torch.rand(2, 1, 48, 32, generator=torch.Generator().manual_seed(0))
    cut = sc.to_patches(x)
    assert cut.shape == (12, 256) and torch.equal(cut[0], x[0, 0, :16, :16].flatten())
    assert torch.equal(sc.to_images(cut, 48, 32), x) and torch.equal(
        sc.to_patches(x[..., :47, :]), cut[[0, 1, 2, 3, 6, 7, 8, 9]]
    )
    noisy = sc.salt_and_pepper(torch.full((1, 1, 200, 200), 0.5), 0.1, torch.Generator().manual_seed(0))
    assert (noisy == 0).float().mean() == pytest.approx(0.05, abs=0.005) == (noisy == 1).float().mean()
    assert torch.equal(sc.salt_and_pepper(x, 0.0, torch.Generator()), x)


def test_the_ratio_finds_one_step_that_grows():
    moves, sizes = 0.9 ** torch.arange(20.0, dtype=torch.float64)[:, None].repeat(1, 3), torch.ones(20, 3).double()
    assert sc.worst_ratio(moves, sizes) == pytest.approx(0.9)
    moves[12:, 1] *= 1.2
    assert sc.worst_ratio(moves, sizes) == pytest.approx(1.08) and sc.worst_ratio(moves, sizes, 12) == pytest.approx(0.9)


def test_a_lower_level_that_fails_is_counted_and_not_silent(wide):
    method = sc.regularised("hodl-free", wide, DEPTH)
    with torch.no_grad():
        method.net.W *= 100.0
    with pytest.raises(LowerLevelError, match=r"u\^\d+"):
        sc.train(method, wide, DEPTH, steps=10)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda p, c: sc.regularised("lista", p, 3), "name: expected pg"),
        (lambda p, c: sc.constrained("unh", c, 3), "name: expected alm"),
        (lambda p, c: sc.Regularised.drawn(0, 5, 0), "expected positive numbers, got 0"),
        (lambda p, c: sc.salt_and_pepper(p.data, 1.5, torch.Generator()), "share: expected a number in"),
        (lambda p, c: sc.Constrained(c.q, c.data, 3.0), "q: expected a tight frame"),
        (lambda p, c: sc.Constrained(c.q, c.data[:, :5], 2.0), "data: expected"),
        (lambda p, c: sc.aggregated(sc.regularised("hodl", p, 2), 1.0).map(p, *p.test()), "mu: expected"),
    ],
)
def test_bad_input_gets_one_sentence(wide, patches, call, words):
    with pytest.raises(ValueError, match=words) as failure:
        call(wide, patches)
    assert "\n" not in str(failure.value)


def test_the_operator_of_both_unknowns_is_adjoint(patches):
    op = sc.CodeAndNoise(patches.q)
    x, y = torch.randn(3, 36).double(), torch.randn(3, 12).double()
    assert torch.allclose((op.A(x) * y).sum(), (x * op.A_adjoint(y)).sum())
    assert torch.allclose(op.A(op.A_adjoint(y)), 3 * y) and isinstance(op, hodl.Operator)
