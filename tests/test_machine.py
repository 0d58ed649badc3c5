"""How recipes compute: device, precision, compilation and larger batches do what they say, and change nothing else."""

import json
from functools import partial

import pytest
import torch

from odlkit import data, training
from odlkit.cli import main
from odlkit.models.dgunet import DGUNet
from odlkit.models.gdc_joint import CascadeNet
from odlkit.models.hodl_deblur import Deconvolution
from odlkit.networks import ConvUnit, Features, ResidualNet
from odlkit.training import fewshot, flow, hodl, loop, machine, padnet, rain
from odlkit.training.machine import Machine

pictures = pytest.mark.skipif("train400" not in data.available(), reason="the set train400 is not here")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(model, loss, out, compiled=(), **how) -> dict:
    with machine.on(Machine(**how)):
        return loop.fit(model, loss, steps=2, lr=1e-2, out=out, name="run", warmup=1, compiled=compiled)


# -- what was chosen


def test_words_that_nobody_knows_are_refused():
    for bad in ({"device": "tpu"}, {"precision": "fp8"}, {"times": 0}):
        name = {"times": "batch"}.get(*bad, *bad)
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Machine(**bad)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected auto or cpu"):
            Machine("cuda")


def test_the_choice_ends_with_its_block_whatever_happens_in_it():
    before = machine.chosen()
    with pytest.raises(KeyError), machine.on(Machine("cpu", "float32", None, 3)):
        assert machine.best_device().type == "cpu" and machine.times(4) == 12 and not machine.mixed()
        raise KeyError
    assert machine.chosen() == before and machine.times(4) == 4 and machine.mixed()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, index in (("0", 0), ("1", 1), ("2", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert machine.best_device() == torch.device("cuda", index)
    with machine.on(Machine("cpu")):
        assert machine.best_device().type == "cpu"


# -- precision


def networks() -> dict:
    """Models that see to their precision themselves, and what of them computes in it."""
    torch.manual_seed(0)
    unit = {"channels": 1, "width": 4, "depth": 3}
    x, sigma = torch.rand(1, 1, 16, 16, generator=seeded()), torch.full((1, 1, 1, 1), 0.05)
    cascade, deconvolution = CascadeNet("GM", unit), Deconvolution({"widths": (4, 8)})
    for net in (cascade, deconvolution):
        torch.nn.init.normal_(list(net.unit.parameters())[-2], std=0.1)  # it begins as the identity
    return {
        "cascade": (cascade, lambda: cascade.modules_for(sigma)[1](None, x, 0)),
        "deconvolution": (deconvolution, lambda: deconvolution.denoise(x, sigma, 0)),
    }


@pytest.mark.parametrize("name", networks())
def test_float32_rounds_nothing_and_bf16_does(name):
    net, call = networks()[name]
    exact = net.eval() and call()
    net.train()
    rounded = call()
    net.mixed = False
    assert torch.equal(call(), exact) and 0 < (rounded - exact).abs().max() < 0.05


def test_the_recipes_context_is_bf16_unless_told_otherwise():
    weight = torch.randn(4, 4, generator=seeded())
    with machine.on(Machine("cpu")), machine.autocast():
        assert (weight @ weight).dtype == torch.bfloat16
    with machine.on(Machine("cpu", "float32")), machine.autocast():
        assert (weight @ weight).dtype == torch.float32


# -- compilation


def trained(make, loss_of, parts, out, backend) -> tuple[torch.Tensor, dict]:
    """The weights after two steps."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = make()
    record = run(model, loss_of(model), out, parts(model), device="cpu", precision="float32", backend=backend)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), record


def denoising(net):
    def loss(generator):
        x = torch.rand(2, 1, 16, 16, generator=generator)
        return (net(x, 0.1) - 1).square().mean()

    return loss


def episodes(net):
    classes = fewshot.glyphs(8, 4, seed=1)
    return lambda generator: fewshot.task_loss(net, fewshot.episode(classes, 3, 1, 2, 2, generator))


def deblurring(net):
    image = torch.rand(1, 1, 60, 60, generator=seeded())
    net.mixed = False
    return lambda generator: padnet.deblurring_loss(lambda *a: hodl.unroll(net, *a), [image], 40, generator, mixed=False)


def raining(net):
    def loss(generator):
        x, y = rain.rainy([torch.rand(1, 3, 40, 40, generator=seeded())], 2, 16, generator)
        return (net(y)[-1] - x).square().mean()

    return loss


def moving(net):
    return lambda generator: flow.loss_of(net, [torch.rand(1, 3, 200, 200, generator=seeded())], generator)


SMALL = {"width": 4, "step": 2, "tail": 4, "stages": 2, "scales": 2, "fused": 1}
CASES = {
    "residual": (lambda: ResidualNet([ConvUnit(width=4, depth=3)]), denoising, lambda net: net.units),
    "few-shot": (lambda: Features(4), episodes, lambda net: [net]),
    "deconvolution": (lambda: Deconvolution({"widths": (4, 8)}, depth=3), deblurring, lambda net: [net.unit]),
    "dgunet": (lambda: DGUNet("derain", **SMALL), raining, lambda net: [net]),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_training_is_the_same_training(name, tmp_path):
    """Two steps, forwards and backwards through what surrounds the networks; ``aot_eager`` needs no compiler."""
    plain, quiet = trained(*CASES[name], tmp_path / "plain", None)
    compiled, record = trained(*CASES[name], tmp_path / "compiled", "aot_eager")
    assert (plain - compiled).abs().max() < 1e-5 and record["machine"]["backend"] == "aot_eager"
    assert quiet["machine"] == {"device": "cpu", "precision": "float32", "backend": None, "times": 1}


def test_it_is_the_networks_that_are_compiled(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: seen.append((type(self).__name__, how)))
    trained(*CASES["deconvolution"], tmp_path, "aot_eager")
    assert seen == [("UNet", {"backend": "aot_eager", "dynamic": False})]


def test_validation_runs_uncompiled():
    """For training there is one shape; the pictures of a validation set would all be compiled for."""
    calls, torch_backend = [], torch._dynamo.lookup_backend("eager")

    def backend(graph, inputs):
        calls.append(inputs)
        return torch_backend(graph, inputs)

    net = ConvUnit(width=4, depth=3)
    torch.compiler.reset()
    with machine.on(Machine("cpu", backend=backend)):
        validate = machine.prepare([net], lambda: [net(torch.rand(1, 1, n, n), 0.1) for n in (8, 9, 10)])
    net(torch.rand(1, 1, 8, 8), 0.1)
    assert len(calls) == 1
    validate()
    assert len(calls) == 1
    net(torch.rand(1, 1, 9, 9), 0.1)
    assert len(calls) == 2


def test_a_recipe_with_nothing_to_compile_says_so(tmp_path):
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="compile: expected no value"):
        run(model, lambda g: model.weight.sum(), tmp_path, backend="aot_eager")
    assert not list(tmp_path.glob("*.pt"))


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    with machine.on(Machine("cpu", backend="inductor")), pytest.raises(ValueError, match="compile: expected a C.. compiler"):
        machine.prepare([torch.nn.Linear(1, 1)])


# -- larger batches


def test_times_the_batch_is_the_batch_of_every_draw():
    images = [torch.rand(1, 3, 64, 64, generator=seeded())]
    with machine.on(Machine("cpu", times=3)):
        x, kernel, sigma = padnet.crops([images[0][:, :1]], 16, seeded(), batch=2)
        assert len(x) == len(kernel) == len(sigma) == 6
        assert [len(part) for part in rain.rainy(images, machine.times(2), 16, seeded())] == [6, 6]


def test_a_run_is_resumed_with_its_own_batch(tmp_path):
    model = torch.nn.Linear(2, 1)
    run(model, lambda g: model.weight.square().sum(), tmp_path, times=2)
    with machine.on(Machine(times=1)), pytest.raises(ValueError, match="batch: expected 2 times the recipe's"):
        loop.fit(model, lambda g: model.weight.sum(), steps=3, lr=0.1, out=tmp_path, name="run", resume=True)


# -- memory


@pytest.fixture
def blurred():
    torch.manual_seed(0)
    net = Deconvolution({"widths": (4, 8)}, depth=6).double().train()
    net.mixed = False
    with torch.no_grad():
        for p in net.parameters():
            p += 0.02 * torch.randn(p.shape, generator=seeded(1), dtype=p.dtype)
    kernel = torch.rand(2, 1, 5, 5, generator=seeded(2), dtype=torch.float64)
    x = torch.rand(2, 1, 24, 24, generator=seeded(3), dtype=torch.float64)
    return net, x, kernel / kernel.sum((-2, -1), keepdim=True), torch.tensor([0.02, 0.05]).double().view(2, 1, 1, 1)


def kept(call, monkeypatch) -> int:
    """The most bytes that are kept for a backward pass at a time, beside the weights; `vjp` frees what was kept before."""
    parts, pull = [0], hodl.Unrolled.pull.__globals__
    vjp = pull["vjp"]

    def pack(t):
        parts[-1] += 0 if isinstance(t, torch.nn.Parameter) else t.numel() * t.element_size()
        return t

    def counted(*words, **options):
        parts.append(0)
        return vjp(*words, **options)

    monkeypatch.setitem(pull, "vjp", counted)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    monkeypatch.setitem(pull, "vjp", vjp)
    return max(parts)


@pytest.mark.parametrize("depth", [1, 2, 6])
@pytest.mark.parametrize("memory", ["full", "checkpointed", "rebuilt"])
def test_by_parts_is_autograds_loss_and_gradient(blurred, memory, depth):
    net, x, kernel, sigma = blurred
    net.depth = depth
    whole = loop.log_error(hodl.unroll(net, x, kernel, sigma, seeded(4)), x)
    slopes = torch.autograd.grad(whole, list(net.parameters()), materialize_grads=True)
    net.zero_grad()
    loss = hodl.by_parts(net, x, *padnet.degrade(x, kernel, sigma, seeded(4)), sigma, memory)
    loss.backward()
    assert abs(loss - whole) < 1e-12
    for slope, p in zip(slopes, net.parameters(), strict=True):
        assert torch.allclose(p.grad, slope, rtol=1e-9, atol=1e-12)


def test_by_parts_the_gradient_agrees_in_bf16_too(blurred):
    net, x, kernel, sigma = blurred
    net, x, kernel, sigma = net.float(), x.float(), kernel.float(), sigma.float()
    net.mixed, found = True, []
    for memory in ("full", "rebuilt"):
        net.zero_grad()
        hodl.by_parts(net, x, *padnet.degrade(x, kernel, sigma, seeded(4)), sigma, memory).backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert found[0].norm() > 0 and (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


@pytest.mark.parametrize("memory, most", [("checkpointed", 0.6), ("rebuilt", 0.3)])
def test_by_parts_keeps_less(blurred, memory, most, monkeypatch):
    net, x, kernel, sigma = blurred
    blur, b = padnet.degrade(x, kernel, sigma, seeded(4))
    whole = kept(lambda: loop.log_error(hodl.unroll(net, x, kernel, sigma, seeded(4)), x), monkeypatch)
    assert 0 < kept(lambda: hodl.by_parts(net, x, blur, b, sigma, memory), monkeypatch) < most * whole
    assert 0.9 * whole < kept(lambda: hodl.by_parts(net, x, blur, b, sigma, "full"), monkeypatch)


# -- the command


@pictures
def test_a_recipe_runs_as_it_is_told(tmp_path, monkeypatch):
    """``hodl-deblur`` for a step of each phase, from a denoiser of a step."""
    monkeypatch.setattr(hodl, "WIDTHS", (4, 8))
    denoiser = hodl.denoiser
    monkeypatch.setattr(hodl, "denoiser", lambda out, resume: denoiser(out, resume, steps=1))
    monkeypatch.setattr(training, "recipe", lambda name: partial(hodl.deblur, steps=2, slow=(2, 1)))
    monkeypatch.setattr(hodl, "deblurring_score", lambda *words: 0.0)
    words = ["train", "hodl-deblur", "--out", str(tmp_path), "--device", "cpu", "--precision", "float32"]
    main([*words, "--batch", "2", "--memory", "rebuilt"], standalone_mode=False)
    card = json.loads((tmp_path / "hodl-deblur.json").read_text())
    assert card["machine"] == {"device": "cpu", "precision": "float32", "backend": None, "times": 2}


@pytest.mark.parametrize(
    "words, told",
    [
        (["gdc-flow", "--memory", "rebuilt"], "memory: expected no value, the recipe gdc-flow does not use it"),
        (["gdc-flow", "--batch", "0"], "batch: expected 1 or more"),
        (["padnet-gradient", "--batch", "2"], "batch: expected no value, this recipe runs on the processor"),
        (["padnet-gradient", "--compile"], "compile: expected no value, this recipe runs on the processor"),
        (["gdc-flow", "--precision", "fp8"], "precision: "),
    ],
)
def test_the_command_refuses_what_a_recipe_has_not(words, told, tmp_path, capsys):
    assert main(["train", *words, "--out", str(tmp_path)], standalone_mode=False) == 2
    assert capsys.readouterr().err.startswith(f"odlkit: {told}") and not list(tmp_path.iterdir())
