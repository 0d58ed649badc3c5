"""Adversarial learning: the generator's gradient against differences, penalties, the ring, coverage, the record."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import softplus

from odlkit.training import gan

DOUBLE = torch.float64


def draws(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def small(seeds=(0, 1)) -> tuple[gan.Stack, gan.Stack, gan.Batch]:
    """Generators, discriminators and a batch of seven, in float64."""
    by = draws(*seeds)
    g, d = gan.network(by, gan.LATENT, 2, DOUBLE), gan.network(by, 2, 1, DOUBLE)
    batch = gan.Batch(gan.ring(by, 7, DOUBLE), gan.normal(by, 7, gan.LATENT, dtype=DOUBLE), [2 * p for p in d])
    return d, g, batch


def phi(method: gan.Method, d: gan.Stack, g: gan.Stack, batch: gan.Batch, rate: float) -> float:
    """The generator's loss after K plain gradient steps of the discriminator, without the engine."""
    for _ in range(method.look):
        d = [p.detach().requires_grad_() for p in d]
        slopes = torch.autograd.grad(method.loss(d, g, batch), d)
        d = [p - rate * s for p, s in zip(d, slopes, strict=True)]
    return method.upper(gan.apply(d, gan.apply(g, batch.z))).item()


@pytest.mark.parametrize("name", ["VGAN", "WGAN", "ProxGAN", "HODL"])
def test_the_generators_gradient_is_the_finite_difference_of_its_loss(name):
    method, rate, h = gan.METHODS[name], 0.3, 3e-3
    d, g, batch = small()
    found = gan.generator_gradient(method, d, g, batch, rate)
    for seed in range(3):
        along = [torch.randn(p.shape, generator=draws(seed)[0], dtype=DOUBLE) for p in g]
        length = sum(v.square().sum() for v in along).sqrt()
        along = [v / length for v in along]
        at = lambda t: phi(method, d, [p + t * v for p, v in zip(g, along, strict=True)], batch, rate)  # noqa: B023, E731
        slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)  # to fourth order
        mine = sum((a * v).sum() for a, v in zip(found, along, strict=True)).item()
        assert abs(mine - slope) < 1e-7 * abs(mine)


def test_without_inner_steps_it_is_vanillas_and_with_them_it_is_not():
    d, g, batch = small()
    hodl, leaves = gan.METHODS["HODL"], [p.clone().requires_grad_() for p in g]
    loss = softplus(-gan.apply(d, gan.apply(leaves, batch.z))).mean((1, 2)).sum()
    plain = torch.autograd.grad(loss, leaves)
    none = gan.generator_gradient(dataclasses.replace(hodl, look=0), d, g, batch)
    vanilla = gan.generator_gradient(gan.METHODS["VGAN"], d, g, batch)
    for a, b, c in zip(plain, none, vanilla, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=0) and torch.equal(b, c)
    through = gan.generator_gradient(hodl, d, g, batch, 0.3)
    first = gan.generator_gradient(gan.METHODS["HODL, first order"], d, g, batch, 0.3)
    for other in (plain, first):  # the control: both the steps and the gradient through them count
        off = sum((a - b).square().sum() for a, b in zip(through, other, strict=True)).sqrt()
        assert off > 1e-2 * sum(a.square().sum() for a in through).sqrt()


def test_a_seed_is_trained_as_if_it_were_alone():
    both, alone = (gan.train(gan.METHODS["HODL"], seeds, steps=5, batch=16).generator for seeds in ((3, 4), (4,)))
    for a, b in zip(both, alone, strict=True):
        assert torch.allclose(a[1:], b, atol=1e-5) and not torch.allclose(a[:1], b, atol=1e-3)


def test_penalties_are_squared_slopes():
    """By central differences at every point."""
    d, g, batch = small((0,))
    points = torch.cat([batch.x, gan.apply(g, batch.z)], 1)
    h = 1e-5

    def slopes(function, at):
        ends = [(function(at + h * e) - function(at - h * e)) / (2 * h) for e in torch.eye(2, dtype=DOUBLE)]
        return torch.cat(ends, -1).square().sum(-1).mean()

    plain = gan.logistic(d, g, batch)
    near = lambda p: gan.apply(d, p) - gan.apply(batch.anchor, p)  # noqa: E731
    for loss, weight, expected in (
        (gan.proximal, 0.7, 0.7 * slopes(near, points)),
        (gan.penalised, 0.7, 0.35 * slopes(lambda p: gan.apply(d, p), batch.x)),
    ):
        assert torch.allclose(loss(d, g, batch, weight) - plain, expected, rtol=1e-6)
    same = dataclasses.replace(batch, anchor=d)
    assert torch.allclose(gan.proximal(d, g, same, 5.0), plain, atol=1e-12)  # no pull at the anchor itself


def test_wgans_critics_stay_clipped_and_another_optimiser_is_refused():
    done = gan.train(gan.METHODS["WGAN"], (0, 1), steps=3, batch=8)
    assert max(p.abs().max() for p in done.discriminator) <= 0.1
    with pytest.raises(ValueError, match="optimiser: expected 'adam' or 'sgd', got 'lbfgs'"):
        gan.train(gan.METHODS["VGAN"], (0,), steps=1, optimiser="lbfgs")


def test_the_ring_has_eight_gaussians_and_coverage_counts_them():
    x = gan.ring(draws(0, 1), 4000)
    modes, fraction = gan.coverage(x)
    assert modes.tolist() == [8, 8]
    assert torch.allclose(fraction, torch.full((2,), 1 - math.exp(-4.5)), atol=5e-3)  # within 3 sigma, in the plane
    assert torch.allclose(x.square().sum(-1).mean(1), torch.full((2,), 4 + 2 * 0.05**2), atol=0.02)
    three = gan.centres(x)[[0, 0, 3, 6]].repeat(25, 1)[None]
    assert gan.coverage(three)[0].item() == 3 and gan.coverage(three)[1].item() == 1
    few = torch.cat([three, gan.centres(x)[None, [1] * 19]], 1)
    assert gan.coverage(few)[0].item() == 3 and gan.coverage(few, least=19)[0].item() == 4
    assert [v.item() for v in gan.coverage(0 * three)] == [0, 0]


def test_points_are_kept_at_the_asked_steps():
    done = gan.train(gan.METHODS["VGAN"], (0,), steps=4, batch=8, look_at=(0, 4))
    assert set(done.frames) == {0, 4} and done.frames[0].shape == (1, 500, 2)
    assert not torch.equal(done.frames[0], done.frames[4])
    again = gan.train(gan.METHODS["VGAN"], (0,), steps=4, batch=8)
    assert all(torch.equal(a, b) for a, b in zip(done.generator, again.generator, strict=True))


def test_the_record_says_what_was_asked():
    """HODL finds all eight modes on nine of ten seeds at least, and every method has the same ten in the same run."""
    record = json.loads((Path(__file__).parents[1] / "book" / "results" / "gan-ring.json").read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in record["rows"] if row["optimiser"] == "Adam"}
    assert set(rows) == set(gan.METHODS) and record["seeds"] == list(range(10))
    assert all(len(row["modes"]) == 10 for row in record["rows"])
    assert sum(m == 8 for m in rows["HODL"]["modes"]) >= 9
