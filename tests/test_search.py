"""Architecture search for rain: Algorithm 2 with cells, resuming, what is compared, the task's model and its certificate."""

import json

import pytest
import torch

from odlkit import weights
from odlkit.models.gdc_rain import RainNet
from odlkit.networks.cells import HAND_MADE
from odlkit.propagate import propagate
from odlkit.tasks.derain_gdc import proposition_2, restored
from odlkit.training import search

trained = pytest.mark.skipif("gdc-derain" not in weights.cards(), reason="the network gdc-derain is not installed")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(scale: float = 0.05, **options) -> RainNet:
    """A small network with weights away from zero."""
    torch.manual_seed(0)
    net = RainNet(HAND_MADE, HAND_MADE, width=4, cells=(1, 1), **options).double().requires_grad_(False)
    for p in net.parameters():
        p += scale * torch.randn_like(p)
    return net


def test_the_stages_are_algorithm_2():
    """Eq: GDC Algorithm 2."""
    net, y = network(), torch.rand(2, 3, 12, 10, generator=seeded(), dtype=torch.float64)
    u, gammas = y, (16.0, 64.0)
    for found, gamma in zip(net(y), gammas, strict=True):
        level = 16 / gamma
        v = net.G(u, level).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(net.d(v, level).sum(), v)
        r = v.detach() - slope - u
        norm = r.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        radius = 0.3 * (360 * 16 / gamma) ** 0.5
        u_d = u + r * (radius / norm).clamp(max=1)
        u_c = (2 * y + gamma * u_d) / (2 + gamma)  # argmin ||u - y||^2 + (gamma / 2) ||u - u_d||^2
        u = torch.where((2 * (u_c - y)).flatten(1).norm(dim=1).view(-1, 1, 1, 1) <= 0.8 * 360**0.5, u_c, u)
        assert torch.allclose(found, u, atol=1e-12)


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_proposition_2_holds_whatever_the_weights(scale):
    net, y = network(scale), torch.rand(2, 3, 12, 10, generator=seeded(), dtype=torch.float64)
    _, result, step = restored(net, y, steps=12)
    assert proposition_2(result, step, 4.0)["holds"] and len(result.trace) == 12


def test_without_clip_and_gate_wild_weights_break_its_bound():
    net, y = network(3.0), torch.rand(2, 3, 12, 10, generator=seeded(), dtype=torch.float64)
    kept, free = net.step(y), net.step(y)
    free.c, free.gate = None, torch.inf
    run = propagate(free, net.problem(y), y, steps=3, energy=False, raises=False)
    assert not proposition_2(run, kept, 4.0)["holds"]


@pytest.fixture
def small(monkeypatch):
    images = list(torch.rand(12, 1, 3, 64, 64, generator=seeded()))
    monkeypatch.setattr(search, "scenes", lambda: (images[2:], [torch.nn.functional.pad(x, (64,) * 4) for x in images[:2]]))
    monkeypatch.setattr(search, "SEARCH", search.SEARCH | {"before": 1, "batch": 2, "size": 32})


@pytest.mark.parametrize("order", [1, 2])
def test_a_search_that_was_interrupted_ends_where_the_other_does(order, small, tmp_path):
    whole = search.search(tmp_path / "a", False, order, width=4, steps=3)
    search.search(tmp_path / "b", False, order, width=4, steps=2)
    again = search.search(tmp_path / "b", True, order, width=4, steps=3)
    for key, alpha in whole.items():
        assert torch.equal(alpha, again[key]) and alpha.abs().max() > 0
    told = json.loads((tmp_path / "b" / f"gdc-search-order-{order}.json").read_text())
    assert len(told["validation_losses"]) == 2 and told["order"] == order


def test_all_architectures_have_as_many_edges_and_one_file_holds_them(small, tmp_path):
    search.compare(tmp_path, steps=(1,), turns=2)
    card = json.loads((tmp_path / "gdc-search.json").read_text())
    configs = card["network"]["networks"]
    assert {key.rsplit("-", 1)[0] for key in configs} == {"searched", "hand-made", *(f"random-{k}" for k in (1, 2, 3))}
    assert {len(c[part]) for c in configs.values() for part in ("generative", "discriminative")} == {4}
    assert all(c["cells"] == [4, 2] for c in configs.values())
    assert set(card["search"]["orders"]) == {"1", "2"}
    search.derain(tmp_path, steps=(1, 2), width=4)
    card = json.loads((tmp_path / "gdc-derain.json").read_text())
    assert card["network"]["generative"] == configs["searched-0"]["generative"]


@trained
@pytest.mark.parametrize("shape", [(1, 1, 33, 50), (2, 3, 48, 41)])
def test_the_shipped_network_takes_any_size_gray_or_colour(shape):
    from odlkit.tasks.derain import derain

    y = torch.rand(shape, generator=seeded())
    x, report = derain(y, "gdc-searched")
    assert x.shape == y.shape and report["certificate"]["holds"] and report["accepted"] + report["rejected"] == 2 * len(y)
    assert torch.allclose(x[:1], derain(y[:1], "gdc-searched")[0], atol=1e-5)  # each picture by itself
