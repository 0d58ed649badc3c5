"""DGUNet gives one answer in every precision, compiled or not, stored or rebuilt; and rebuilding saves the memory."""

import shutil

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from odlkit.models.dgunet import DGUNet
from odlkit.networks.hourglass import Projection
from odlkit.operators import Blur
from odlkit.training.dgunet import all_stages, charbonnier

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
SETTINGS = {"derain": {}, "derain+": {}, "text": {}, "known": {"channels": 1, "known": True}, "sensing": {}}
ODD, EVEN = (19, 29), (24, 32)  # a known operator fixes the sizes
FLOAT32, BFLOAT16, COMPILED = 1e-4, 0.03, 1e-5  # allowed on images in [0, 1]


def small(name, device="cpu", **changes):
    """A network, its data and its operator or none."""
    torch.manual_seed(0)
    about = SETTINGS[name]
    shape = {"width": 8, "step": 4, "tail": 4, "stages": 4, "scales": 3, "fused": 2}
    net = DGUNet("derain" if name == "known" else name, **(shape | about | changes)).eval().to(device)
    y = torch.rand(2, net.setting.channels, *(EVEN if net.setting.known else ODD)).to(device)
    return net, y, [Blur(torch.full((3, 3), 1 / 9, device=device))] if net.setting.known else []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_precisions_agree(name, device):
    net, y, operator = small(name, device)
    with torch.no_grad():
        single = net(y, *operator)
        with torch.autocast(device, torch.bfloat16):
            rough = net(y, *operator)
        double = net.double()(y.double(), *[Blur(blur.kernel.double()) for blur in operator])
    assert single[-1].dtype == torch.float32 and double[-1].dtype == torch.float64
    for one, two, exact in zip(single, rough, double, strict=True):
        assert (one - exact).abs().max() < FLOAT32
        assert 0 < (two.float() - exact).abs().max() < BFLOAT16  # 0 would mean that nothing was rounded


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilation_changes_nothing(backend, device):
    """In one graph, backward too; ``aot_eager`` needs no compiler."""
    if backend == "inductor" and device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("no C++ compiler")
    net, y, _ = small("derain", device, stages=2, scales=2, fused=1)
    x = torch.rand_like(y)
    torch.compiler.reset()
    compiled, found = torch.compile(net, backend=backend, fullgraph=True), []
    for call in (net, compiled):
        net.zero_grad()
        images = call(y)
        all_stages(images, x).backward()
        found.append((images[-1].detach(), torch.cat([p.grad.flatten() for p in net.parameters()])))
    (image, slope), (same_image, same_slope) = found
    assert (image - same_image).abs().max() < COMPILED
    assert (slope - same_slope).norm() < 1e-4 * slope.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["text", "known"])
def test_rebuilt_stages_change_no_gradient_under_autocast(name, device):
    net, y, operator = small(name, device)
    x, slopes = torch.rand_like(y), []
    for net.checkpoint in (False, True):
        net.train().zero_grad()
        with torch.autocast(device, torch.bfloat16):
            all_stages(net(y, *operator), x).backward()
        slopes.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert slopes[0].norm() > 0 and torch.allclose(*slopes, rtol=1e-5, atol=1e-7)


def kept(net, y) -> list[int]:
    """Bytes that a training step keeps for its backward pass, before the first stage and in each; weights do not count."""
    stages, seen = [0], {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in seen:
            seen.add(t.untyped_storage().data_ptr())
            stages[-1] += t.untyped_storage().nbytes()
        return t

    def begin(*_):
        stages.append(0)

    places = {net.first, net.last, *net.middle}
    hooks = [place.register_forward_pre_hook(begin) for place in places]
    with saved_tensors_hooks(pack, lambda t: t):
        images = net(y)  # the graph keeps every storage alive, so no address comes twice
    assert len(stages) == len(images) + 1
    for hook in hooks:
        hook.remove()
    return stages


def test_rebuilding_halves_the_memory_of_training():
    """The peak is what is kept and one stage, the largest, rebuilt.  (The benchmark measures resident memory.)"""
    net, _, _ = small("derain", stages=7, scales=4, fused=3)
    y = torch.rand(1, 3, 64, 64)
    stored = kept(net.train(), y)
    net.checkpoint = True
    rebuilt = kept(net, y)
    assert sum(rebuilt) + max(stored) <= 0.5 * sum(stored)
    assert min(stored[1:]) > 64 * 64 * 8 * 4  # every stage kept more than one map of features


def test_errata_equal_maps_need_the_ridge():
    """Two of the maps are one: the explicit inverse of ``V^T V`` fails or is noise, the ridge gives the projection."""
    torch.manual_seed(0)
    merge, (x, g) = Projection(4, rank=3).double(), torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for part in (merge.basis.weight, merge.basis.bias):
            part[1] = part[0]
        v = merge.basis(torch.cat([x, g], dim=1)).flatten(2)
        v = v / v.abs().sum(2, keepdim=True)
        exact = v[:, ::2].mT @ torch.linalg.lstsq(v[:, ::2].mT, g.flatten(2).mT).solution  # without the second copy
        assert (merge.project(x, g).flatten(2).mT - exact).norm() < 1e-3 * exact.norm()
        try:
            printed = v.mT @ (torch.inverse(v @ v.mT) @ (v @ g.flatten(2).mT))
        except torch.linalg.LinAlgError:
            return
        assert not (printed - exact).norm() < 0.1 * exact.norm()


def test_errata_a_loss_of_clamped_outputs_has_no_gradient_where_it_clamps():
    x, slopes = torch.rand(1, 1, 8, 8), []
    for clamp in (True, False):
        image = (x + 1.5).requires_grad_()  # wrong everywhere
        charbonnier([image.clamp(0, 1) if clamp else image], x).backward()
        slopes.append(image.grad.abs().sum())
    assert slopes[0] == 0 and slopes[1] > 0.9
