"""Recipes for DGUNet at a size that a processor trains: what they share, and compressive sensing with a learned matrix.

As the paper: Adam with a warm-up and a cosine, the loss over the images of all stages.  Patches of 64 hold four blocks, so
that the borders of blocks are seen in training; the released models add that as a second run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import weights
from odlkit.metrics import psnr
from odlkit.models.dgunet import DGUNet, Sensing
from odlkit.training.loop import fit, patches, ship
from odlkit.training.machine import autocast, best_device, times
from odlkit.training.padnet import DATA, pictures

SMALL: dict[str, Any] = {"width": 16, "step": 8, "tail": 8, "stages": 5, "scales": 3, "fused": 2}


def all_stages(images: Sequence[Tensor], x: Tensor) -> Tensor:
    """The mean over stages of ``||x^k - x||^2`` a pixel.  Eq: DGUNet (10)."""
    return torch.stack([(image.float() - x).square().mean() for image in images]).mean()


def charbonnier(images: Sequence[Tensor], x: Tensor, edges: float = 0.0) -> Tensor:
    """Mean over stages and pixels of ``c(x^k - x) + edges c(L x^k - L x)``, ``c(t) = sqrt(t^2 + 1e-6)``, L the Laplacian.

    The loss of the released models, ``edges = 0.05`` for deraining and deblurring; the paper's text has `all_stages`.
    """

    def laplacian(z: Tensor) -> Tensor:
        z = nnf.pad(z, (1, 1, 1, 1), mode="replicate")
        return z[..., 1:-1, 2:] + z[..., 1:-1, :-2] + z[..., 2:, 1:-1] + z[..., :-2, 1:-1] - 4 * z[..., 1:-1, 1:-1]

    def c(t: Tensor) -> Tensor:
        return (t.square() + 1e-6).sqrt().mean()

    errors = [image.float() - x for image in images]
    return torch.stack([c(e) + (edges * c(laplacian(e)) if edges else 0.0) for e in errors]).mean()


Pair = tuple[Any, ...]  # (x, y), and for a network that is given it A: (x, y, A), (x, y, A, x0)


def restorer(
    out: Path,
    resume: bool = False,
    *,
    name: str,
    what: str,
    data: str,
    sample: Callable[[torch.Generator], Pair],
    held: Sequence[Pair],
    setting: str = "derain",
    edges: float = 0.05,
    steps: int = 3000,
    lr: float = 1e-3,
    warmup: int = 100,
    final: float = 0.01,
    stop: int | None = None,
    **changes: Any,
) -> None:
    """Train a DGUNet on what ``sample`` draws, ``(B, C, H, W)`` in [0, 1], and write its weights and card.

    A draw is ``(x, y)``, or ``(x, y, A)`` or ``(x, y, A, x0)`` for a network that is given A.  ``held`` are draws to
    validate on; ``changes`` go to `Setting`, over `SMALL`.  ``steps``, ``lr``, ``warmup``, ``final`` and ``stop``
    are those of `fit`.
    """
    torch.manual_seed(0)
    device = best_device()
    net = DGUNet(setting, **(SMALL | changes)).to(device)

    def restore(given: Sequence[Any]) -> list[Tensor]:
        return net(*(t.to(device) if isinstance(t, Tensor) else t for t in given))

    def loss(generator: torch.Generator) -> Tensor:
        x, *given = sample(generator)
        with autocast():
            return charbonnier(restore(given), x.to(device), edges)

    def validate() -> float:
        with torch.no_grad():
            scores = [psnr(restore(given)[-1].cpu().clamp(0, 1), x).mean().item() for x, *given in held]
        return sum(scores) / len(scores)

    plan: dict[str, Any] = {"steps": steps, "lr": lr, "warmup": warmup, "final": final, "stop": stop}
    record = fit(net, loss, **plan, out=out, name=name, resume=resume, validate=validate, compiled=[net])
    ship(net, out, name, record, what=what, data=data, network={"kind": "dgunet", **net.config})


def sensing(
    out: Path,
    resume: bool = False,
    *,
    ratio: float,
    name: str | None = None,
    steps: int = 5000,
    side: int = 64,
    batch: int = 8,
    lr: float = 1e-3,
    begin: Sensing | None = None,
    told: str = "",
    **changes: Any,
) -> Sensing:
    """Train matrix and network together, for one ratio, and write weights and card: gray patches, blocks of 32, no noise.

    It starts from the network ``begin``, where one is given, and from its matrix if that has the same ratio; ``told`` says
    so in the card.  ``changes`` go to `Setting`; without any the network is the released one.  Source: DGUNet section 4.5.
    """
    torch.manual_seed(0)
    device, (train, held) = best_device(), pictures()
    net, name = Sensing(ratio, **changes).to(device), name or f"dgunet-cs-{round(100 * ratio)}"
    if begin is not None:
        fresh = net.state_dict()
        kept = {key: value for key, value in begin.state_dict().items() if value.shape == fresh[key].shape}
        net.load_state_dict(fresh | kept)

    def loss(generator: torch.Generator) -> Tensor:
        x = patches(train, times(batch), side, generator).to(device)
        with autocast():
            return all_stages(net(net.operator.A(x)), x)

    def validate() -> float:
        x = torch.cat(held)[..., :160, :160].to(device)
        with torch.no_grad():
            return psnr(net(net.operator.A(x))[-1], x).mean().item()

    record = fit(net, loss, steps=steps, lr=lr, out=out, name=name, resume=resume, validate=validate, compiled=[net])
    what = f"DGUNet for compressive sensing at {ratio:.0%}, with its sampling matrix; {net.net.setting.stages} stages"
    ship(net, out, name, record, what=what + told, data=DATA, network={"kind": "sensing", **net.config})
    return net


def sensing_after(out: Path, resume: bool = False, *, ratio: float, first: str = "dgunet-cs-10", steps: int = 1500) -> None:
    """`sensing` for the time that is left: from the network of another ratio, with a matrix of its own."""
    begin: Any = weights.load(first)
    sensing(out, resume, ratio=ratio, steps=steps, begin=begin, told=f"; its network began as that of {first}", **SMALL)


def sensing_deeper(out: Path, resume: bool = False, *, ratio: float, stages: int = 9, steps: int = 1000) -> None:
    """`sensing`, then again with more stages: the middle one, whose weights are shared, is run more often."""
    first = f"dgunet-cs-{round(100 * ratio)}-first"
    begin = sensing(out, True, ratio=ratio, name=first, **SMALL)
    told = f"; the first 5000 steps with {SMALL['stages']}"
    sensing(out, resume, ratio=ratio, steps=steps, lr=6e-4, begin=begin, told=told, **SMALL | {"stages": stages})


def sensing_paper(out: Path, resume: bool = False, *, ratio: float, steps: tuple[int, int] = (20_000, 10_000)) -> None:
    """The released network at the paper's scale: 200 epochs of single blocks, batches of 128, then 100 of patches of 64.

    train400 is the paper's BSD400.  It does not say how many blocks make an epoch: here as many as tile the pictures.  The
    second run, which sees borders of blocks, is that of the released models.  For a GPU.
    """
    name, lr = f"dgunet-cs-{round(100 * ratio)}-paper", 1e-4
    blocks = sensing(out, resume, ratio=ratio, name=f"{name}-blocks", steps=steps[0], side=32, batch=128, lr=lr)
    told = "; the released setting, trained on single blocks first"
    sensing(out, resume, ratio=ratio, name=name, steps=steps[1], side=64, batch=32, lr=lr, begin=blocks, told=told)


sensing_10, sensing_25 = partial(sensing_deeper, ratio=0.10), partial(sensing, ratio=0.25, **SMALL)
sensing_1, sensing_4, sensing_50 = (partial(sensing_after, ratio=ratio) for ratio in (0.01, 0.04, 0.50))
sensing_10_paper, sensing_25_paper = (partial(sensing_paper, ratio=ratio) for ratio in (0.10, 0.25))
