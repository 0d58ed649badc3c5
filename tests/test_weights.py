"""Weights files: what `load` builds from a card of each kind, and what it refuses."""

import pytest
import torch

from odlkit import weights
from odlkit.models.podm import Relaxed, RelaxedNet
from odlkit.networks import ConvUnit, ResidualNet
from odlkit.operators import Identity
from odlkit.priors import Box
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import propagate
from odlkit.training.loop import save_weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    return tmp_path


def relaxed(folder, name="tiny", last=None):
    torch.manual_seed(1)
    net = RelaxedNet([ConvUnit(width=4, depth=3, activation="elu").config] * 2, 0.15, last, 3)
    card = {
        "name": name,
        "network": {"kind": "relaxed", **net.config},
        "schedule": {"first": 0.15, "last": last, "depth": 2},
    }
    save_weights(net, folder / f"{name}.safetensors", card, torch.float16)
    return net


@pytest.mark.parametrize("last", [None, 0.01])
def test_relaxed_podm_comes_back_as_it_was_saved(folder, last):
    net = relaxed(folder, last=last)
    back = weights.load("tiny")
    assert isinstance(back, RelaxedNet) and back.config == net.config and len(back) == 2 and not back.training
    for key, value in net.state_dict().items():
        found = back.state_dict()[key]
        assert found.dtype == torch.float32 and torch.equal(found, value.half().float())  # the file is half precision
    assert not any(p.requires_grad for p in back.parameters())
    x = torch.rand(1, 1, 16, 16)
    problem = Problem(LeastSquares(Identity(), x, 2.0), Box())
    same = [propagate(Relaxed(n.half().float(), 0.05), problem, x, steps=2, energy=False).x for n in (net, back)]
    assert torch.equal(*same)


def test_residual_networks_are_still_built(folder):
    net = ResidualNet([ConvUnit(width=4, depth=3)], bound=2.0)
    card = {"network": {"kind": "conv", "units": [net.units[0].config], "bound": 2.0}, "schedule": {"first": 1.0}}
    save_weights(net, folder / "plain.safetensors", card)
    back = weights.load("plain")
    assert isinstance(back, ResidualNet) and back.bound == 2.0
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), back.parameters(), strict=True))


def test_a_changed_file_is_refused(folder):
    relaxed(folder)
    path = folder / "tiny.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(ValueError, match="^weights: tiny.safetensors does not have the SHA-256"):
        weights.load("tiny")
    path.unlink()
    with pytest.raises(ValueError, match="^weights: expected tiny.safetensors beside its card"):
        weights.load("tiny")
