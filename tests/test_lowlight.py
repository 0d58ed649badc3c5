"""Low light: the mixture's Lipschitz constant and its control, the fixed point, gradients, reports, refusals, training."""

import json

import pytest
import torch

from odlkit import data, weights
from odlkit.models.hodl_light import Illumination, coarse, radiance, smoothed
from odlkit.networks.lipschitz_cell import OPERATIONS, Branch, Cells, Mixture, certified, normalized
from odlkit.networks.nonexpansive import AveragedResidual
from odlkit.networks.normalize import local_norm
from odlkit.tasks.lowlight import MODELS, enhance, illumination

NAMES = [name for name in MODELS if name == "retinex" or "hodl-light" in weights.cards()]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_cell(seed: int = 0, width: int = 4) -> Mixture:
    """A mixture with random weights and a random alpha, every convolution of norm at most 1."""
    torch.manual_seed(seed)
    cell = Mixture(width)
    for part in cell.modules():
        if isinstance(part, Branch):
            torch.nn.init.normal_(part.conv.weight)
    with torch.no_grad():
        cell.alpha.normal_(std=2.0)
    return certified(normalized(cell)).double()


def dark(height: int = 37, width: int = 50, count: int = 2) -> torch.Tensor:
    """Dark pictures of different scenes."""
    scenes = [data.sample(name, (height, width), gray=False) for name in ("coffee", "chelsea")[:count]]
    return 0.15 * torch.cat(scenes) ** 1.3


@pytest.mark.parametrize("seed", range(4))
def test_a_mixture_is_nonexpansive_at_any_alpha_and_its_bound_covers_the_jacobian(seed):
    """Source: HODL Assumption 3.2, for the searched network."""
    cell = random_cell(seed)
    z, c = (torch.randn(1, 4, 12, 11, generator=seeded(i), dtype=torch.float64) for i in (seed, 9))
    assert cell.bound() <= 1
    for point in (z, z.abs() + 1, 5 * z):  # different parts of ReLU
        assert local_norm(lambda v: cell(v, c), point, 80) <= cell.bound() + 1e-12
    far = torch.randn(z.shape, generator=seeded(5), dtype=torch.float64)
    assert (cell(z, c) - cell(far, c)).norm() <= (z - far).norm()


def test_residuals_that_are_sums_are_not_nonexpansive():
    """The control: ``z + N(z)`` in place of the average."""
    torch.manual_seed(0)
    cell = certified(normalized(Mixture(4, ["residual 1x1", "residual 3x3"]))).double()
    z = torch.rand(1, 4, 12, 11, generator=seeded(), dtype=torch.float64) + 1
    assert local_norm(lambda v: cell(v, 0 * z), z, 80) <= 1

    def summed(v):
        shares = cell.alpha.softmax(0)
        return sum(share * (v + part.net(v, 0 * z)) for share, part in zip(shares, cell.branches, strict=True))

    assert all(isinstance(part, AveragedResidual) for part in cell.branches)
    assert local_norm(summed, z, 80) > 1.5


def test_training_holds_the_norms_and_certified_makes_them_sure():
    torch.manual_seed(0)
    net = normalized(Cells(4, [["conv 3x3"], ["dilated 3x3"]]))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    v, c = torch.rand(2, 1, 16, 16, generator=seeded()), torch.rand(2, 8, 16, 16, generator=seeded(1))
    for _ in range(20):
        optimiser.zero_grad()
        (net(v, c) - 3 * v).square().mean().backward()  # pulls the norms up
        optimiser.step()
    assert 0.8 < net.bound() < 1.1
    assert 0.8 < certified(net).bound() <= 1
    assert certified(net).half().float().bound() <= 1


def test_the_fixed_point_of_the_identity_is_phi_and_the_run_gets_there_at_the_stated_rate():
    """With ``D_net = I``: ``argmin ||u - phi||^2`` at the rate ``1 - 2 alpha gamma``.  Eq: HODL (3), Theorem 3.2."""
    net = Illumination(width=4, cells=[["skip"]]).double()
    y = dark().double()
    seen = net.given(y)
    T, start = net.map(seen)
    assert torch.equal(start, seen.phi) and torch.allclose(T(seen.phi, None, 0), seen.phi, atol=1e-15)
    u = torch.ones_like(start)
    rate = 1 - 2 * net.alpha * net.gamma
    assert net.rate() == pytest.approx(rate)
    for k in range(1, 8):
        before, u = u, T(u, None, k)
        inside = (before - seen.phi > 1e-3) & (u < 1) & (u > seen.floor)
        assert torch.allclose((u - seen.phi)[inside], rate * (before - seen.phi)[inside], atol=1e-12)


def untrained(seed: int = 0) -> Illumination:
    """A certified network with random weights that sees the picture."""
    torch.manual_seed(seed)
    net = Illumination(width=4, cells=[list(OPERATIONS), ["residual 3x3"]])
    torch.nn.init.normal_(net.look[-1].weight, std=0.1)
    normalized(net)
    return certified(net).double().eval().requires_grad_(False)


def test_the_fixed_point_is_one_from_every_start():
    """Eq: HODL Theorem 3.2, its hypothesis."""
    net, y = untrained(), dark().double()
    seen = net.given(y)
    T, start = net.map(seen)
    ends = []
    for u in (start, torch.ones_like(start), seen.floor, torch.rand(start.shape, generator=seeded(), dtype=torch.float64)):
        moves = []
        for k in range(60):
            new = T(u, None, k)
            moves.append((new - u).flatten(1).norm(dim=1))
            u = new
        assert (moves[20] <= net.rate() ** 20 * moves[0] + 1e-12).all()
        ends.append(u)
    assert max((end - ends[0]).abs().max().item() for end in ends) < 1e-9
    assert (ends[0] >= seen.floor).all() and ends[0].max() <= 1
    expanding = Illumination(width=4, cells=[["skip"]]).double()  # the control: gamma beyond the limit
    expanding.gamma = 1.2
    assert expanding.rate() > 1
    seen = expanding.given(y)
    D_num = lambda u: u - 2 * expanding.gamma * (u - seen.phi)  # noqa: E731
    assert (D_num(start) - D_num(start + 0.1)).norm() > 1.3 * (0.1 * torch.ones_like(start)).norm()


def test_the_hypergradient_through_the_iteration_equals_finite_differences():
    """sHODL through K steps, in float64.  Eq: HODL (5)."""
    net, y = untrained(1).requires_grad_(True), dark(24, 28).double()
    truth = coarse((y / 0.15).clamp(0, 1) ** (1 / 1.3), net.block)

    def loss() -> torch.Tensor:
        seen = net.given(y)
        T, u = net.map(seen)
        for k in range(3):
            u = T(u, None, k)
        return (seen.colours / u - truth).square().mean()

    mixture = net.net.mixtures[0]
    chosen = {
        "alpha": mixture.alpha,
        "conv": mixture.branches[1].conv.weight,
        "power": net.power,
        "look": net.look[0].weight,
    }
    gradients = torch.autograd.grad(loss(), list(chosen.values()))
    for (name, p), gradient in zip(chosen.items(), gradients, strict=True):
        direction = torch.randn(p.shape, generator=seeded(2), dtype=torch.float64)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                p += sign * 1e-6 * direction
                values.append(loss().item())
                p -= sign * 1e-6 * direction
        slope = (gradient * direction).sum().item()
        assert abs(slope) > 1e-8 and slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4), name


def test_retinex_is_undone_exactly_with_the_true_illumination():
    scene = torch.rand(2, 3, 9, 14, generator=seeded(), dtype=torch.float64)
    u = 0.1 + 0.9 * torch.rand(2, 1, 9, 14, generator=seeded(1), dtype=torch.float64)
    assert torch.allclose(radiance(scene * u, u), scene)
    flat = torch.full((2, 1, 3, 4), 0.25, dtype=torch.float64)  # a coarse constant stays constant between its points
    assert torch.allclose(radiance(0.25 * scene, flat, 4), scene)
    assert torch.isfinite(radiance(0 * scene, 0 * u)).all()


def test_the_smoothing_keeps_steps_and_removes_noise():
    step = torch.zeros(1, 1, 30, 40, dtype=torch.float64)
    step[..., 20:] = 1
    assert (smoothed(step, 4, 1e-3) - step).abs().max() < 0.05
    noise = 0.01 * torch.randn(1, 1, 30, 40, generator=seeded(), dtype=torch.float64)
    assert smoothed(noise, 4).std() < 0.3 * noise.std()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 3, 33, 47), (2, 1, 20, 31), (1, 3, 3, 5)])
def test_any_size_gray_or_colour_and_the_report_is_whole(name, shape, report_keys):
    y = 0.1 * torch.rand(shape, generator=seeded())
    x, told = enhance(y, name)
    assert x.shape == y.shape and x.dtype == y.dtype and x.min() >= 0 and x.max() <= 1 and x.mean() > 2 * y.mean()
    assert set(told) >= report_keys and len(told["illumination"]["mean"]) == shape[0]
    assert told["certificate"]["holds"] is (None if name == "retinex" else True)
    json.dumps(told)


@pytest.mark.parametrize("name", NAMES)
def test_each_picture_of_a_batch_is_treated_by_itself(name):
    y = dark(48, 48)
    assert torch.allclose(enhance(y, name)[0], torch.cat([enhance(item, name)[0] for item in y.split(1)]), atol=1e-4)


def test_bad_input_is_named():
    y = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match="model: expected one of hodl, hodl-denoised, retinex"):
        enhance(y, "magic")
    for wrong in (y[0], y[:, :2], (255 * y).to(torch.uint8)):
        with pytest.raises(ValueError, match="input: expected a floating point tensor"):
            enhance(wrong, "retinex")
    with pytest.raises(ValueError, match="input: expected finite numbers"):
        enhance(y * float("nan"), "retinex")
    with pytest.raises(ValueError, match="steps: expected None or a positive number"):
        enhance(y, "retinex", steps=0)
    with pytest.raises(ValueError, match=r"gamma: expected a number in \(0, 1/2\]"):
        Illumination(gamma=0.6)
    with pytest.raises(ValueError, match="names: expected operations among conv 1x1"):
        Mixture(4, ["conv 5x5"])


def test_the_certificate_fails_for_a_network_that_expands():
    """The control of the report: the same run with the convolutions scaled up."""
    net, y = untrained(), dark().double()
    assert illumination(net, y).certificate["holds"]
    for part in net.modules():
        if isinstance(part, Branch):
            part.conv.weight *= 4
    told = illumination(net, y, steps=6).certificate
    assert told["holds"] is False and told["contraction"] > 1
