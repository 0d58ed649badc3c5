"""Data hyper-cleaning: the draw, the hypergradient of each method on this very problem, the loop, F1, the idx files."""

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odlkit import data
from odlkit.bench import hyper_cleaning as bench
from odlkit.bilevel import hypergradient
from odlkit.training.cleaning import Cleaning, Samples, cg, clean, corrupt, draw, f1, hodl, ns, rhg, trhg, weighted

STEPS = 12
gen = lambda seed=0: torch.Generator().manual_seed(seed)  # noqa: E731


def toy(sizes: tuple[int, int, int] = (24, 15, 6), ridge: float = 0.05) -> Cleaning:
    """Three Gaussian classes in five dimensions, float64."""
    y = torch.arange(sum(sizes) + 30) % 3
    x = torch.randn(len(y), 5, generator=gen(), dtype=torch.float64)
    x[:, :3] += 3 * torch.eye(3)[y]
    return replace(draw(Samples(x, y), None, sizes, 1, 0.1), ridge=ridge)


def steps_of(p: Cleaning, w: Tensor, u: Tensor, steps: int, length: float) -> Tensor:
    """Plain gradient steps, by the closed form of the gradient and not by the library."""
    x, onehot = p.train.x, torch.nn.functional.one_hot(p.train.y, 3).double()
    for _ in range(steps):
        error = torch.sigmoid(w)[:, None] * ((x @ u.T).softmax(1) - onehot) / len(x)
        u = u - length * (error.T @ x + p.ridge * u)
    return u


def differences(function, w: Tensor, h: float = 1e-5) -> Tensor:
    """Central finite differences of a scalar."""
    return torch.stack([(function(w + h * e) - function(w - h * e)) / (2 * h) for e in torch.eye(len(w)).to(w)])


@pytest.fixture(scope="module")
def problem():
    return toy()


@pytest.fixture(scope="module")
def w():
    return torch.randn(24, generator=gen(3), dtype=torch.float64)


def of(problem: Cleaning, method, w: Tensor, steps: int = STEPS, start: Tensor | None = None):
    step, way = method(problem)
    return hypergradient(step, problem.upper, w, problem.start if start is None else start, steps=steps, way=way)


def off(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def length(p: Cleaning) -> float:
    return 1.8 / p.lipschitz


def exact(p: Cleaning, w: Tensor, u: Tensor) -> Tensor:
    """The implicit gradient at ``u`` with a dense Hessian: ``-(d2 lower / dw du) H^-1 d upper / du``."""
    flat = u.flatten()
    H = torch.func.hessian(lambda v: p.lower(v.view_as(u), w))(flat)
    b = torch.func.grad(lambda v: p.upper(v.view_as(u), w))(flat)
    mixed = torch.func.jacrev(lambda v: torch.func.grad(lambda z: p.lower(z.view_as(u), v))(flat))(w)
    return -mixed.T @ torch.linalg.solve(H, b)


# The hypergradients.


def test_reverse_mode_is_exact_for_its_steps(problem, w):
    """RHG, and sHODL, which is the same map: equality, not an improvement."""
    reference = differences(lambda v: problem.upper(steps_of(problem, v, problem.start, STEPS, length(problem)), v), w)
    full = of(problem, rhg, w)
    assert torch.allclose(full.state, steps_of(problem, w, problem.start, STEPS, length(problem)), atol=1e-12)
    assert off(full.gradient, reference) < 1e-8
    assert off(of(problem, hodl(), w).gradient, full.gradient) < 1e-12
    assert off(of(problem, hodl(alpha=0.5), w).gradient, reference) > 1e-2  # another length of the steps


def test_truncated_is_exact_from_the_step_it_begins_with_and_misses_the_rest(problem, w):
    full, errors = of(problem, rhg, w).gradient, []
    for window in (3, 6, STEPS):
        middle = steps_of(problem, w, problem.start, STEPS - window, length(problem))
        reference = differences(lambda v: problem.upper(steps_of(problem, v, middle, window, length(problem)), v), w)  # noqa: B023
        found = of(problem, trhg(window), w).gradient
        assert off(found, reference) < 1e-8
        errors.append(off(found, full))
    assert 0.1 < errors[0] < 0.9 and errors[1] < 0.7 * errors[0] and errors[2] < 1e-12


def test_implicit_ways_are_as_exact_as_their_residuals(problem, w):
    """At the minimiser, against a dense solve: the error is at most the condition number times the residual."""
    u = steps_of(problem, w, problem.start, 2000, length(problem))
    reference = exact(problem, w, u)
    condition = problem.lipschitz / problem.ridge
    for method, few in ((cg, (2, 5)), (ns, (5, 20))):
        found = [of(problem, method(n), w, 0, u) for n in (*few, 200)]
        errors = [off(r.gradient, reference) for r in found]
        assert all(e <= condition * r.adjoint_residual + 1e-9 for e, r in zip(errors, found, strict=True))
        assert errors[0] > errors[1] > 1e-6 and errors[2] < 1e-8


def test_so_many_terms_of_the_series_are_so_many_truncated_steps(problem, w):
    """At a fixed point NS and TRHG are one method, and RHG from there with many steps is exact."""
    u = steps_of(problem, w, problem.start, 2000, length(problem))
    for n in (3, 12):
        assert off(of(problem, ns(n), w, n, u).gradient, of(problem, trhg(n), w, n, u).gradient) < 1e-6
    assert off(of(problem, rhg, w, 400).gradient, exact(problem, w, u)) < 1e-6
    assert off(of(problem, rhg, w, 4).gradient, exact(problem, w, u)) > 0.05


def test_aggregation_is_differentiated_with_its_steps_on_the_upper_loss(problem, w):
    """aHODL written out, with the paper's s_k = s / (k + 1), by finite differences."""
    mu, x = 0.3, problem.clean.x
    s = 0.99 / (torch.linalg.matrix_norm(x, 2) ** 2 / len(x) / 2)

    def value(v):
        u = problem.start
        for k in range(1, STEPS + 1):
            onehot = torch.nn.functional.one_hot(problem.clean.y, 3).double()
            slope = ((x @ u.T).softmax(1) - onehot).T @ x / len(x)
            new = steps_of(problem, v, u, 1, length(problem))
            u = mu * (u - s / (k + 1) * slope) + (1 - mu) * new
        return problem.upper(u, v)

    found = of(problem, hodl(mu), w)
    assert found.value.item() == pytest.approx(value(w).item(), rel=1e-12)
    assert off(found.gradient, differences(value, w)) < 1e-7
    assert off(found.gradient, of(problem, rhg, w).gradient) > 1e-2


# The problem, the loop, the score.


@pytest.mark.parametrize("n", [40, 41])
def test_half_of_the_labels_are_wrong_and_no_wrong_one_is_right(n):
    y = torch.arange(n) % 10
    given, wrong = corrupt(y, 10, gen())
    assert wrong.sum() == n // 2 and torch.equal(given != y, wrong)
    assert given.min() >= 0 and given.max() < 10
    assert torch.equal(given, corrupt(y, 10, gen())[0]) and not torch.equal(given, corrupt(y, 10, gen(1))[0])
    many = corrupt(torch.zeros(20000, dtype=torch.long), 10, gen())[0].bincount(minlength=10)
    assert many[0] == 10000 and (many[1:] - 10000 / 9).abs().max() < 150  # all others alike


def test_parts_are_disjoint_and_the_lower_gradient_is_lipschitz_with_the_constant_that_is_told(problem):
    x = torch.arange(75.0, dtype=torch.float64)[:, None].repeat(1, 2) + torch.randn(
        75, 2, generator=gen(), dtype=torch.float64
    )
    p = draw(Samples(x, torch.arange(75) % 3), None, (24, 15, 6), 0, 0.1)
    rows = torch.cat([part.x for part in (p.train, p.clean, p.held, p.test)])
    assert len(rows) == 75 == len(rows.unique(dim=0)) and len(p.test.y) == 30
    assert p.train.x[:, :-1].mean(0).abs().max() < 1e-12
    assert torch.linalg.matrix_norm(p.train.x, 2) ** 2 / 24 <= 1 + 1e-12
    for seed in range(3):
        u = torch.randn(3, 6, generator=gen(seed), dtype=torch.float64)
        H = torch.func.hessian(lambda v: problem.lower(v.view(3, 6), torch.full((24,), 9.0).double()))(u.flatten())
        assert torch.linalg.eigvalsh(H)[-1] <= problem.lipschitz and torch.linalg.eigvalsh(H)[0] >= problem.ridge - 1e-12
    with pytest.raises(ValueError, match=r"sizes: expected at most 75 samples in all, got \(70, 5, 1\)"):
        draw(Samples(x, torch.arange(75) % 3), None, (70, 5, 1), 0, 0.1)


@pytest.mark.parametrize("method", [rhg, trhg(6), cg(10), ns(10), hodl(), hodl(0.1)])
def test_every_method_lowers_the_loss_and_finds_the_wrong_labels(method):
    p = toy((60, 60, 6), 0.01)
    r = clean(p, method, 20, 15, 0.4)
    assert len(r.loss) == len(r.seconds) == len(r.states) == 16 and r.loss[-1] < 0.9 * r.loss[0]
    assert f1(r.w, p.wrong) > 0.8 and r.seconds == sorted(r.seconds)
    assert p.upper(r.u, r.w).item() == pytest.approx(r.loss[-1]) and torch.equal(r.u, r.states[-1])
    if method is rhg:
        assert torch.allclose(r.u, weighted(p, r.w, 20))
        assert p.test.accuracy(r.u) > p.test.accuracy(weighted(p, torch.zeros(60).double(), 20))


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    w = torch.tensor([-1.0, -2.0, -3.0, 1.0, 2.0])  # flagged: the first three
    wrong = torch.tensor([True, True, False, True, False])
    precision, recall = 2 / 3, 2 / 3
    assert f1(w, wrong) == pytest.approx(2 * precision * recall / (precision + recall))
    assert f1(torch.ones(5), wrong) == 0 and f1(torch.where(wrong, -1.0, 1.0), wrong) == 1
    assert f1(-torch.ones(5), wrong) == pytest.approx(2 * 0.6 / 1.6)
    assert f1(torch.zeros(2), torch.tensor([False, False])) == 0


def test_the_record_chooses_on_held_out_samples_and_says_whether_the_bar_is_met(monkeypatch):
    """On small draws of the digits, a setting that does nothing beside one that cleans."""
    monkeypatch.setattr(bench, "SIZES", {"digits": (300, 200, 200)})
    monkeypatch.setattr("odlkit.training.cleaning.SIZES", {"digits": (300, 200, 200)})
    monkeypatch.setattr(bench, "SEEDS", (0, 1))
    monkeypatch.setattr(
        bench, "SETTINGS", {name: {"idle": (m, 0.0), "on": (m, 0.4)} for name, m in (("NS", ns(5)), ("HODL", rhg))}
    )
    monkeypatch.setitem(bench.PAPER, "mnist", {"NS": None, "HODL": None})
    monkeypatch.setattr(bench, "memory_modes", list)
    record = bench.run()
    rows = {r["method"]: r for r in record["rows"]}
    assert all(rows[name][key] == "on" for name in ("NS", "HODL") for key in ("setting", "setting_for_f1"))
    assert all(row["f1"] == row["best_f1"] and row["accuracy"] == row["accuracy_there"] for row in list(rows.values())[:2])
    assert rows["no cleaning"]["accuracy"][0] < rows["HODL"]["accuracy"][0]
    assert len(record["curves"]["digits, NS"]["accuracy"]) == bench.OUTER + 1
    for key in ("accuracy", "f1"):
        case, mean = record["hodl_and_the_best"]["digits"][key], {name: rows[name][key] for name in ("NS", "HODL")}
        assert mean[case["best"]][0] == max(m for m, _ in mean.values())
        assert case["hodl_below_it"] == pytest.approx(mean[case["best"]][0] - mean["HODL"][0], abs=0.011)
        assert case["met"] == (case["hodl_below_it"] <= case["spread_of_the_best"])
        assert record[f"hodl_within_one_standard_deviation_of_the_best_{key}"] == case["met"]


def test_less_memory_is_less_memory():
    """In fresh processes, on MNIST where it is here; the same hypergradient, see test_bilevel."""
    if "mnist" not in data.available() or not Path("/proc/self/clear_refs").exists():
        pytest.skip("MNIST is not here, or memory cannot be watched")
    full, rebuilt = (bench.fresh(f"probe(MODES[{mode!r}], 400)")[0] for mode in ("full", "rebuilt"))
    assert full > 30 and rebuilt < 0.2 * full  # 400 graphs of 0.19 MiB against 400 classifiers of 8 KiB


def test_where_memory_cannot_be_watched_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(bench, "fresh", lambda call: [])
    assert bench.memory_modes() == []


# The files.


def test_idx_files_are_read_and_others_refused(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, *range(6)])))
    assert data.idx(path).tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_bytes(gzip.compress(bytes([0, 0, 13, 1, 0, 0, 0, 1, 0, 0, 0, 0])))
    with pytest.raises(ValueError, match=r"path: expected an idx file of bytes, got a.gz, which begins with 00000d"):
        data.idx(path)


def test_digits_and_the_larger_sets_have_their_labels():
    ((x, y),) = data.labelled("digits")
    assert x.shape == (1797, 1, 8, 8) and x.min() == 0 and x.max() == 1 and set(y.tolist()) == set(range(10))
    for name in {"mnist", "fashion_mnist"} & set(data.available()):
        (x, y), (x_test, y_test) = data.labelled(name)
        assert x.shape[1:] == x_test.shape[1:] == (1, 28, 28) and len(x) == len(y) and len(x_test) == len(y_test) == 10000
        assert y_test.bincount().min() > 800 and 0.2 < x.mean() / x.std() < 1
        guess = torch.stack([x[y == c].mean(0) for c in range(10)])  # labels belong to their pictures: nearest mean
        assert (torch.cdist(x_test.flatten(1), guess.flatten(1)).argmin(1) == y_test).double().mean() > 0.6
