"""GDC's classifier, its joint cascade and its recipes: scales, gradients against differences, exact resumption, loading."""

import json

import pytest
import torch

from odlkit import weights
from odlkit.metrics import psnr
from odlkit.models.gdc import Discriminative
from odlkit.models.gdc_joint import CascadeNet
from odlkit.networks import Classifier
from odlkit.operators import Blur, Mask
from odlkit.training import RECIPES, recipe
from odlkit.training import gdc as recipes
from odlkit.training.loop import fit, log_error, save_weights
from odlkit.training.masks import missing_at_random, random_mask, text

SMALL = {"width": 6, "depth": 3}
GRAY = {"unit": SMALL, "classifier": {"widths": [4, 6]}, "stages": 3}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(scheme: str = "GDC", **options) -> CascadeNet:
    torch.manual_seed(0)
    config = {"scheme": scheme, **GRAY, **options}
    if "D" not in scheme:
        config["classifier"] = None
    return CascadeNet(**config)


def scene(size: int = 24, count: int = 2):
    x = torch.rand(count, 1, size, size, generator=seeded(1), dtype=torch.float64)
    kernel = torch.rand(count, 1, 5, 5, generator=seeded(2), dtype=torch.float64)
    sigma = torch.tensor([0.02, 0.06], dtype=torch.float64)[:count].view(-1, 1, 1, 1)
    return x, kernel / kernel.sum((2, 3), keepdim=True), sigma


def test_a_step_of_the_classifier_is_in_units_of_the_noise_level_and_the_same_at_every_size(device):
    """Noise of level alpha: the direction's root mean square over alpha is one number, up to the border of small images."""
    torch.manual_seed(0)
    net = Classifier().to(device)
    found = []
    for size in [(17, 24), (33, 47), (128, 128)]:
        for alpha in (0.01, 0.02):
            u = 0.5 + alpha * torch.randn(2, 1, *size, generator=seeded())
            move = Discriminative(net.potential, lambda stage, alpha=alpha: alpha).direction(u.to(device), 0)
            found.append(move.square().mean().sqrt().item() / alpha)
    assert max(found) < 1.5 * min(found), found


def test_the_logit_is_one_number_an_item_and_does_not_see_brightness(device):
    net, picture = Classifier().to(device), torch.rand(2, 1, 33, 47, generator=seeded()).to(device)
    assert net(picture, 0.05).shape == (2,)
    assert torch.allclose(net(picture + 0.2, 0.05), net(picture, 0.05), atol=1e-3)


def test_every_channel_is_judged_by_itself(device):
    net, picture = Classifier([4, 4]).to(device), torch.rand(2, 3, 20, 20, generator=seeded()).to(device)
    single = torch.stack([net(picture[:, c : c + 1], 0.1) for c in range(3)]).mean(0)
    assert torch.allclose(net(picture, 0.1), single, atol=1e-6)


def test_the_gradient_of_the_classifier_does_not_jump():
    """Softplus: differences of the gradient shrink with the distance (with ReLU they would not)."""
    net = Classifier().double()
    u = torch.rand(1, 1, 32, 32, generator=seeded(), dtype=torch.float64)
    v = torch.randn(u.shape, generator=seeded(1), dtype=torch.float64)
    module = Discriminative(net.potential, lambda stage: 0.05)
    ratios = [
        ((module.direction(u + h * v, 0) - module.direction(u, 0)).norm() / (h * v.norm())).item()
        for h in (1e-2, 1e-4, 1e-6)
    ]
    assert max(ratios) < 5 * min(ratios)


@pytest.mark.parametrize("scheme", ["GM", "GD", "GC", "GDC"])
def test_the_joint_loss_has_the_gradient_of_its_differences(scheme):
    """In float64, through data step, G, the double derivative of D, and the proximal step; every parameter takes part."""
    net = network(scheme).double().eval()
    x, kernel, sigma = scene()

    def loss() -> torch.Tensor:
        return log_error(recipes.deblurred(net, x, kernel, sigma, seeded(3)), x)

    loss().backward()
    generator = seeded(4)
    for name, parameter in net.named_parameters():
        if parameter.grad is None:
            assert name == "classifier.layers.4.bias"  # a constant in the logit has no gradient
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = (parameter.grad * direction).sum().item()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * direction
                values.append(loss().item())
                parameter -= sign * 1e-6 * direction
        assert slope != 0
        assert abs(slope - (values[0] - values[1]) / 2e-6) < 1e-4 * abs(slope) + 1e-7, name


def test_without_the_double_derivative_the_gradient_would_be_wrong(monkeypatch):
    net = network("GD").double().eval()
    x, kernel, sigma = scene()
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *words, create_graph: grad(*words))
    log_error(recipes.deblurred(net, x, kernel, sigma, seeded(3)), x).backward()
    assert all(p.grad is None for p in net.classifier.parameters())


def test_the_interpolating_cascade_has_the_gradient_of_its_differences():
    net = network("GDC", unit={**SMALL, "channels": 4}, guided=True, last=0.005, p=0.8).double().eval()
    x = torch.rand(1, 3, 16, 16, generator=seeded(1), dtype=torch.float64)
    mask = missing_at_random(0.5, 16, 16, seeded(2)).double()
    parameters = list(net.parameters())
    loss = lambda: log_error(recipes.interpolated(net, x, mask), x)  # noqa: E731
    slopes = torch.autograd.grad(loss(), parameters, allow_unused=True)
    directions = [torch.randn(p.shape, generator=seeded(3), dtype=torch.float64) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(slopes, directions, strict=True) if g is not None).item()
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(parameters, directions, strict=True):
                p += sign * 1e-7 * d
            values.append(loss().item())
            for p, d in zip(parameters, directions, strict=True):
                p -= sign * 1e-7 * d
    assert abs(slope - (values[0] - values[1]) / 2e-7) < 1e-3 * abs(slope)
    assert torch.equal(recipes.interpolated(net, x, mask)[-1] * mask, x * mask)


def test_an_untrained_cascade_has_the_numbers_that_the_docstring_says():
    net, sigma = network("GC"), torch.full((1, 1, 1, 1), 0.05)
    data_step, generative, correction = net.modules_for(sigma)
    assert [round(generative.levels(t).item(), 4) for t in range(3)] == [0.2, 0.1, 0.05]
    assert [round(data_step.penalty(t).item(), 4) for t in range(3)] == [0.125, 0.5, 2]
    assert correction.penalty(0) == 20
    assert len(network("GM").modules_for(sigma)) == 2 and len(network().modules_for(sigma)) == 4


def test_a_cascade_interrupted_in_training_resumes_bit_by_bit(tmp_path):
    x, kernel, sigma = (t.float() for t in scene())

    class Stop(Exception):
        pass

    def run(folder, stop=99, resume=False):
        net, calls = network().train(), 0

        def loss(generator):
            nonlocal calls
            calls += 1
            if calls > stop:
                raise Stop
            return log_error(recipes.deblurred(net, x, kernel, sigma, generator), x)

        fit(net, loss, steps=6, lr=1e-3, out=folder, name="n", warmup=2, save_every=2, resume=resume)
        return net

    whole = run(tmp_path / "a")
    with pytest.raises(Stop):
        run(tmp_path / "b", stop=3)
    again = run(tmp_path / "b", resume=True)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_cascades_and_classifiers_load_from_their_cards(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    net = network()
    save_weights(
        net, tmp_path / "c.safetensors", {"network": {"kind": "cascade", **net.config}, "schedule": {}}, torch.float16
    )
    small = Classifier([4, 6])
    save_weights(small, tmp_path / "d.safetensors", {"network": {"kind": "classifier", **small.config}, "schedule": {}})
    loaded = weights.load("c")
    assert loaded.config == json.loads(json.dumps(net.config)) and not loaded.training
    assert all((v - loaded.state_dict()[k]).abs().max() < 1e-3 for k, v in net.state_dict().items())
    u = torch.rand(1, 1, 16, 16)
    assert torch.equal(weights.load("d")(u, 0.1), small(u, 0.1))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="^scheme: expected GM, GD, GC or GDC"):
        network("CM")
    with pytest.raises(ValueError, match="^classifier: expected one exactly where"):
        CascadeNet("GD", SMALL)
    with pytest.raises(ValueError, match="^guide: expected none"):
        network("GM").modules_for(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 8, 8))
    for name in [n for n in RECIPES if n.startswith("gdc-")]:
        assert callable(recipe(name))


def test_masks_have_the_share_that_is_asked_for_and_letters():
    mask = missing_at_random(0.8, 200, 200, seeded())
    assert mask.shape == (1, 1, 200, 200) and abs(mask.mean() - 0.2) < 0.01
    page = text(96, 120, seeded())
    assert set(page.unique().tolist()) == {0, 1} and 0.02 < 1 - page.mean() < 0.6
    shares = torch.tensor([random_mask(64, 64, seeded(i)).mean() for i in range(40)])
    assert shares.min() < 0.3 and shares.max() > 0.8
    assert torch.equal(random_mask(32, 32, seeded(7)), random_mask(32, 32, seeded(7)))


@pytest.mark.skipif("gdc-classifier" not in weights.cards(), reason="the network gdc-classifier is not installed")
def test_the_trained_classifier_tells_noised_from_clean_and_its_step_denoises():
    from odlkit import data

    net, card = weights.load("gdc-classifier"), weights.card("gdc-classifier")
    for alpha in (0.02, 0.1):
        x = torch.cat([data.sample(name, 128) for name in ("camera", "chelsea", "coffee")])
        y = x + alpha * torch.randn(x.shape, generator=seeded())
        assert (net(y, alpha) > net(x, alpha)).all()
        move = Discriminative(net.potential, lambda stage, alpha=alpha: alpha, card["schedule"]["step"])
        with torch.no_grad():
            assert (psnr(move(None, y, 0), x) > psnr(y, x)).all()


def test_the_energy_of_a_cascade_has_a_prior_only_where_the_scheme_corrects():
    x, kernel, sigma = scene()
    assert network("GD").double().problem(Blur(kernel), x, sigma).prior is None
    problem = network("GC").double().problem(Mask(torch.ones(1, 1, 24, 24)), x, sigma)
    assert problem.prior is not None and problem.energy(torch.full_like(x, 0.5)).shape == (2,)
