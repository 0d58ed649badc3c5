"""Recipes for GDC: its two networks greedily, then each scheme jointly through its cascade, for two tasks.

Greedy, as section VI-D: the generative network removes noise of every level (one network that is told the level, where the
paper has one for each small interval), the classifier tells noised from clean patches.  Joint: the networks of all stages,
shared, and the stages' numbers together, with flips and quarter turns.  The rate falls along a cosine, not in steps.
Data: train400 only, degraded at random.  No image of BSD68, CBSD68 or Levin and no benchmark kernel is seen.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit.metrics import psnr
from odlkit.models.gdc import Cascade, Discriminative
from odlkit.models.gdc_joint import CascadeNet
from odlkit.networks import Classifier, ConvUnit, ResidualNet
from odlkit.operators import Mask
from odlkit.problem import Problem
from odlkit.propagate import iterate
from odlkit.tasks.inpaint import LEVEL, thin_plate
from odlkit.training.loop import fit, log_error, patches, ship
from odlkit.training.machine import best_device, mixed, times
from odlkit.training.masks import missing_at_random, random_mask
from odlkit.training.padnet import (
    DATA,
    deblurring_loss,
    deblurring_score,
    degrade,
    log_uniform,
    pictures,
    train_denoiser,
)

LEVELS = (0.003, 0.2)  # of the greedy networks: noise up to 0.1 as in the paper, and what the first stages ask for
NOISE = (0.005, 0.12)  # of joint deblurring
SIZE = 96  # of the patches that joint training runs on
WHAT = {"GM": "data step, generative module", "GD": "data step, generative and discriminative module"}
WHAT |= {"GC": "data step, generative and corrective module", "GDC": "data step and all three modules"}


def _constant(level: float, stage: int) -> float:
    return level


def _noised(x: Tensor, alpha: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    noise = torch.randn(x.shape, generator=generator)
    return x + alpha * noise, noise


def generator_network(out: Path, resume: bool = False, steps: int = 3000, width: int = 64) -> ResidualNet:
    """Train G, seven convolutions and six ReLU, to estimate noise of every level in `LEVELS`."""
    torch.manual_seed(0)
    net = ResidualNet([ConvUnit(width=width)])
    what = "GDC's generative network, trained greedily as a denoiser for every noise level: seven convolutions"
    return train_denoiser(net, "conv", LEVELS, what, steps=steps, lr=1e-3, out=out, name="gdc-generator", resume=resume)


def classifier_network(out: Path, resume: bool = False, steps: int = 2500) -> tuple[Classifier, float]:
    """Train d to tell noised (1) from clean (0) at every level in `LEVELS`, position by position: it and its step ``s``.

    The step is the one of a few that denoises the validation images best, over levels from 0.01 to 0.1.
    """
    torch.manual_seed(0)
    (train, held), device = pictures(), best_device()
    net = Classifier().to(device)

    def loss(generator: torch.Generator) -> Tensor:
        x = patches(train, times(16), 64, generator)
        alpha = log_uniform(*LEVELS, len(x), generator)
        y = _noised(x, alpha, generator)[0]
        corrupted, clean = net.logits(torch.cat([y, x]).to(device), torch.cat([alpha, alpha]).to(device)).chunk(2)
        return nnf.softplus(-corrupted).mean() + nnf.softplus(clean).mean()  # cross entropy

    def gain(step: float) -> float:
        """Mean gain in PSNR, in dB, of one discriminative step on noised validation images."""
        total = []
        x = torch.cat(held)
        for i, level in enumerate((0.01, 0.03, 0.1)):
            y = _noised(x, torch.tensor(level), torch.Generator().manual_seed(i))[0].to(device)
            move = Discriminative(net.potential, partial(_constant, level), step)
            with torch.no_grad():
                total.append((psnr(move(None, y, 0).cpu(), x) - psnr(y.cpu(), x)).mean().item())  # type: ignore[arg-type]
        return sum(total) / len(total)

    trial = [0.02 * 2**i for i in range(9)]
    record = fit(net, loss, steps=steps, lr=1e-3, out=out, name="gdc-classifier", resume=resume,
                 validate=lambda: max(map(gain, trial)))  # fmt: skip
    best = max(trial, key=gain)
    what = "GDC's discriminative network: tells noised from clean; the validation score is the gain of one step in dB"
    ship(net, out, "gdc-classifier", record, what=what, data=DATA, network={"kind": "classifier", **net.config},
         schedule={"first": LEVELS[1], "last": LEVELS[0], "step": best})  # fmt: skip
    return net, best


def start(out: Path, resume: bool, scheme: str, width: int = 64, **options: object) -> CascadeNet:
    """The cascade of a scheme whose networks begin as the greedily trained ones; a guide begins without influence."""
    greedy: Any = generator_network(out, resume=resume or (out / "gdc-generator.pt").exists(), width=width).units[0]
    about: dict | None = None
    if "D" in scheme:
        classifier, step = classifier_network(out, resume=resume or (out / "gdc-classifier.pt").exists())
        about, options = classifier.config, options | {"step": step}
    torch.manual_seed(0)
    channels = 2 if options.get("guided") else 1
    net = CascadeNet(scheme, greedy.config | {"channels": channels}, about, **options)  # type: ignore[arg-type]
    if net.classifier is not None:
        net.classifier.load_state_dict(classifier.state_dict())
    net.unit.load_state_dict(widened(greedy.state_dict(), net.unit.state_dict()))
    net.mixed = mixed()
    return net.to(best_device())


def widened(small: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the shapes of ``like`` that compute what ``small`` does on the first channels and ignore the others.

    The last input channel of the first convolution is the noise level, in both.
    """
    wide = {key: torch.zeros_like(value) for key, value in like.items()}
    first = next(iter(small))
    for key, value in small.items():
        wide[key][tuple(slice(n) for n in value.shape)] = value
    own = small[first]
    wide[first][:, own.shape[1] - 1], wide[first][:, -1] = 0, own[:, -1]
    if wide[first].shape == own.shape:
        wide[first] = own
    return wide


def unroll(net: CascadeNet, problem: Problem, x0: Tensor, sigma: Tensor, guide: Tensor | None = None) -> list[Tensor]:
    """``u^1 ... u^T`` of the cascade, each of the shape of ``x0``."""
    step = Cascade(net.modules_for(sigma, guide))
    return [state.x for state, _ in islice(iterate(step, problem, x0), net.stages)]


def deblurred(net: CascadeNet, x: Tensor, kernel: Tensor, sigma: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Blur ``x`` circularly, add noise, and run the cascade from the data."""
    blur, y = degrade(x, kernel, sigma, generator)
    return unroll(net, net.problem(blur, y, sigma), y, sigma)


def interpolated(net: CascadeNet, x: Tensor, mask: Tensor) -> list[Tensor]:
    """Remove the unknown pixels of ``x`` and run the cascade from the thin plate; known pixels stay as they are."""
    operator, sigma = Mask(mask), torch.full((len(x), 1, 1, 1), LEVEL).to(x)
    y = operator.A(x)
    outputs = unroll(net, net.problem(operator, y, sigma), thin_plate(y, mask), sigma, mask)
    return [torch.where(mask > 0, x, u) for u in outputs]


def _finish(net: CascadeNet, out: Path, name: str, record: dict, what: str, data: str) -> None:
    network = {"kind": "cascade", **net.config}
    schedule = {"first": network["first"], "last": network["last"], "depth": net.stages}
    ship(net, out, name, record, what=what, data=data, network=network, schedule=schedule)


def deblur(out: Path, resume: bool = False, *, scheme: str, steps: int = 2600, width: int = 64, stages: int = 5) -> None:
    """One scheme for deblurring with a known kernel: random kernels, 0.5 to 12% noise, log-uniform."""
    net, name = start(out, resume, scheme, width, stages=stages), f"gdc-deblur-{scheme.lower()}"
    (train, held), restore = pictures(), partial(deblurred, net)
    loss = partial(deblurring_loss, restore, train, SIZE, noise=NOISE, mixed=False)
    score = partial(deblurring_score, restore, held, (0.01, 0.03, 0.1), 176)
    record = fit(net, loss, steps=steps, lr=5e-4, out=out, name=name, resume=resume, validate=score, compiled=[net.unit])
    what = f"GDC for deblurring, scheme {scheme} ({WHAT[scheme]}), {stages} stages trained jointly, networks shared"
    _finish(net, out, name, record, what, f"{DATA} (1, 3 and 10% noise); random blur kernels")


deblur_gm, deblur_gd, deblur_gc, deblur_gdc = (partial(deblur, scheme=scheme) for scheme in ("GM", "GD", "GC", "GDC"))


def inpaint(out: Path, resume: bool = False, steps: int = 2500, width: int = 64, stages: int = 10) -> None:
    """GDC for interpolation of single channels: 10 to 90% of the pixels missing at random, or text; no noise."""
    net = start(out, resume, "GC", width, stages=stages, first=0.03, last=0.003, guided=True)
    device, (train, held) = best_device(), pictures()

    def loss(generator: torch.Generator) -> Tensor:
        x = patches(train, times(4), SIZE, generator).to(device)
        mask = torch.cat([random_mask(SIZE, SIZE, generator) for _ in x]).to(device)
        return log_error(interpolated(net, x, mask), x)

    def validate() -> float:
        scores = []
        with torch.no_grad():
            for i, x in enumerate(held):
                x = x[..., :176, :176].to(device)
                mask = missing_at_random((0.2, 0.8)[i % 2], 176, 176, torch.Generator().manual_seed(i)).to(device)
                scores.append(psnr(interpolated(net, x, mask)[-1], x).item())
        return sum(scores) / len(scores)

    record = fit(net, loss, steps=steps, lr=5e-4, out=out, name="gdc-inpaint", resume=resume, validate=validate,
                 compiled=[net.unit])  # fmt: skip
    what = f"GDC for interpolation, scheme GC, {stages} stages trained jointly, networks shared; G sees the mask"
    _finish(net, out, "gdc-inpaint", record, what, f"{DATA}; pixels missing at random, and text")
