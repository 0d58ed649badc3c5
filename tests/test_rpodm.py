"""Relaxed PODM: the closed form of its propagation, gradients through its stages, and training that resumes exactly."""

from functools import partial
from itertools import count

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from odlkit import data
from odlkit.models.podm import Relaxed, RelaxedNet
from odlkit.networks import LearnedMetric
from odlkit.operators import Blur, BlurDecimate, FilterBank
from odlkit.priors import Box, SparseBox
from odlkit.problem import LeastSquares, Problem, norm_items
from odlkit.propagate import PropagationError, propagate
from odlkit.training import padnet as padnet_recipes
from odlkit.training import podm as recipes
from odlkit.training.loop import fit


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blur_kernel():
    kernel = randn(2, 1, 3, 5).abs()  # one for each item
    return kernel / kernel.sum((-2, -1), keepdim=True)


def metric():
    net = LearnedMetric(5).double()
    with torch.no_grad():
        net.mix += 0.02 * randn(25, 25, seed=3)
    return FilterBank(net.filters().detach())


@pytest.mark.parametrize("operator", [Blur(blur_kernel()), BlurDecimate(blur_kernel()[0, 0], 2)])
def test_the_closed_form_minimises_and_the_printed_one_does_not(operator):
    """With f = ||A x - y||^2 the system has mu / 2, not mu.  Eq: PODM (3), the closed form of section 5.2 corrected."""
    x, x_a, W, mu = randn(2, 1, 16, 18), randn(2, 1, 16, 18, seed=1), metric(), 0.7
    f = LeastSquares(operator, operator.A(x), 2.0)

    def slope(u):  # of f(u) + ||u - x_A||_H^2 with H = (mu / 2) W^T W
        return norm_items(f.grad(u) + mu * W.normal(u - x_a)) / norm_items(f.grad(x_a))

    assert (slope(f.nearest(x_a, mu, W)) < 1e-10).all()
    printed = f.nearest(x_a, 2 * mu, W)  # (A^T A + mu W^T W)^-1 (A^T y + mu W^T W x_A)
    system = operator.normal(printed) + mu * W.normal(printed) - operator.A_adjoint(f.y) - mu * W.normal(x_a)
    assert (norm_items(system) < 1e-9).all()  # it is what the paper prints
    assert (slope(printed) > 1e-2).all()


def test_a_threshold_after_the_clamp_is_not_the_projection():
    """The paper's prox of the sparse box is farther away than the exact one.  Source: PODM section 5.2, "HardThre(Proj)"."""
    u = torch.tensor([-3.0, 0.5], dtype=torch.float64).view(1, 1, 1, 2)
    exact = SparseBox(-0.1, 1, 1).prox(u, 1.0).flatten().tolist()
    assert exact == [-0.1, 0.0]
    cost = lambda x: (u.flatten() - torch.tensor(x, dtype=torch.float64)).square().sum().item()  # noqa: E731
    clamped = u.clamp(-0.1, 1).flatten()
    largest = torch.zeros(2, dtype=torch.float64)
    largest[clamped.abs().argmax()] = clamped[clamped.abs().argmax()]
    assert cost(largest.tolist()) == pytest.approx(9.0) and cost(exact) == pytest.approx(8.66)


def test_a_sparse_box_with_room_for_every_pixel_is_the_box():
    u = randn(2, 1, 6, 7)
    assert torch.equal(SparseBox(0.0, 1.0, 42).prox(u, 1.0), Box(0.0, 1.0).prox(u, 1.0))


class Run(torch.nn.Module):
    """The loss after all stages, as a function of the parameters."""

    def __init__(self, operator, scale):
        super().__init__()
        torch.manual_seed(2)
        units = [{"width": 3, "depth": 2, "fold": 1, "activation": "elu"}] * 2
        self.net, self.scale = RelaxedNet(units, 0.2, None, 3).double(), scale
        for metric in self.net.metrics:
            metric.mix.data += 0.02 * torch.randn_like(metric.mix)  # at the diagonal start many derivatives vanish
        self.truth = randn(2, 1, 8, 8)
        box = Box(-20.0, 20.0)  # no pixel at a kink
        self.problem = Problem(LeastSquares(operator, operator.A(self.truth), 2.0), box)
        self.start = operator.A_adjoint(operator.A(self.truth))
        self.sigma = torch.tensor([0.02, 0.05], dtype=torch.float64).view(2, 1, 1, 1)

    def forward(self):
        step = Relaxed(self.net, self.sigma, self.scale)
        state = step.init(self.problem, self.start)
        for _ in range(len(self.net)):
            state, _ = step(self.problem, state)
        return (state.x - self.truth).square().sum()


@pytest.mark.parametrize("part", ["mix", "mlp", "log_steps", "networks"])
@pytest.mark.parametrize("operator, scale", [(Blur(blur_kernel()), 1), (BlurDecimate(blur_kernel()[0, 0], 2), 2)],
                         ids=["blur", "decimate"])  # fmt: skip
def test_gradients_through_the_stages_equal_finite_differences(operator, scale, part):
    run = Run(operator, scale)
    chosen = {name: value for name, value in run.named_parameters() if part in name}
    assert chosen

    def loss(*values):
        return functional_call(run, dict(zip(chosen, values, strict=True)), ())

    values = tuple(value.detach().clone().requires_grad_() for value in chosen.values())
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss(*values), values))
    assert torch.autograd.gradcheck(loss, values, eps=1e-5, rtol=1e-5, atol=1e-6)


def test_every_item_of_a_batch_runs_by_itself():
    run = Run(Blur(blur_kernel()), 1)
    run.net.requires_grad_(False)
    together = propagate(Relaxed(run.net, run.sigma), run.problem, run.start, steps=2, energy=False).x
    for i in range(2):
        blur = Blur(blur_kernel()[i, 0])
        problem = Problem(LeastSquares(blur, blur.A(run.truth[i : i + 1]), 2.0), run.problem.prior)
        alone = propagate(Relaxed(run.net, run.sigma[i].item()), problem, run.start[i : i + 1], steps=2, energy=False).x
        assert torch.allclose(alone, together[i : i + 1], atol=1e-10)


def test_a_box_bounds_what_any_network_proposes():
    """Omega is why a relaxed run cannot blow up; without it, the same network leaves every bound."""
    run = Run(Blur(blur_kernel()), 1)
    with torch.no_grad():
        for parameter in run.net.networks.parameters():
            parameter *= 300
    start = run.start.clamp(0, 1)
    inside = Problem(run.problem.fidelity, Box(0.0, 1.0))
    kept = propagate(Relaxed(run.net, run.sigma), inside, start, steps=8, energy=False).x
    assert kept.min() >= 0 and kept.max() <= 1
    free = Problem(run.problem.fidelity, Box(-torch.inf, torch.inf))
    with pytest.raises(PropagationError, match="diverged|not finite"):
        propagate(Relaxed(run.net, run.sigma), free, start, steps=60, energy=False)


def test_a_rearranged_network_runs_each_of_its_parts_in_turn():
    run = Run(Blur(blur_kernel()), 1)
    run.net.requires_grad_(False)
    same, longer = run.net.rearranged((0, 1)), run.net.rearranged((0, 0, 1, 1))
    ends = [propagate(Relaxed(n, run.sigma), run.problem, run.start, steps=2, energy=False).x for n in (run.net, same)]
    assert torch.equal(*ends)
    assert [list(longer.networks).index(longer.network(stage)) for stage in range(4)] == [0, 0, 1, 1]
    for stage in range(4):
        assert torch.equal(longer.metrics[stage].mix, run.net.metrics[stage // 2].mix)
        assert longer.log_steps[stage] == run.net.log_steps[stage // 2]


class Killed(Exception):
    pass


@pytest.fixture(params=["train400", "samples"])
def tiny(request, monkeypatch):
    """The recipes on few steps, a checkpoint every second one, with the registered pictures or with samples."""
    if request.param == "samples":
        monkeypatch.setattr(data, "images", lambda name: list(data.samples(180).values()))
    elif "train400" not in data.available():
        pytest.skip("ODLKIT_DATA has no train400")
    monkeypatch.setattr("odlkit.training.padnet.HELD_OUT", 1)  # where the pictures are split
    monkeypatch.setattr(recipes, "UNITS", 3)
    phases = (
        ({"steps": 6, "stop": 4, "lr": 1e-3}, (0, 1, 2), False, 96),
        ({"steps": 4, "lr": 1e-3}, (0, 0, 1, 2), True, 96),
    )
    monkeypatch.setattr(recipes, "PHASES", phases)
    monkeypatch.setattr(recipes, "fit", partial(fit, save_every=2, warmup=2))
    monkeypatch.setattr(recipes, "denoiser", partial(recipes.denoiser, steps=2))


RESUMED = {  # case -> recipe, its arguments, the call at which it is killed, the checkpoint that is left then
    "deblur, first phase": ("deblur", {}, 3, "rpodm-deblur-1"),
    "deblur, last phase": ("deblur", {}, 7, "rpodm-deblur-2"),
    "super-resolution": ("super_resolution", {"steps": 4, "stages": 3}, 3, "rpodm-sr"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_killed_training_resumes_to_the_same_weights(case, tiny, tmp_path, monkeypatch):
    name, arguments, fatal, left = RESUMED[case]
    recipe = partial(getattr(recipes, name), width=8, **arguments)
    recipe(tmp_path / "whole")
    calls, patches = count(), recipes.patches

    def dying(images, batch, size, generator):  # the denoiser's patches have another size
        if size == 96 and next(calls) == fatal:
            raise Killed
        return patches(images, batch, size, generator)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        for module in (recipes, padnet_recipes):  # deblurring draws its patches there
            patch.setattr(module, "patches", dying)
        recipe(tmp_path / "broken")
    assert torch.load(tmp_path / "broken" / f"{left}.pt", weights_only=True)["step"] == 2  # of 4: a step is lost
    recipe(tmp_path / "broken", resume=True)

    recipe_name = left.rstrip("-12")
    last = left if recipe_name == left else f"{recipe_name}-2"
    whole, broken = (torch.load(tmp_path / run / f"{last}.pt", weights_only=True) for run in ("whole", "broken"))
    for key, value in whole["model"].items():
        assert torch.equal(value, broken["model"][key]), key
    shipped = [load_file(tmp_path / run / f"{recipe_name}.safetensors") for run in ("whole", "broken")]
    assert all(torch.equal(value, shipped[1][key]) for key, value in shipped[0].items())
    start = torch.load(tmp_path / "whole" / "podm-denoiser.pt", weights_only=True)["model"]
    moved = [not torch.equal(v, whole["model"]["networks.0." + k.removeprefix("units.0.")]) for k, v in start.items()]
    assert all(moved)  # it did train
