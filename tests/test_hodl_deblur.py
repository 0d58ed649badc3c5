"""HODL's deconvolution: the network's bound, the map in its parts, its gradients, the recipes, the shipped networks."""

import copy
import json
from functools import partial

import pytest
import torch
from torch.nn.utils import parametrize

from odlkit import data, weights
from odlkit.bench.hodl_deblur import gradient, path
from odlkit.metrics import psnr
from odlkit.models.hodl_deblur import Deconvolution, Iteration, plugged
from odlkit.networks import UNet
from odlkit.networks.normalize import local_norm
from odlkit.networks.unet import as_identity, certified, convolutions, lipschitz, norm_bound, normalized
from odlkit.operators import Blur, Wavelet
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import propagate
from odlkit.tasks.deblur import deblur
from odlkit.tasks.deblur_hodl import NAMES, growth, iterated, krasnoselskii_mann
from odlkit.training import hodl as recipes
from odlkit.training import padnet, recipe
from odlkit.training.kernels import random_kernel
from odlkit.training.loop import save_weights

SMALL = {"widths": (4, 6, 8)}
WIDE = (4, 16, 64)  # room for the identity
installed = pytest.mark.skipif(not {*NAMES.values()} <= weights.cards().keys(), reason="HODL's networks are not installed")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(**options) -> Deconvolution:
    torch.manual_seed(0)
    return Deconvolution(SMALL, depth=2, **options).double().eval()


def constant(**options) -> Deconvolution:
    """One map from the first step, ``D_net = (I + N) / 2``."""
    return network(theta=0.5, start={"first": None, "last": 2.0}, **options)


def tight(seed: int = 0) -> UNet:
    """A certified network whose norms are all 1: at random initial values they would be far below."""
    torch.manual_seed(seed)
    return certified(normalized(UNet(**SMALL).double()))


def scene(size: int = 32):
    x = torch.rand(2, 1, size, size, generator=seeded(1), dtype=torch.float64)
    kernel = torch.rand(2, 1, 5, 5, generator=seeded(2), dtype=torch.float64)
    blur, sigma = Blur(kernel / kernel.sum((2, 3), keepdim=True)), torch.tensor([0.01, 0.03]).double().view(-1, 1, 1, 1)
    return x, blur, blur.A(x) + sigma * torch.randn(x.shape, generator=seeded(3), dtype=torch.float64), sigma


# The network.


@pytest.mark.parametrize("size", [(16, 24), (17, 31), (5, 8)])
def test_the_network_takes_every_size_and_a_level_for_each_picture(size, device, dtype):
    torch.manual_seed(0)
    net = UNet(**SMALL).to(device, dtype)
    v, alpha = torch.rand(2, 1, *size, device=device, dtype=dtype), torch.tensor([0.01, 0.2]).to(device, dtype)
    both = net(v, alpha.view(-1, 1, 1, 1))
    assert both.shape == v.shape and both.dtype == dtype and both.device.type == device.type
    alone = torch.cat([net(part, level) for part, level in zip(v.split(1), alpha.tolist(), strict=True)])
    assert torch.allclose(both, alone, atol=1e-5)
    assert not torch.allclose(net(v, 0.01), net(v, 0.2))


def test_a_block_and_a_skip_are_means():
    """With inner weights of 0 a block is half its input, and what does not come from below is half the skip."""
    net = UNet(**SMALL).double()
    for layer, _ in convolutions(net):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    z = torch.rand(1, 4, 8, 8, dtype=torch.float64)
    assert torch.allclose(net.encoders[0](z), z / 2) and torch.allclose(net.scale(z, 0), z / 8)


def dense(layer, channels: int, size: int) -> torch.Tensor:
    """The matrix of a layer on images of one size, column by column."""
    units = torch.eye(channels * size**2, dtype=torch.float64).view(-1, channels, size, size)
    with torch.no_grad():
        return (layer(units) - layer(torch.zeros_like(units[:1]))).flatten(1).T


def test_the_bound_of_a_layer_is_exact_where_blocks_do_not_overlap_and_no_less_elsewhere():
    torch.manual_seed(0)
    net = UNet(**SMALL).double()
    for layer in (net.downs[0], net.ups[1]):
        found = torch.linalg.matrix_norm(dense(layer, layer.in_channels, 6), 2).item()
        assert abs(found - norm_bound(layer)) < 1e-10
    for layer in (net.tail, net.encoders[1][0].first):
        found = torch.linalg.matrix_norm(dense(layer, layer.in_channels, 6), 2).item()
        assert found <= norm_bound(layer) <= 1.2 * found


@pytest.mark.parametrize("seed", [0, 1])
def test_the_bound_holds_and_the_certified_network_stays_below_one(seed):
    torch.manual_seed(seed)
    plain, net = UNet(**SMALL).double(), tight(seed)
    assert not any(parametrize.is_parametrized(m) for m in net.modules()) and 0.9 < lipschitz(net) <= 1
    assert all(norm_bound(layer, c) <= 1 for layer, c in convolutions(net))
    x = torch.rand(1, 1, 16, 16, generator=seeded(seed), dtype=torch.float64)
    for one in (plain, net):
        slope = local_norm(lambda v, one=one: one(v, 0.05), x)
        assert slope <= lipschitz(one)
    net.head.weight.data *= 30  # control: what the bound is made of can be broken, and the function with it
    assert lipschitz(net) > 1 and local_norm(lambda v: net(v, 0.05), x) > 1


def test_training_keeps_every_norm_at_one():
    torch.manual_seed(0)
    net = normalized(UNet(**SMALL).double())
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for i in range(20):
        v = torch.rand(2, 1, 16, 16, generator=seeded(i), dtype=torch.float64)
        optimiser.zero_grad()
        (net(v, 0.05) - 2 * v).square().mean().backward()
        optimiser.step()
    norms = [norm_bound(layer, channels) for layer, channels in convolutions(net.eval())]
    assert min(norms) > 0.95 and max(norms) < 1.1 and lipschitz(certified(net)) <= 1


# The map.


def test_eq_3_is_the_network_then_proximal_gradient_on_the_envelope_then_the_average():
    """Every part written out; the envelope's gradient by differentiating its value.  Eq: HODL (3), Table 2."""
    _, blur, b, sigma = scene()
    net, W = network(start={"kappa": 30.0}), Wavelet("haar", 3)
    kappa = 30 * sigma.square()

    def envelope(v, rho):
        """``min_w ||Q w - b||^2 + (rho/2) ||w - v||^2``."""
        w = LeastSquares(blur, b, 2.0).prox(v, 1 / rho)
        return ((blur.A(w) - b).square() + rho / 2 * (w - v).square()).sum()

    def D_num(v, rho):
        v = v.detach().requires_grad_()
        (slope,) = torch.autograd.grad(envelope(v, rho), v)
        c = W.A(v - slope / rho)
        shrunk = torch.sign(c) * (c.abs() - kappa / rho).clamp_min(0)
        shrunk[..., :4, :4] = c[..., :4, :4]
        return W.A_adjoint(shrunk)

    T, u = net.map(blur, b, sigma)
    assert (u - D_num(b, 0.5 * (sigma / 0.2).square())).abs().max() < 1e-12  # rho_0, trust being 1/4
    for k, t in ((0, 0.5), (1, 1.0), (5, 1.0)):  # of depth 2: from there on one map
        s = [0.2 ** (1 - r) * sigma**r for r in (min(k / 2, 1), t)]
        expected = u + 0.95 * (D_num(u - s[0] * net.unit(u, s[0]), 0.5 * (sigma / s[1]).square()) - u)
        assert (T(u, None, k) - expected).abs().max() < 1e-12


def test_without_the_envelope_it_is_the_papers_proximal_gradient_and_lowers_its_energy():
    _, blur, b, _ = scene()
    u = gradient(network(start={"kappa": 0.05 / 0.02**2}), blur, b, 0.02, 5)
    W = Wavelet("haar", 3)
    energy = [
        ((blur.A(x) - b).square().sum() + 0.05 * (W.A(x).abs().sum() - W.A(x)[..., :4, :4].abs().sum())).item() for x in u
    ]
    assert all(after < before for before, after in zip(energy, energy[1:], strict=False))
    assert len(u) == 6


def test_the_hypergradient_is_that_of_differences():
    """Through two steps and the read-out, in the numbers and in a weight, float64."""
    x, blur, b, sigma = scene(16)
    net = network()

    def loss(values: dict) -> torch.Tensor:
        one = copy.deepcopy(net)
        named = dict(one.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                named[name].copy_(value)
        level = [named[name] for name in values]
        T, u = one.map(blur, b, sigma)
        for k in range(one.depth):
            u = T(u, None, k)
        value = (one.denoise(u, sigma, one.depth) - x).square().sum()
        return value, torch.autograd.grad(value, level)

    names = ("factors.level", "factors.rho", "factors.kappa", "unit.tail.weight")
    start = {name: dict(net.named_parameters())[name].detach().clone() for name in names}
    _, slopes = loss(start)
    for i, name in enumerate(names):
        direction = torch.randn(start[name].shape, generator=seeded(7), dtype=torch.float64)
        up, down = ({**start, name: start[name] + sign * 1e-6 * direction} for sign in (1, -1))
        difference = (loss(up)[0] - loss(down)[0]).item() / 2e-6
        assert abs(difference - (slopes[i] * direction).sum().item()) <= 1e-5 * max(1, abs(difference))


def test_a_certified_network_makes_the_map_non_expansive_and_a_steep_one_does_not():
    """Assumption 3.2 on random pairs and along the steepest direction at a point."""
    _, blur, b, sigma = scene()
    net = constant(alpha=1.0)
    net.unit = tight()
    for unit_scale, holds in ((1.0, True), (40.0, False)):
        net.unit.head.weight.data *= unit_scale
        T, _ = net.map(blur, b, sigma)
        at = lambda v, T=T: T(v, None, 0)  # noqa: E731
        assert (local_norm(at, b, 30) <= 1 + 1e-9) == holds
        p, q = b, b + 0.01 * torch.randn(b.shape, generator=seeded(4), dtype=torch.float64)
        assert (at(p) - at(q)).norm() <= (p - q).norm() or not holds


def test_the_path_of_the_benchmark_is_the_iteration_of_the_task():
    _, blur, b, _ = scene()
    net = network()
    x, result = iterated(net, b, blur, 0.02, 4)
    found = path(net, blur, b, 0.02, 4)
    assert len(found) == 5
    assert torch.allclose(found[-1][0], result.x) and torch.allclose(found[-1][1], x)


def test_plug_and_play_is_the_same_map_with_the_denoisers_weights():
    torch.manual_seed(0)
    unit = UNet(**SMALL).double()
    net = plugged(unit, first=None, last=3.0, trust=0.5)
    sigma = torch.tensor([0.01, 0.05]).double().view(-1, 1, 1, 1)
    s, rho = net.plan(sigma, 4)
    assert torch.allclose(s, 3 * sigma) and torch.allclose(rho, torch.full_like(rho, 1 / 9))
    u = torch.rand(2, 1, 16, 16, dtype=torch.float64)
    assert torch.equal(net.denoise(u, sigma, 4), u - s * unit(u, s)) and not net.training


def test_moves_that_grow_fail_the_certificate():
    _, blur, b, _ = scene()
    net = constant()
    net.unit = tight()
    good = iterated(net, b, blur, 0.02, 6)[1]
    told = krasnoselskii_mann(good, 0.99)
    assert told["holds"] and told["margin"] >= 0 and told["largest_ratio_of_moves"] <= 1 + 1e-9
    assert not krasnoselskii_mann(good, 1.01)["holds"]  # a bound above 1 is no guarantee, whatever the run did
    blown = propagate(Iteration(lambda u, params, k: 2 * u), Problem(LeastSquares(blur, b)), b, steps=4)
    assert growth(blown) > 1 and not krasnoselskii_mann(blown, 0.99)["holds"]
    still = propagate(Iteration(lambda u, params, k: u + 1e-9 * 2.0**k), Problem(LeastSquares(blur, b)), b, steps=4)
    assert growth(still) == 0  # moves of the size of round-off
    once = iterated(net, b, blur, 0.02, 1)[1]
    assert krasnoselskii_mann(once, 0.99)["holds"] and growth(once) == 0


@pytest.mark.parametrize("argument, options", [("theta", {"theta": 1.5}), ("start", {"start": {"tau": (1.0, 0.0)}})])
def test_bad_arguments_are_named(argument, options):
    with pytest.raises(ValueError, match=f"^{argument}: expected .*, got "):
        Deconvolution(SMALL, **options)
    _, blur, b, sigma = scene()
    with pytest.raises(ValueError, match="^alpha: expected a number in"):
        T, u = network(alpha=1.5).map(blur, b, sigma)
        T(u, None, 0)
    with pytest.raises(ValueError, match="^widths: expected at least"):
        as_identity(UNet(**SMALL))


def test_the_bounded_network_begins_as_the_identity():
    torch.manual_seed(0)
    net = as_identity(UNet(widths=WIDE).double(), offset=9.0)
    v = torch.rand(2, 1, 16, 24, generator=seeded(), dtype=torch.float64)
    assert (net(v, 0.1) - v).abs().max() < 1e-12
    assert all(abs(norm_bound(layer, c, 64) - 1) < 5e-3 for layer, c in convolutions(net))


# Recipes and files.


def test_saved_networks_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    net = network(theta=0.5).float()
    save_weights(net, tmp_path / "tiny.safetensors", {"network": {"kind": "deconvolution", **net.config}, "schedule": {}})
    back = weights.load("tiny")
    assert isinstance(back, Deconvolution) and back.depth == 2 and back.theta == 0.5 and not back.training
    b, blur = torch.rand(1, 1, 16, 16), Blur(torch.ones(3, 3) / 9)
    sigma = torch.full((1, 1, 1, 1), 0.02)
    (T, u), (same, start) = net.map(blur, b, sigma), back.map(blur, b, sigma)
    assert torch.equal(u, start) and torch.equal(T(u, None, 0), same(u, None, 0))


def test_the_recipes_run_resume_and_say_what_they_made(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "WIDTHS", WIDE)
    for module in (recipes, padnet):
        monkeypatch.setattr(module, "pictures", lambda: ([torch.rand(1, 1, 180, 180, generator=seeded())],) * 2)
    monkeypatch.setattr(recipes, "denoiser", partial(recipes.denoiser, steps=1))
    recipe("hodl-deblur")(tmp_path, steps=2, slow=(4, 1))  # trains the denoiser first
    recipe("hodl-deblur-nonexpansive")(tmp_path, steps=2)
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    for name in NAMES.values():
        card = weights.card(name)
        assert card["steps"] == 2 and "train400" in card["data"] and card["recipe"] == f"odlkit train {name}"
        stored = lipschitz(weights.load(name).unit)
        assert abs(stored - card["lipschitz_bound"]) <= 1e-6 * stored
    assert card["lipschitz_bound"] <= 1
    file = tmp_path / "hodl-deblur.safetensors"
    before = file.read_bytes()
    recipe("hodl-deblur")(tmp_path, resume=True, steps=2, slow=(4, 1))
    assert file.read_bytes() == before and weights.load("hodl-denoiser").units[0].config["widths"] == list(WIDE)


# The shipped networks.


@installed
def test_the_shipped_bound_is_recomputed_and_at_most_one():
    name = NAMES["hodl-nonexpansive"]
    found = lipschitz(weights.load(name).unit)
    assert 0.9 < found <= 1 and abs(found - weights.card(name)["lipschitz_bound"]) < 1e-6


def blurred(name: str, seed: int, sigma: float, size: int = 128):
    x, kernel = data.sample(name, size), random_kernel(seeded(seed), size=21)
    blur = Blur(kernel)
    return x, kernel, blur.A(x) + sigma * torch.randn(x.shape, generator=seeded(seed))


@installed
@pytest.mark.parametrize("name, seed, sigma", [("camera", 10, 0.01), ("coffee", 11, 0.03), ("astronaut", 12, 0.01)])
def test_trained_through_the_iteration_it_beats_the_same_network_plugged_in(name, seed, sigma):
    x, kernel, b = blurred(name, seed, sigma)
    unit = weights.load("hodl-denoiser").units[0]
    found = {m: psnr(deblur(b, kernel, sigma, m, "circular")[0], x).item() for m in NAMES}
    pnp = [plugged(unit, last=last, trust=trust) for last in (1.0, 1.4) for trust in (0.25, 0.5)]
    best = max(psnr(path(net, Blur(kernel), b, sigma, net.depth)[-1][1], x).item() for net in pnp)
    assert found["hodl"] > best + 0.1
    assert found["hodl"] > psnr(b, x).item() + 3.5 and found["hodl-nonexpansive"] > psnr(b, x).item() + 1


@installed
def test_ten_times_the_depth_of_training_the_bounded_network_still_contracts():
    """Assumption 3.2 along a long run in double precision: no move is longer than the one before."""
    x, kernel, b = blurred("camera", 10, 0.01)
    net = weights.load(NAMES["hodl-nonexpansive"]).double()
    long, run = iterated(net, b.double(), Blur(kernel.double()), 0.01, 10 * net.depth)
    assert growth(run) <= 1 + 1e-9 and run.residual < 1e-3
    short, _ = iterated(net, b.double(), Blur(kernel.double()), 0.01)
    assert abs(psnr(long, x.double()) - psnr(short, x.double())) < 1


@installed
def test_the_reports_say_what_is_guaranteed(report_keys):
    _, kernel, b = blurred("camera", 10, 0.01, 96)
    for model, holds in (("hodl", None), ("hodl-nonexpansive", True)):
        x, told = deblur(b, kernel, 0.01, model)
        assert told.keys() >= report_keys and x.shape == b.shape and told["certificate"]["holds"] is holds
        assert told["iterations"] == weights.load(NAMES[model]).depth and told["energies"] == []
        json.dumps(told, allow_nan=False)
    assert told["certificate"]["lipschitz_bound"] <= 1 and told["certificate"]["margin"] >= 0


@installed
def test_a_bad_noise_level_is_refused():
    _, kernel, b = blurred("camera", 10, 0.01, 64)
    with pytest.raises(ValueError, match="^sigma: expected"):
        deblur(b, kernel, 1.5, "hodl")
