"""Recipes for HODL's deconvolution: a U-shaped denoiser, then hierarchical training through the iteration.

The upper loss is the logarithm of the squared error of ``D_net(u^K)``, ``u^K`` of K steps of T from the data, and the
hypergradient goes back through all of them (sHODL).  The aggregation (4) is not used: with this loss it would need the
true image inside the lower level, which nobody has when it restores.
Data: train400 only, blurred by random kernels; no benchmark image and no benchmark kernel is seen.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from odlkit.bilevel import Unrolled, hypergradient
from odlkit.models.hodl_deblur import Deconvolution
from odlkit.networks import ResidualNet, UNet
from odlkit.networks.unet import as_identity, certified, lipschitz, normalized
from odlkit.operators import Blur
from odlkit.training import machine
from odlkit.training.loop import fit, log_error, ship
from odlkit.training.padnet import (
    DATA,
    crops,
    deblurring_loss,
    deblurring_score,
    degrade,
    pictures,
    train_denoiser,
)

LEVELS = (0.003, 0.25)  # noise of the denoiser: what plug-and-play may ask for
NOISE = (0.005, 0.06)  # of the blurred pictures
WIDTHS = (32, 64, 128)


def denoiser(out: Path, resume: bool = False, steps: int = 5000) -> ResidualNet:
    """Train the U-shaped network to estimate noise of every level in `LEVELS`."""
    torch.manual_seed(0)
    net = ResidualNet([UNet(widths=WIDTHS)])
    what = "the U-shaped network of HODL's deconvolution as a plain denoiser of every noise level, for plug-and-play"
    return train_denoiser(net, "unet", LEVELS, what, steps=steps, lr=1e-3, out=out, name="hodl-denoiser", resume=resume)


def unroll(net: Deconvolution, x: Tensor, kernel: Tensor, sigma: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Blur ``x`` circularly, add noise, run T: ``u^1 ... u^K`` and ``D_net(u^K)``, each like ``x``."""
    blur, b = degrade(x, kernel, sigma, generator)
    T, u = net.map(blur, b, sigma)
    outputs = []
    for k in range(net.depth):
        u = T(u, None, k)
        outputs.append(u)
    return [*outputs, net.denoise(u, sigma, net.depth)]


def by_parts(net: Deconvolution, x: Tensor, blur: Blur, b: Tensor, sigma: Tensor, memory: str) -> Tensor:
    """The loss of `unroll`'s stages, its gradient taken by `odlkit.bilevel.Unrolled` with that ``memory``.

    `log_error` is a sum over the stages, so the lower level carries, beside u, what it amounts to so far: the same number
    and gradient, and no graph longer than a part of the run.
    """
    w, last = dict(net.named_parameters()), net.depth + 1
    counted = range(last // 2 + 1, last)  # the maps behind the stages, but the last one, that `log_error` looks at

    def maps(u: Tensor, w: Any, k: int) -> Tensor:
        return torch.func.functional_call(net, w, (blur, b, sigma, u, k))

    def step(state: dict[str, Tensor], w: Any, k: int) -> dict[str, Tensor]:
        u = maps(state["u"], w, k)
        return {"u": u, "loss": state["loss"] + log_error([u], x) * (0.1 / len(counted) if k in counted else 0.0)}

    def upper(state: dict[str, Tensor], w: Any) -> Tensor:
        return state["loss"] + log_error([maps(state["u"], w, last)], x)

    start = {"u": b, "loss": b.new_zeros(())}
    return hypergradient(step, upper, w, start, steps=last, way=Unrolled(memory)).attached(w)


def hierarchical_loss(
    net: Deconvolution,
    images: Sequence[Tensor],
    size: int,
    generator: torch.Generator,
    batch: int = 4,
    memory: str | None = None,
) -> Tensor:
    """The loss of all stages on random crops, kernels, noise; ``memory`` as in `by_parts`, None for autograd as a whole."""
    if memory is not None:
        x, kernel, sigma = crops(images, size, generator, batch, NOISE)
        return by_parts(net, x, *degrade(x, kernel, sigma, generator), sigma, memory)
    with parametrize.cached():  # a normalized network is normalized once a step
        return deblurring_loss(partial(unroll, net), images, size, generator, batch=batch, noise=NOISE, mixed=False)


def fit_hierarchically(net: Deconvolution, size: int = 96, batch: int = 4, memory: str | None = None, **run: Any) -> dict:
    """Train everything in ``net`` through its K steps on random kernels and noise; returns the record of `fit`.

    ``memory`` is that of `hierarchical_loss`.
    """
    train, held = pictures()
    net.mixed = machine.mixed()
    net.to(machine.best_device())
    loss = partial(hierarchical_loss, net, train, size, batch=batch, memory=memory)

    def validate() -> float:
        net.eval()
        score = deblurring_score(partial(unroll, net), held, (0.01, 0.03), 176)
        net.train()
        return score

    return fit(net, loss, validate=validate, **run)


def deblur(
    out: Path, resume: bool = False, steps: int = 1800, slow: tuple[int, int] = (2600, 1000), memory: str | None = None
) -> None:
    """Hierarchical training from the denoiser's weights; nothing bounds the network's Lipschitz constant.

    The rate falls along a cosine of 2600 steps for the first 1000, and from there along one of 1800.
    """
    unit: Any = denoiser(out, resume=True).units[0]
    net = Deconvolution(unit.config)
    net.unit.load_state_dict(unit.state_dict())
    run: dict[str, Any] = {"lr": 5e-4, "out": out, "name": "hodl-deblur", "memory": memory, "compiled": [net.unit]}
    fit_hierarchically(net, steps=slow[0], stop=slow[1], resume=resume, **run)
    record = fit_hierarchically(net, steps=steps, resume=True, **run)
    finish(net, out, "hodl-deblur", record, "free network, trained first as hodl-denoiser")


def deblur_nonexpansive(out: Path, resume: bool = False, steps: int = 1200) -> None:
    """``D_net = (I + N) / 2``, N of Lipschitz constant 1, and one T from the first step: HODL's Assumption 3.2.

    N begins as the identity, so the iteration begins as proximal gradient alone.
    """
    torch.manual_seed(0)
    net = Deconvolution({"widths": WIDTHS}, theta=0.5, start={"first": None, "last": 2.0, "trust": 1.0, "kappa": 20.0})
    normalized(as_identity(net.unit))
    name = "hodl-deblur-nonexpansive"
    record = fit_hierarchically(net, size=64, steps=steps, lr=2e-3, out=out, name=name, resume=resume)
    net.unit = certified(net.unit, margin=1e-3)
    finish(net, out, name, record, "network normalized to the Lipschitz constant 1")


def finish(net: Deconvolution, out: Path, name: str, record: dict, about: str) -> None:
    """Write the weights and their card, which has `lipschitz` of the network as it is stored, in half precision."""
    stored = copy.deepcopy(net.unit).half().float()
    what = f"HODL's deconvolution, {net.depth} steps of one map trained hierarchically; {about}"
    ship(net, out, name, record, what=what, data=f"{DATA} (1 and 3% noise); random blur kernels",
         network={"kind": "deconvolution", **net.config}, schedule={"depth": net.depth},
         lipschitz_bound=lipschitz(stored))  # fmt: skip
