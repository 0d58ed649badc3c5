"""DGUNet: the released counts of parameters, the gradient step in closed form, any size, the same numbers every way."""

import pytest
import torch

from odlkit.bench.dgunet_ablation import VARIANTS, built, one
from odlkit.models.dgunet import SETTINGS, DGUNet, GradientStep, LearnedMap, Sensing, Setting
from odlkit.networks.hourglass import Fusion, Projection
from odlkit.operators import Blur, Mask
from odlkit.training.dgunet import all_stages

SMALL = {"width": 8, "step": 4, "tail": 4, "stages": 4}
RELEASED = {  # trained parameters, as counted from the released definitions: without the dead ones and with few PReLU
    "derain": 3_633_112,
    "derain+": 12_176_107,
    "deblur": 17_216_312,
    "deblur+": 69_572_915,
    "denoise": 17_216_312,
    "denoise+": 48_361_987,
    "sensing": 2_336_565 - 256 * 1024,  # without the matrix
    "sensing+": 6_833_917 - 256 * 1024,
}


def small(setting="derain", **changes):
    torch.manual_seed(0)
    return DGUNet(setting, **(SMALL | changes)).eval()


def kernel():
    k = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return k / k.sum()


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_are_those_of_the_released_models(name):
    with torch.device("meta"):
        net = DGUNet(name)
    total = sum(p.numel() for p in net.parameters())
    slopes = sum(m.num_parameters for m in net.modules() if isinstance(m, torch.nn.PReLU))
    assert 0 <= total - RELEASED[name] < slopes, "the released models share slopes between modules"


@pytest.mark.parametrize("name", ["derain", "derain+", "text"])
def test_every_parameter_gets_a_gradient(name):
    net = small(name, width=16, scales=3, fused=2).train()
    all_stages(net(torch.rand(1, 3, 16, 16)), torch.rand(1, 3, 16, 16)).backward()
    dead = [key for key, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not dead, dead


def test_the_known_gradient_step_is_the_proximal_gradient_step_without_a_prior():
    """Eq: DGUNet (6)."""
    blur, x = Blur(kernel()), torch.rand(2, 1, 16, 16, dtype=torch.float64)
    y = blur.A(torch.rand(2, 1, 16, 16, dtype=torch.float64))
    step = GradientStep(1, known=True).double()
    z = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad((blur.A(z) - y).square().sum() / 2, z)
    assert torch.allclose(step(x, y, blur), x - 0.5 * slope, atol=1e-12)


@pytest.mark.parametrize(("factor", "grows"), [(1.9, False), (2.1, True)])
def test_a_step_beyond_two_over_the_norm_is_the_control(factor, grows):
    blur = Blur(kernel())
    x = torch.ones(1, 1, 16, 16, dtype=torch.float64)  # the eigenvector of the largest eigenvalue, 1
    step = GradientStep(1, known=True).double()
    with torch.no_grad():
        step.rho.fill_(factor / blur.eigenvalue_range(x)[1])
        for _ in range(60):
            x = step(x, torch.zeros_like(x), blur)
    assert (x.norm() > 16 * 10) == grows and (x.norm() < 16) == (not grows)


def test_errata_the_prox_of_a_step_has_the_weight_times_the_step():
    """A = y = 1, J = |.|, lambda = 0.2, rho = 0.5: (5b) with prox_lambda stops at 0.6, with prox_(rho lambda) at 0.8."""
    ends = []
    for weight in (0.2, 0.5 * 0.2):
        x = 0.0
        for _ in range(200):
            v = x - 0.5 * (x - 1)
            x = max(v - weight, 0.0)
        ends.append(x)
    assert ends == pytest.approx([0.6, 0.8], abs=1e-12)
    grid = torch.linspace(0, 1, 100001, dtype=torch.float64)
    assert grid[((grid - 1).square() / 2 + 0.2 * grid).argmin()].item() == pytest.approx(0.8, abs=1e-5)


@pytest.mark.parametrize("size", [(37, 45), (8, 9), (40, 40)])
@pytest.mark.parametrize("name", ["derain", "text"])
def test_any_size_goes_through(name, size):
    net, y = small(name), torch.rand(2, 3, *size)
    with torch.no_grad():
        images = net(y)
        assert len(images) == SMALL["stages"] and all(image.shape == y.shape for image in images)
        padded = torch.nn.functional.pad(y, (0, -size[1] % 8, 0, -size[0] % 8), mode="replicate")
        block = 1 << (net.setting.scales - 1)
        if not any(s % block for s in padded.shape[-2:]):
            assert torch.allclose(net(padded)[-1][..., : size[0], : size[1]], images[-1], atol=1e-5) or block < 8


@pytest.mark.parametrize("operator", [Blur(kernel().float()), Mask((torch.rand(1, 1, 24, 16) > 0.3).float())])
def test_every_operator_can_be_the_known_one(operator):
    """Eq: DGUNet (9), Algorithm 1."""
    net = small(channels=1, known=True)
    y = operator.A(torch.rand(2, 1, 24, 16))
    images = net(y, operator)
    assert images[-1].shape == (2, 1, 24, 16)
    images[-1].square().mean().backward()
    assert net.first.gradient.rho.grad is not None and net.first.gradient.A is None
    assert len(net(y, operator, stages=9)) == 9  # a shared stage can be repeated


def test_checkpoints_change_no_gradient():
    y, x = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    gradients = []
    for checkpoint in (False, True):
        net = small().train()
        net.checkpoint = checkpoint
        all_stages(net(y), x).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(*gradients)


def test_bfloat16_agrees():
    net, y = small(), torch.rand(1, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = net(y)[-1].float()
    with torch.no_grad():
        assert (net(y)[-1] - rough).abs().max() < 0.05


def test_projection_is_the_orthogonal_one_where_the_maps_are_independent():
    torch.manual_seed(0)
    merge = Projection(4, rank=3, ridge=0.0).double()
    x, g = torch.randn(2, 4, 6, 6, dtype=torch.float64), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    p = merge.project(x, g)
    v = merge.basis(torch.cat([x, g], dim=1)).flatten(2)
    assert torch.allclose(v @ (g - p).flatten(2).mT, torch.zeros(2, 3, 4, dtype=torch.float64), atol=1e-10)
    again = torch.linalg.lstsq(v.mT, p.flatten(2).mT).solution
    assert torch.allclose(v.mT @ again, p.flatten(2).mT, atol=1e-10)  # it lies in the span


def test_fusion_as_the_text_has_it():
    """Eq: DGUNet (8)."""
    torch.manual_seed(0)
    fuse = Fusion(4, 3, text=True)
    f, e, d = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5), torch.randn(1, 3, 5, 5)
    h = fuse.e(e) + fuse.d(d)
    assert torch.equal(fuse(f, e, d), f * fuse.alpha(h) + fuse.beta(h))


def test_learned_maps_are_no_adjoints():
    """Eq: DGUNet (7)."""
    torch.manual_seed(0)
    a, b = LearnedMap(1).double(), LearnedMap(1).double()
    x, y = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64)
    zero = torch.zeros_like(x)
    left = ((a(x) - a(zero)) * y).sum()
    right = (x * (b(y) - b(zero))).sum()
    assert (left - right).abs() > 1e-3 * left.abs()


def test_sensing_starts_with_orthonormal_rows_and_trains_its_matrix():
    torch.manual_seed(0)
    net = Sensing(0.1, size=8, width=8, step=4, tail=4, stages=3, scales=3, fused=2)
    assert net.phi.shape == (7, 64) and torch.allclose(net.phi @ net.phi.T, torch.eye(7), atol=1e-5)
    x = torch.rand(1, 1, 16, 24)
    images = net(net.operator.A(x))
    assert images[-1].shape == x.shape
    all_stages(images, x).backward()
    assert bool(net.phi.grad.abs().sum() > 0)


def test_the_loss_counts_every_stage():
    """Eq: DGUNet (10), as a mean."""
    x, images = torch.zeros(2, 1, 3, 3), [torch.full((2, 1, 3, 3), v) for v in (1.0, 2.0)]
    assert all_stages(images, x).item() == pytest.approx(2.5)


@pytest.mark.parametrize("setting", ["derain", "text"])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (9, 13)])
def test_every_size_works_and_its_start_counts(setting, size):
    net = small(setting)
    y = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same, other = net(y, x0=y), net(y, x0=torch.zeros_like(y))
        assert all(image.shape == y.shape and bool(image.isfinite().all()) for image in other)
        assert all(torch.equal(a, b) for a, b in zip(net(y), same, strict=True))
        assert all(not torch.allclose(a, b) for a, b in zip(same, other, strict=True))


def test_the_released_last_stage_adds_to_the_data_wherever_the_start_was():
    net = small()
    torch.nn.init.zeros_(net.last.tail.weight)
    y = torch.rand(1, 3, 16, 16)
    assert torch.equal(net(y, x0=torch.zeros_like(y))[-1], y)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="^setting: expected one of derain"):
        DGUNet("rain")
    with pytest.raises(ValueError, match="^stages: expected at least 2"):
        Setting(stages=1)
    with pytest.raises(ValueError, match="^stages: expected 2 of a network without a middle"):
        small(stages=2)(torch.rand(1, 3, 8, 8), stages=3)
    with pytest.raises(ValueError, match="^fused: expected 0 to 3"):
        Setting(fused=4)
    with pytest.raises(ValueError, match="^operator: expected none"):
        small()(torch.rand(1, 3, 8, 8), Blur(kernel().float()))
    with pytest.raises(ValueError, match="^operator: expected one"):
        small(known=True)(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="^y: expected an image of sides that are multiples of 8"):
        small(channels=1, known=True)(torch.rand(1, 1, 9, 8), Blur(kernel().float()))
    with pytest.raises(ValueError, match="^ratio: expected a share"):
        Sensing(1.5)
    with pytest.raises(ValueError, match=r"^y: expected images \(B, C, H, W\) of 3 channels, got \(1, 1, 8, 8\)"):
        small()(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"^y: expected images .* of 3 channels, got \(3, 8, 8\)"):
        small()(torch.rand(3, 8, 8))
    sensing = Sensing(0.1, size=8, **SMALL)
    for shape in [(1, 8, 2, 2), (1, 14, 2, 2), (7, 2, 2), (1, 7, 0, 2), (1, 1, 16, 16)]:
        with pytest.raises(ValueError, match=r"^y: expected measurements \(B, 7, h, w\), 7 of each block, got"):
            sensing(torch.rand(shape))
    assert set(RELEASED) == set(SETTINGS) - {"text"}


@pytest.mark.parametrize("name", VARIANTS)
def test_an_ablation_leaves_a_network_that_learns_with_all_it_has(name):
    """Each removes parameters, but the loss, which removes none."""
    torch.manual_seed(0)
    net, full = built(name), built("full")
    all_stages(net(torch.rand(1, 1, 32, 32)), torch.rand(1, 1, 32, 32)).backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None]
    more = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in full.parameters())
    assert more <= 0 and (more == 0) == (name in ("full", "loss on the last stage"))


def test_a_recorded_ablation_goes_on_from_its_checkpoint(tmp_path):
    x = [torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))]
    first = one("3 stages", 0, tmp_path, x, x[0], x[0], steps=2)
    stamp = (tmp_path / "3-stages-0.pt").read_bytes()
    assert one("3 stages", 0, tmp_path, x, x[0], x[0], steps=2)["psnr"] == first["psnr"]
    assert (tmp_path / "3-stages-0.pt").read_bytes() == stamp
