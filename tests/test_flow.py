"""Optical flow: files, warping, measures, colours, the linearised data term, a warp's certificate, the task, training."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from odlkit import cli, data, images, weights
from odlkit.flow import (
    UNKNOWN,
    angular_error,
    colours,
    correlation,
    end_point_error,
    inside,
    outliers,
    read_flo,
    resized,
    warp,
    wheel,
    write_flo,
)
from odlkit.models.flow import (
    EdgeGradient,
    Level,
    Linearised,
    PrimalDual,
    Settings,
    correct,
    derivatives,
    estimate,
    median,
)
from odlkit.networks import FlowNet
from odlkit.priors import TV
from odlkit.problem import Problem
from odlkit.tasks.deblur_gdc import proposition_1
from odlkit.tasks.flow import MODELS, optical_flow
from odlkit.training import flow as training

NAMES = [name for name in MODELS if name in ("gdc-tv", "tvl1") or "gdc-flow" in weights.cards()]
SHIFT = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def pair(height: int = 60, width: int = 75, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Two crops of a photograph, so that the flow is `SHIFT` wherever both see the same."""
    x = data.sample("astronaut", (height + 8, width + 8), gray=channels == 1)
    dx, dy = int(SHIFT[0, 0]), int(SHIFT[0, 1])
    return x[..., 4 : 4 + height, 4 : 4 + width], x[..., 4 - dy : 4 - dy + height, 4 - dx : 4 - dx + width]


def term(seed: int = 0, channels: int = 3) -> Linearised:
    r, a = randn(1, channels, 5, 6, seed=seed), randn(1, 2, channels, 5, 6, seed=seed + 1)
    return Linearised(r, a, randn(1, 2, 5, 6, seed=seed + 2), randn(1, 1, 5, 6, seed=seed + 3).abs())


def test_a_file_comes_back_and_unknown_is_unknown(tmp_path):
    u = randn(1, 2, 7, 11).float()
    u[..., 2, 3] = torch.nan
    write_flo(tmp_path / "u.flo", u)
    blob = (tmp_path / "u.flo").read_bytes()
    assert blob[:4] == b"PIEH" and len(blob) == 12 + 8 * 77 and np.frombuffer(blob[4:12], "<i4").tolist() == [11, 7]
    assert abs(np.frombuffer(blob[12:], "<f4").reshape(7, 11, 2)[2, 3]).min() > UNKNOWN
    assert torch.equal(read_flo(tmp_path / "u.flo").nan_to_num(7), u.nan_to_num(7))


@pytest.mark.parametrize("cut", [0, 3, 20, -1])
def test_other_files_are_refused(tmp_path, cut):
    write_flo(tmp_path / "u.flo", torch.zeros(1, 2, 4, 4))
    blob = (tmp_path / "u.flo").read_bytes()
    (tmp_path / "u.flo").write_bytes(blob[:cut])
    with pytest.raises(ValueError, match="expected a .flo file"):
        read_flo(tmp_path / "u.flo")


def test_warping_by_whole_pixels_is_moving(device, dtype):
    x = randn(2, 3, 9, 12).to(device, dtype)
    moved = warp(x, SHIFT.to(x).expand(2, 2, 9, 12))
    assert moved.dtype == dtype and torch.allclose(moved[..., 1:, :-2], x[..., :-1, 2:], atol=1e-4)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_warping_is_differentiable_in_both_arguments(mode):
    x, u = randn(1, 2, 6, 7), 0.3 + 0.2 * randn(1, 2, 6, 7, seed=1)
    assert torch.autograd.gradcheck(lambda x, u: warp(x, u, mode)[..., 1:-2, 1:-2], (x.requires_grad_(), u.requires_grad_()))


def test_what_leaves_the_frame_is_known():
    seen = inside(SHIFT.expand(1, 2, 4, 6))
    assert seen[0, 0].tolist() == [[False] * 6] + [[True] * 4 + [False] * 2] * 3


def test_a_flow_on_another_grid_counts_other_pixels():
    assert torch.allclose(resized(SHIFT.expand(1, 2, 4, 6), (8, 18)), (SHIFT * torch.tensor([3, 2]).view(1, 2, 1, 1)))


def test_the_correlation_layer_by_its_definition():
    a, b = randn(1, 3, 5, 6), randn(1, 3, 5, 6, seed=1)
    found = correlation(a, b, 1)
    assert found.shape == (1, 9, 5, 6)
    for channel, (dy, dx) in enumerate((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
        y, x = 2 + dy, 3 + dx
        assert torch.allclose(found[0, channel, 2, 3], (a[0, :, 2, 3] * b[0, :, y, x]).sum())
    assert found[0, 0, 0, 0] == 0  # outside the frame


def test_measures_count_known_pixels_only():
    truth = torch.zeros(1, 2, 3, 4)
    truth[..., 0, 0] = torch.nan
    u = torch.zeros(1, 2, 3, 4)
    u[:, 0, 0], u[:, 1, 0] = 3.0, 4.0  # the first row, one pixel of which is unknown
    assert end_point_error(u, truth).item() == pytest.approx(5 * 3 / 11)
    assert outliers(u, truth).item() == pytest.approx(3 / 11)
    assert angular_error(u, truth).item() == pytest.approx(3 / 11 * np.rad2deg(np.arccos(1 / np.sqrt(26))))


def test_the_wheel_and_its_colours():
    """55 colours, the middle of the wheel white, opposite directions of other hue, unknown black."""
    table = wheel()
    assert table.shape == (55, 3) and table[0].tolist() == [1, 0, 0] and bool((table.amax(1) == 1).all())
    still = colours(torch.zeros(1, 2, 4, 4))
    assert still.min() == 1
    angles = torch.arange(0, 360, 10).deg2rad()
    ring = torch.stack([angles.cos(), angles.sin()])[None, :, None]
    seen = colours(ring, 1.0)
    assert seen.amin(1).max() < 0.01 and seen.amax(1).min() > 0.99  # full colours
    assert (seen - seen.roll(18, -1)).abs().sum(1).min() > 0.9
    half = colours(0.5 * ring, 1.0)
    assert torch.allclose(half, (1 + seen) / 2, atol=1e-5) and colours(3 * ring, 1.0).max() <= 0.75 + 1e-6
    right = colours(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))[0, :, 0, 0]
    assert right[0] > 0.99 and right[1:].max() < 0.1  # to the right is red
    assert colours(torch.full((1, 2, 2, 2), torch.nan)).max() == 0


def test_the_data_term_by_its_definition():
    """``sum w ||r + a (u - u_0)||^2``, its gradient by differentiation, its constants by the eigenvalues."""
    r, a, at, w = randn(1, 3, 5, 6), randn(1, 2, 3, 5, 6, seed=1), randn(1, 2, 5, 6, seed=2), randn(1, 1, 5, 6, seed=3).abs()
    f, u = term(), randn(1, 2, 5, 6, seed=9).requires_grad_()
    value = (w * (r + (a * (u - at)[:, :, None]).sum(1)).square()).sum()
    (slope,) = torch.autograd.grad(value, u)
    assert torch.allclose(f.value(u), value) and torch.allclose(f.grad(u), slope)
    hessian = 2 * torch.einsum("bihw,bjchw,bkchw->bhwjk", w, a, a)
    assert f.bounds[1] == pytest.approx(torch.linalg.eigvalsh(hessian).max().item()) and f.bounds[0] == 0


@pytest.mark.parametrize("step", [0.05, 3.0])
def test_its_prox_is_the_minimiser(step):
    f, z = term(), randn(1, 2, 5, 6, seed=9)
    u = f.prox(z, step)
    assert torch.allclose(f.grad(u) + (u - z) / step, torch.zeros_like(u), atol=1e-11)
    value = lambda v: f.value(v).item() + (v - z).square().sum().item() / (2 * step)  # noqa: E731
    assert all(value(u) < value(u + 1e-3 * randn(1, 2, 5, 6, seed=s)) for s in range(10, 20))


def test_its_prox_for_one_channel_is_the_paper_s_formula():
    r, a, at, z = randn(1, 1, 5, 6), randn(1, 2, 1, 5, 6, seed=1), randn(1, 2, 5, 6, seed=2), randn(1, 2, 5, 6, seed=3)
    f, t = Linearised(r, a, at, torch.ones_like(r)), 0.7
    slope = a[:, :, 0]
    formula = z - 2 * t * slope * (r + (slope * (z - at)).sum(1, keepdim=True)) / (1 + 2 * t * slope.square().sum(1, True))
    assert torch.allclose(f.prox(z, t), formula)


def test_differences_stop_at_the_border_and_have_an_adjoint():
    g = randn(1, 1, 5, 6).abs().clamp(max=1)
    d, u, q = EdgeGradient(g), randn(1, 2, 5, 6, seed=1), randn(1, 4, 5, 6, seed=2)
    assert torch.allclose((d.A(u) * q).sum(), (u * d.A_adjoint(q)).sum())
    assert d.A(torch.ones_like(u)).abs().max() == 0 and d.A(u)[:, :2, :, -1].abs().max() == 0
    assert torch.allclose(d.A(u)[:, 2:, 1, 2], g[:, :, 1, 2] * (u[:, :, 2, 2] - u[:, :, 1, 2]))


def test_derivatives_are_exact_for_cubics():
    x = torch.arange(9, dtype=torch.float64)
    across, down = derivatives((x**3 + 0 * x[:, None])[None, None])[0, :, 0]
    assert torch.allclose(across[:, 2:-2], 3 * x[2:-2] ** 2 + 0 * x[:, None]) and down.abs().max() < 1e-10


def test_a_median_removes_a_lonely_pixel_and_keeps_a_jump():
    u = torch.zeros(1, 2, 9, 9)
    u[..., 5:] = 3
    speck = u.clone()
    speck[..., 2, 2] = 9
    assert torch.equal(median(speck, 3), u) and median(u, 0) is u


def test_many_sweeps_reach_the_minimum_of_the_warp():
    """The primal-dual gap closes: the proposal minimises f + TV, whatever Algorithm 1 then makes of it."""
    f, tv = term(), TV(0.3, 1e-7, gradient=EdgeGradient(torch.ones(1, 1, 5, 6, dtype=torch.float64)))
    problem = Problem(f, tv)
    u = PrimalDual(400, 0.3)(problem, torch.zeros(1, 2, 5, 6, dtype=torch.float64), 0)
    assert problem.residual(u).item() < 1e-6
    rest = f.grad(u) + 0.3 * tv.gradient.A_adjoint(tv.dual)  # 0 in f'(u) + lam D^T q, q in the ball, <D u, q> = |D u|
    assert rest.abs().max() < 1e-6 and tv._gap(u, tv.dual, torch.tensor(0.3).double()).abs().item() < 1e-6


@pytest.fixture(scope="module")
def level() -> Level:
    return Level.of(*(frame.mean(1, keepdim=True) for frame in pair()), Settings())


@pytest.mark.parametrize("start", [0.0, 1.0, -3.0])
def test_every_warp_descends_as_proposition_1_says(level, start):
    """Eq: GDC Algorithm 1, Proposition 1."""
    run = correct(level, torch.full((1, 2, 60, 75), start))
    told = proposition_1(run)
    assert told["holds"] and told["margin"] > 0 and run.trace["accepted"].item() == 1
    assert run.trace["energy"].item() < run.trace.start["energy"].item()


def test_without_the_control_a_long_step_raises_the_energy(level):
    """Three gradient steps of 30 / L in one proposal: the control refuses what would be taken.  Eq: GDC Algorithm 1."""

    def long(problem, u, stage):
        for _ in range(3):
            u = u - problem.fidelity.grad(u) * (30 / problem.lipschitz)
        return u

    start = torch.zeros(1, 2, 60, 75)
    wild, tamed = (correct(level, start, checked, long) for checked in (False, True))
    assert not proposition_1(wild)["holds"] and wild.trace["energy"].item() > wild.trace.start["energy"].item()
    assert proposition_1(tamed)["holds"] and tamed.trace["accepted"].item() == 0
    assert tamed.trace["energy"].item() < tamed.trace.start["energy"].item()


def test_errata_the_energy_is_not_convex_and_its_linearisation_is(level):
    """On a segment between two flows the energy rises above its chord; the linearised one does not."""
    a, b = torch.zeros(1, 2, 60, 75), SHIFT.expand(1, 2, 60, 75)
    exact = Level(level.first, level.second, TV(0.0), Settings(data="l2"))
    linear = exact.linearise(a)
    above = {"energy": [], "linearised": []}
    for t in torch.linspace(0.1, 0.9, 9).tolist():
        for name, f in (("energy", exact.energy), ("linearised", linear.energy)):
            above[name].append((f(a.lerp(b, t)) - (1 - t) * f(a) - t * f(b)).item() / f(a).item())
    assert max(above["energy"]) > 0.01 and max(above["linearised"]) <= 1e-9


def test_errata_the_second_frame_is_the_one_to_warp():
    """With I_1 warped the true flow explains the first frame; with I_0 warped by the same flow nothing fits."""
    first, second = pair()
    u, inner = SHIFT.expand(1, 2, 60, 75), (..., slice(4, -4), slice(4, -4))
    right, wrong = (warp(second, u) - first)[inner], (warp(first, u) - second)[inner]
    assert right.abs().max() < 1e-4 and wrong.abs().mean() > 0.05


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_shift_is_found(model, channels, report_keys):
    first, second = pair(channels=channels)
    u, told = optical_flow(first, model, second=second)
    truth = SHIFT.expand(1, 2, 60, 75)[..., 4:-4, 4:-4]
    assert u.shape == (1, 2, 60, 75) and end_point_error(u[..., 4:-4, 4:-4], truth).item() < (
        0.6 if model == "network" else 0.1
    )
    assert report_keys <= set(told) and told["model"] == model
    json.dumps(told)
    if model.startswith("gdc"):
        assert told["certificate"]["holds"] is True and told["iterations"] == sum(row["warps"] for row in told["levels"])
    else:
        assert told["certificate"]["holds"] is None


@pytest.mark.parametrize("shape", [(3, 3), (5, 40), (17, 16)])
def test_any_size(shape):
    first = torch.rand(2, 3, *shape, generator=seeded())
    found = estimate(first, first, FlowNet().eval())
    assert found.flow.shape == (2, 2, *shape) and bool(found.flow.isfinite().all())


def test_the_reweighted_square_touches_the_robust_term_from_above(level):
    """Equal at the residual of the start, above it everywhere else; what leaves the frame apart."""
    at = torch.zeros(1, 2, 60, 75)
    f, r = level.linearise(at).fidelity, (level.second - level.first).double()
    robust = lambda v: (v.square().sum(1) + level.how.eps**2).sqrt().sum().item()  # noqa: E731
    assert f.value(at).item() == pytest.approx(robust(r), rel=1e-5)
    a = warp(derivatives(level.second).flatten(1, 2), at).view(1, 2, 3, 60, 75)
    a = a.lerp(derivatives(level.first), level.how.blend).double()
    for seed in range(5):
        d = 3 * randn(1, 2, 60, 75, seed=seed)
        assert f.value(d).item() > robust(r + (a * d[:, :, None]).sum(1))


def test_flat_frames_do_not_move():
    flat = torch.full((1, 3, 20, 24), 0.4)
    found = estimate(flat, flat)
    assert found.flow.abs().max() < 1e-4 and all(proposition_1(run)["holds"] for runs in found.runs for run in runs)


def test_each_item_of_a_batch_is_judged_by_itself():
    """A network whose move helps one item only: it is kept there and refused on the other."""

    class Move(torch.nn.Module):
        levels = 1

        def features(self, frame):
            return [frame[..., ::2, ::2]]

        def residual(self, first, second, flow):
            return flow + SHIFT / 2

    first, second = pair(64, 64)
    both = torch.cat([second, first])
    found = estimate(torch.cat([first, first]), both, Move(), Settings(warps=0), levels=2)
    assert [kept is None for kept in found.kept] == [False, True] and found.kept[0].tolist() == [True, False]
    assert end_point_error(found.flow, torch.cat([SHIFT, 0 * SHIFT]).expand(2, 2, 64, 64)).max() < 0.01


@pytest.mark.parametrize(
    "change, words",
    [
        ({"second": torch.zeros(1, 3, 60, 74)}, "second: expected a frame of the size of the input, 60x75, got 60x74"),
        ({"second": torch.full((1, 3, 60, 75), torch.nan)}, "second: expected finite"),
        ({"second": torch.zeros(1, 2, 60, 75)}, "second: expected floating point"),
        ({"model": "nobody"}, "model: expected one of"),
    ],
)
def test_bad_arguments_are_named(change, words):
    first, second = pair()
    with pytest.raises(ValueError, match=words):
        optical_flow(first, **{"second": second, "model": "gdc-tv"} | change)


def test_the_command_line_writes_colours_or_numbers(tmp_path):
    for name, frame in zip(("a.png", "b.png"), pair(), strict=True):
        images.write(tmp_path / name, frame, images.Picture(frame))
    images.write(tmp_path / "c.png", pair(40, 40)[0], images.Picture(pair()[0]))

    def restore(*words):
        return CliRunner().invoke(cli.main, ["restore", "flow", str(tmp_path / "a.png"), *words], prog_name="odlkit")

    last = ["--model", "gdc-tv", "--report", str(tmp_path / "r.json")]
    for out in ("u.png", "u.flo"):
        done = restore("--second", str(tmp_path / "b.png"), "-o", str(tmp_path / out), *last)
        assert done.exit_code == 0, done.stderr
    u = read_flo(tmp_path / "u.flo")
    assert (images.read(tmp_path / "u.png").x - colours(u)).abs().max() < 3 / 255
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["certificate"]["holds"] is True and told["output"]["path"].endswith("u.flo")
    missing, other = (
        restore("-o", str(tmp_path / "v.png")),
        restore("--second", str(tmp_path / "c.png"), "-o", str(tmp_path / "v.png")),
    )
    assert missing.exit_code == other.exit_code == 2 and not (tmp_path / "v.png").exists()
    assert (
        "second: expected an image, none was given" in missing.stderr
        and "second: expected a frame of the size" in other.stderr
    )


def test_scenes_are_what_their_flow_says():
    """Warping the second frame by the flow gives the first, where nothing is hidden; other motions do not."""
    sources = [data.sample(name, 200, gray=False).expand(-1, 3, -1, -1) for name in ("astronaut", "coffee", "chelsea")]
    first, second, u = training.scenes(sources, 2, 96, seeded(1), reach=5.0)
    assert first.shape == second.shape == (2, 3, 96, 96) and u.shape == (2, 2, 96, 96)
    right, wrong = ((warp(second, v) - first).abs().mean(1).flatten(1).median(1).values for v in (u, 0 * u))
    assert bool((right < 0.04).all()) and bool((right < 0.75 * wrong).all())


def test_the_backward_motion_is_inverted():
    """``u(x) = v(x + u(x))`` up to a hundredth of a pixel, away from the border."""
    back = training.motions(3, 80, 6.0, seeded(2))
    u = training.forward_of(back)
    assert (u - warp(back, u, "bilinear"))[..., 8:-8, 8:-8].abs().max() < 0.01


def test_training_lowers_the_error_and_writes_weights(tmp_path, monkeypatch):
    sources = [data.sample(name, 180, gray=False).expand(-1, 3, -1, -1) for name in ("astronaut", "coffee")]
    monkeypatch.setattr(training, "pictures", lambda: (sources, sources))
    monkeypatch.setattr(training, "BATCH", 2)
    monkeypatch.setattr(training, "SIDE", 64)
    monkeypatch.setattr(training, "scenes", partial(small, training.scenes))
    training.network(tmp_path, steps=2)
    card = json.loads((tmp_path / "gdc-flow.json").read_text())
    assert card["network"]["kind"] == "flow" and card["validation_end_point_error"] > 0


def small(scenes, sources, count, side, generator, reach=3.0):
    return scenes(sources, count, 64, generator, reach)
