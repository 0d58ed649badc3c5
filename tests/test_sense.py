"""Compressive sensing: any size and number of channels, squares, measurements alone, what is refused, and the recipes."""

import json
from functools import partial

import pytest
import torch

from odlkit import data, weights
from odlkit.metrics import psnr
from odlkit.models.dgunet import Sensing
from odlkit.operators import BlockSampling
from odlkit.tasks.sense import MODELS, measure, network, recover, sense
from odlkit.training import dgunet, recipe
from odlkit.training.loop import save_weights

TINY = {"width": 8, "step": 4, "tail": 4, "stages": 3, "scales": 3, "fused": 2}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """A network of 10% whose weights nobody trained, in place of the shipped ones."""
    torch.manual_seed(0)
    net = Sensing(0.10, **TINY)
    about = {"network": {"kind": "sensing", **net.config}, "schedule": {}}
    save_weights(net, tmp_path / "dgunet-cs-10.safetensors", about)
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    return net.eval()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, (45, 70)), (3, (32, 33)), (1, (5, 3))])
def test_pictures_of_any_size_come_back_with_a_report(model, channels, size, untrained, report_keys):
    x = data.sample("astronaut", size, gray=channels == 1)
    restored, report = sense(x, 0.10, model, steps=3)
    assert restored.shape == x.shape and bool(restored.isfinite().all())
    blocks = [-(-side // 32) for side in size]
    assert set(report) >= report_keys and report["input"]["measurements"] == [channels, 103, *blocks]
    assert (
        "measured here" in report["notes"][0] and f"{channels * 103 * blocks[0] * blocks[1]} numbers" in report["notes"][0]
    )
    json.dumps(report)


def test_every_channel_is_recovered_by_itself_and_from_its_measurements_alone(untrained):
    x = torch.rand(2, 3, 64, 32, generator=seeded())
    y = measure(x, untrained.operator)
    assert y.shape == (6, 103, 2, 1)
    assert torch.allclose(y[4, :, 1, 0], untrained.phi @ x[1, 1, 32:].flatten(), atol=1e-5)
    for model in MODELS:
        assert torch.equal(sense(x, 0.10, model)[0], recover(y, 0.10, model)[0].view_as(x))
    with torch.no_grad():
        assert torch.allclose(sense(x, 0.10)[0], untrained(y)[-1].view_as(x), atol=1e-6)
    hidden = torch.linalg.svd(untrained.phi.double())[2][-1].view(32, 32).float()  # Phi does not see it
    seen = [sense(x + t * hidden.repeat(2, 1), 0.10)[0] for t in (0.0, 1.0)]
    assert torch.allclose(*seen, atol=1e-3)


def test_the_eightfold_mean_turns_with_the_picture_and_agrees_with_the_measurements(untrained):
    """Measured by ``A T^-1``, the picture T x comes back as T of what A gives of x: one network alone does not."""
    x = data.sample("camera", (64, 96))
    size, phi = 32, untrained.phi
    for model, same in (("dgunet-8", True), ("dgunet", False)):
        run = MODELS[model].run
        straight = run(untrained, untrained.operator.A(x), None, False).x
        untrained.phi = torch.nn.Parameter(torch.rot90(phi.view(-1, size, size), 1, (-2, -1)).reshape(phi.shape))
        turned = run(untrained, untrained.operator.A(torch.rot90(x, 1, (-2, -1))), None, False).x
        untrained.phi = phi
        assert torch.allclose(turned, torch.rot90(straight, 1, (-2, -1)), atol=1e-5) == same
        assert torch.allclose(untrained.operator.A(straight), untrained.operator.A(x), atol=1e-4) == same


@pytest.mark.parametrize("model", ["fista-wavelet", "fista-tv"])
def test_classical_recovery_lowers_its_energy_and_beats_its_start(model, untrained):
    x = data.sample("camera", 128)
    restored, report = sense(x, 0.10, model)
    operator = untrained.operator
    back = operator.A_adjoint(operator.A(x))  # the orthogonal projection, since the rows are orthonormal
    assert report["energies"][-1] < 0.5 * report["energies"][0]
    assert psnr(restored, x) > psnr(back, x) + 3


def test_squares_are_the_whole_where_no_block_sees_another(untrained):
    """A gradient step acts block by block, so squares must not change it; the codes of a block stay together."""
    x = data.sample("camera", (160, 192))
    for model in MODELS:
        assert sense(x, 0.10, model, tile=64, steps=2)[0].shape == x.shape
    for part in (untrained.net.first, *untrained.net.middle, untrained.net.last):  # only v = x - rho A^T (A x - y) is left
        for name in ("hourglass", "supervised", "tail", "shallow"):
            for p in getattr(part, name, torch.nn.Identity()).parameters():
                torch.nn.init.zeros_(p)
    save_weights(untrained, weights.FOLDER / "dgunet-cs-10.safetensors",
                 {"network": {"kind": "sensing", **untrained.config}, "schedule": {}})  # fmt: skip
    whole, squares = (sense(x, 0.10, tile=tile)[0] for tile in (None, 64))
    back = untrained.operator.A_adjoint(measure(x, untrained.operator))  # a fixed point, since the rows are orthonormal
    assert torch.allclose(whole, back, atol=1e-5) and torch.allclose(whole, squares, atol=1e-6)


def test_what_does_not_fit_is_refused(untrained):
    x = torch.rand(1, 1, 32, 32)
    with pytest.raises(ValueError, match="^ratio: expected one of 0.1, got 0.3"):
        sense(x, 0.3)
    with pytest.raises(ValueError, match="^model: expected one of dgunet"):
        sense(x, 0.10, "omp")
    with pytest.raises(ValueError, match="^input: expected a floating point tensor"):
        sense(x[0], 0.10)
    with pytest.raises(ValueError, match="^input: expected finite"):
        sense(x / 0, 0.10)
    with pytest.raises(ValueError, match="^tile: expected at least 32"):
        sense(x, 0.10, tile=16)
    with pytest.raises(ValueError, match=r"^y: expected measurements \(B, 103, h, w\)"):
        recover(torch.rand(1, 102, 2, 2), 0.10)


def test_errata_measurements_are_no_image_to_start_from(untrained):
    """DGUNet, Algorithm 1, has ``x^0 = y``."""
    y = measure(torch.rand(1, 1, 64, 32, generator=seeded()), untrained.operator)
    with torch.no_grad(), pytest.raises(ValueError, match="^y: expected images .* of 1 channels, got"):
        untrained.net(y, untrained.operator, x0=y)
    with torch.no_grad():
        same = untrained.net(y, untrained.operator, x0=untrained.operator.A_adjoint(y))
        assert torch.equal(same[-1], untrained(y)[-1])


def test_the_recipes_train_matrix_and_network_and_begin_from_others(tmp_path, monkeypatch):
    monkeypatch.setattr(dgunet, "pictures", lambda: ([torch.rand(1, 1, 180, 180, generator=seeded())],) * 2)
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    monkeypatch.setattr(dgunet, "sensing", partial(dgunet.sensing, steps=1, batch=1))
    recipe("dgunet-cs-10")(tmp_path, steps=1)
    recipe("dgunet-cs-4")(tmp_path, steps=1)
    first, later = weights.load("dgunet-cs-10"), weights.load("dgunet-cs-4")
    assert later.phi.shape == (41, 1024) and "began as that of dgunet-cs-10" in weights.card("dgunet-cs-4")["what"]
    card = weights.card("dgunet-cs-10")
    assert card["network"]["stages"] > weights.card("dgunet-cs-10-first")["network"]["stages"] and "with 5" in card["what"]
    gaps = [(a - b).abs().max().item() for a, b in zip(first.net.parameters(), later.net.parameters(), strict=True)]
    assert 0 < max(gaps) < 1e-3, "one step of warm-up from where the other network ended"
    assert network(0.04)[0].phi.shape == (41, 1024)


def test_the_recipe_at_the_papers_scale_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(dgunet, "pictures", lambda: ([torch.rand(1, 1, 180, 180, generator=seeded())],) * 2)
    monkeypatch.setattr(dgunet, "patches", lambda images, batch, side, g: torch.rand(2, 1, side, side, generator=g))
    recipe("dgunet-cs-10-paper")(tmp_path, steps=(1, 1))
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    net = weights.load("dgunet-cs-10-paper")
    assert net.net.setting.width == 32 and net.net.setting.stages == 7 and net.net.setting.sensing
    blocks = weights.load("dgunet-cs-10-paper-blocks")
    gap = (net.phi - blocks.phi).abs().max()
    assert 0 < gap < 1e-3 and isinstance(net.operator, BlockSampling), "the second run goes on from the first"
