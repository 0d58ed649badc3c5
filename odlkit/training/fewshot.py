"""Few-shot learning as a bilevel problem: features that all tasks share above, one linear head for each task below.

A task shows N classes by M pictures each and asks for the class of others.  Its head is the lower level,

    u = argmin_u (1/NM) sum_i CE(u^T f(x_i), y_i) + (lambda/2)||u||^2,   N-way M-shot,

the features f the upper one, whose loss is the head's cross entropy on the other pictures.  The lower level sees the
features only, so the hypergradient is taken in them, by `odlkit.bilevel`, and pulled back through the network once: memory
does not grow with the network times K.  Source: HODL, sections 5 and 6.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from odlkit import data
from odlkit.bilevel import Implicit, Truncated, Unrolled, descent, hypergradient
from odlkit.models.hodl import Diagonal, Map, aggregated, averaged
from odlkit.networks import Features
from odlkit.training.loop import fit, ship
from odlkit.training.machine import best_device, times

SIDE, HELD_OUT = 28, 100  # pixels; classes of the background set that are for validation
STEPS, RIDGE, SHARPNESS = 10, 1e-3, 10.0  # K, lambda, and the factor on the logits of the upper loss
ALPHA, MU = 0.9, 0.1  # sHODL's average; aHODL's share of the upper gradient


class Episode(NamedTuple):
    """``tasks`` tasks of N ways: pictures ``(T, N M, 1, h, w)`` and ``(T, N Q, 1, h, w)``, labels ``(N M,)``, ``(N Q,)``."""

    support: Tensor
    query: Tensor
    seen: Tensor  # labels of the support, the same in all tasks, since classes are numbered as they are drawn
    asked: Tensor


# -- data


def omniglot(part: str) -> Tensor:
    """``(classes, 20, 1, 28, 28)``, ink 1, of the set ``"background"`` or ``"evaluation"``; or `DataNotFound`."""
    import numpy as np

    path = next(path for path in data.files("omniglot") if part in path.name)
    ink = torch.from_numpy(~np.load(path)["images"])
    return torch.stack([nnf.interpolate(c[:, None].float(), (SIDE, SIDE), mode="area") for c in ink])


def mini(part: str, side: int = 84) -> Tensor:
    """`class_folders` of MiniImageNet's ``train``, ``val`` or ``test``, from ``mini-imagenet`` in the data folder.

    The set may not be passed on with this package, so it is not in the registry: whoever has it puts it there.  Raises
    `DataNotFound` where it is not.
    """
    folder = data.root() / "mini-imagenet" / part
    if not folder.is_dir():
        raise data.DataNotFound(f"data: expected MiniImageNet's pictures as {folder}/CLASS/*.jpg, the folder does not exist")
    return class_folders(folder, side)


def turned(classes: Tensor) -> Tensor:
    """Each class turned by 0, 90, 180 and 270 degrees, as four classes: ``(C, ...) -> (4 C, ...)``."""
    return torch.cat([torch.rot90(classes, quarter, (-2, -1)) for quarter in range(4)])


def class_folders(folder: Path | str, side: int = 84) -> Tensor:
    """Pictures of ``folder/CLASS/*`` as ``(classes, n, 3, side, side)`` float32, n the least number in a class.

    The layout in which MiniImageNet's ``train``, ``val`` and ``test`` are passed on; it may not be passed on with this
    package.  Raises ``ValueError`` where fewer than two classes have pictures.
    """
    found = [
        [path for path in sorted(place.iterdir()) if path.suffix.lower() in data.PICTURES]
        for place in sorted(Path(folder).iterdir())
        if place.is_dir()
    ]
    found = [paths for paths in found if paths]
    if len(found) < 2:
        raise ValueError(f"folder: expected at least two folders of pictures in {folder}, got {len(found)}")

    def read(path: Path) -> Tensor:
        picture = data.image(path)
        return nnf.interpolate(picture.expand(-1, 3, -1, -1), (side, side), mode="bilinear", antialias=True)[0]

    least = min(map(len, found))
    return torch.stack([torch.stack([read(path) for path in paths[:least]]) for paths in found])


def glyphs(classes: int, count: int = 20, seed: int = 0, strokes: int = 3, jitter: float = 0.06) -> Tensor:
    """Invented letters ``(classes, count, 1, 28, 28)``: quadratic Bezier strokes whose points shake from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    points = 0.15 + 0.7 * torch.rand(classes, 1, strokes, 3, 2, generator=generator)
    points = points + jitter * torch.randn(classes, count, strokes, 3, 2, generator=generator)
    t = torch.linspace(0, 1, 24)[:, None]
    basis = torch.cat([(1 - t) ** 2, 2 * t * (1 - t), t**2], 1)  # (24, 3)
    curve = torch.einsum("pb,cnsbx->cnspx", basis, points).flatten(2, 3)  # (classes, count, strokes 24, 2)
    axis = (torch.arange(SIDE) + 0.5) / SIDE
    rows, columns = (
        torch.exp(-((axis - curve[..., i, None]) ** 2) / (2 * 0.03**2)) for i in (0, 1)
    )  # (classes, count, p, 28)
    return torch.einsum("cnph,cnpw->cnhw", rows, columns).clamp(max=1)[:, :, None]


def episode(classes: Tensor, ways: int, shots: int, queries: int, tasks: int, generator: torch.Generator) -> Episode:
    """Tasks drawn from ``(C, n, ...)``: no class twice in a task, no picture both shown and asked.

    Raises ``ValueError`` where there are not enough classes or pictures.
    """
    if ways > len(classes) or shots + queries > classes.shape[1]:
        have = f"{len(classes)} classes of {classes.shape[1]}"
        raise ValueError(f"ways, shots, queries: expected at most {have} pictures, got {ways}, {shots} and {queries}")
    rows = torch.stack([torch.randperm(len(classes), generator=generator)[:ways] for _ in range(tasks)])
    order = torch.rand(tasks, ways, classes.shape[1], generator=generator).argsort(-1)[..., : shots + queries]
    drawn = classes[rows[..., None], order]  # (T, N, M + Q, C, h, w)
    labels = torch.arange(ways)
    return Episode(
        drawn[:, :, :shots].flatten(1, 2),
        drawn[:, :, shots:].flatten(1, 2),
        labels.repeat_interleave(shots),
        labels.repeat_interleave(queries),
    )


def shaken(
    pictures: Tensor, generator: torch.Generator, turn: float = 12.0, size: float = 0.15, shift: float = 0.07
) -> Tensor:
    """Each picture of ``(..., C, h, w)`` turned, scaled, sheared and shifted at random, zero where nothing was drawn.

    Normal, of standard deviations ``turn`` degrees, ``size`` and half of it for the shear, ``shift`` of the side.
    """
    flat = pictures.flatten(0, -4)
    draw = torch.randn(len(flat), 5, generator=generator).to(flat)
    angle, scale, shear = draw[:, 0] * math.radians(turn), (size * draw[:, 1]).exp(), 0.5 * size * draw[:, 2]
    c, s = scale * angle.cos(), scale * angle.sin()
    move = torch.stack([torch.stack([c, shear - s], 1), torch.stack([s, c], 1)], 1)  # (n, 2, 2)
    grid = nnf.affine_grid(torch.cat([move, 2 * shift * draw[:, 3:, None]], 2), list(flat.shape), align_corners=False)
    return nnf.grid_sample(flat, grid, align_corners=False).view_as(pictures)


# -- the lower level, and its ways to be differentiated


def head_loss(u: Tensor, f: Tensor, labels: Tensor) -> Tensor:
    """One task: ``(1/n) sum CE(f u, labels) + (lambda/2)||u||^2`` for a head ``(D, N)`` and features ``(n, D)``."""
    return nnf.cross_entropy(f @ u, labels) + 0.5 * RIDGE * u.square().sum()


def curvature(f: Tensor) -> Tensor:
    """A bound of each task's Hessian, ``(1/2) max_i sum_j |f_i . f_j| / n + lambda``, ``(T, n, D) -> (T, 1, 1)``.

    The Hessian of softmax is at most 1/2 and ``||F F^T||_2 <= ||F F^T||_inf``; the sum is near the norm itself, since the
    features of different classes are nearly orthogonal.
    """
    rows = (f @ f.transpose(1, 2)).abs().sum(2)
    return (0.5 * rows.amax(1) / f.shape[1] + RIDGE)[:, None, None]


def heads(seen: Tensor, f: Callable[[Any], Tensor] = lambda w: w["support"]) -> descent:
    """``T(u, w) = u - (1/L) d loss/du`` of all tasks at once, u ``(T, D, N)``: the losses are summed, so none sees another.

    The tasks run in parallel by `torch.func.vmap`, which is valid since a task's loss takes no random number and writes
    nothing.
    """
    each = torch.func.vmap(head_loss, in_dims=(0, 0, None))
    return descent(lambda u, w: each(u, f(w), seen).sum(), lambda w, k: 1 / curvature(f(w)))


def query_loss(asked: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """The upper loss: the mean cross entropy of sharpened logits on the pictures that are asked for."""
    return lambda u, w: nnf.cross_entropy((SHARPNESS * w["query"] @ u).flatten(0, 1), asked.repeat(len(u)))


class Method(NamedTuple):
    """How the lower level is differentiated, and which map it iterates."""

    way: Unrolled | Truncated | Implicit | None  # None: first order, no derivative through the lower level
    change: Callable[[Map, Callable], Map] = lambda T, upper: T  # the lower map of the method, from descent and upper loss
    what: str = ""


METHODS = {
    "rhg": Method(Unrolled(), what="reverse mode through all steps"),
    "trhg": Method(Truncated(STEPS // 2), what="reverse mode through the last half of the steps"),
    "cg": Method(Implicit("cg", tol=0, max_iter=STEPS), what="implicit, conjugate gradients"),
    "ns": Method(Implicit("neumann", tol=0, max_iter=STEPS), what="implicit, Neumann series"),
    "shodl": Method(Unrolled(), lambda T, upper: averaged(T, ALPHA), "HODL, simplified: RHG with a shorter step"),
    "ahodl": Method(
        Unrolled(),
        lambda T, upper: aggregated(averaged(T, ALPHA), upper, Diagonal(), MU, 1.0),
        "HODL, aggregated: the labels that are asked for enter the lower level, in training only",
    ),
    "first-order": Method(None, what="no derivative through the lower level"),
}


def through(net: nn.Module, task: Episode) -> dict[str, Tensor]:
    """The features of both parts, ``(T, n, D)``, by one pass."""
    both = torch.cat([task.support, task.query], 1)
    f = net(both.flatten(0, 1)).unflatten(0, both.shape[:2])
    return {"support": f[:, : len(task.seen)], "query": f[:, len(task.seen) :]}


def task_loss(net: nn.Module, task: Episode, method: str = "shodl") -> Tensor:
    """The upper loss, whose gradient in the network's weights is the method's hypergradient.

    Raises ``ValueError`` for an unknown method and `odlkit.bilevel.LowerLevelError` where the lower level fails.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    way, change, _ = METHODS[method]
    f, upper = through(net, task), query_loss(task.asked)
    start = torch.zeros(len(f["query"]), f["query"].shape[-1], int(task.seen.max()) + 1).to(f["query"])
    step = change(heads(task.seen), upper)
    held = {key: value.detach() for key, value in f.items()}
    if way is None:
        return upper(solve(step, held, start), f)
    return hypergradient(step, upper, held, start, steps=STEPS, way=way).attached(f)


def solve(step: Map, w: Any, start: Tensor) -> Tensor:
    """``u^K`` without a graph."""
    u = start
    with torch.no_grad():
        for k in range(STEPS):
            u = step(u, w, k)
    return u


@torch.no_grad()
def accuracies(features: nn.Module, tasks: Iterator[Episode]) -> Tensor:
    """The share of right answers in each task, heads trained by plain descent: the upper labels are only counted."""
    found, where = [], next((p.device for p in features.parameters()), torch.device("cpu"))
    for task in tasks:
        task = Episode(*(part.to(where) for part in task))
        f = through(features, task)
        start = torch.zeros(len(f["query"]), f["query"].shape[-1], int(task.seen.max()) + 1).to(f["query"])
        guess = (f["query"] @ solve(heads(task.seen), f, start)).argmax(-1)
        found.append((guess == task.asked).float().mean(1))
    return torch.cat(found).cpu()


def draws(classes: Tensor, ways: int, number: int, seed: int = 0, shots: int = 1, queries: int = 5, at_once: int = 10):
    """``number`` tasks by one seed, ``at_once`` at a time."""
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, number, at_once):
        yield episode(classes, ways, shots, queries, min(at_once, number - first), generator)


# -- the recipe


def train(
    net: Features,
    classes: Tensor,
    held: Tensor,
    out: Path,
    *,
    method: str = "shodl",
    steps: int = 3000,
    lr: float = 2e-3,
    ways: int = 20,
    tasks: int = 2,
    queries: int = 5,
    seed: int = 0,
    name: str = "hodl-fewshot",
    resume: bool = False,
    shake: bool = False,
) -> dict:
    """Fit features to tasks drawn from ``classes``; the validation score is the accuracy in percent on ``held``.

    ``shake``: every picture of a task is `shaken`.
    """
    device = best_device()
    net.to(device)

    def loss(generator: torch.Generator) -> Tensor:
        task = episode(classes, ways, 1, queries, times(tasks), generator)
        task = Episode(*(part.to(device) for part in task))
        if shake:
            task = task._replace(support=shaken(task.support, generator), query=shaken(task.query, generator))
        return task_loss(net, task, method)

    def validate() -> float:
        net.eval()
        score = 100 * accuracies(net, draws(held, min(20, len(held)), 50)).mean().item()
        net.train()
        return score

    return fit(net, loss, validate=validate, steps=steps, lr=lr, out=out, name=name, resume=resume, seed=seed,
               compiled=[net])  # fmt: skip


def omniglot_features(
    out: Path, resume: bool = False, steps: int = 12_000, width: int = 64, method: str = "shodl", name: str = "hodl-fewshot"
) -> None:
    """Features for Omniglot by sHODL: Lake's background classes but the last `HELD_OUT`, each turned four ways.

    Four times the classes are still few beside the steps, so every picture is `shaken` too.
    """
    torch.manual_seed(0)
    background = omniglot("background")
    train_on, held = turned(background[:-HELD_OUT]), background[-HELD_OUT:]
    net = Features(width)
    record = train(net, train_on, held, out, method=method, steps=steps, name=name, resume=resume, shake=True)
    what = f"features for few-shot learning: four convolutions whose heads are trained at test time; {METHODS[method].what}"
    data_words = (
        f"Omniglot's background set without its last {HELD_OUT} classes, which are the validation set, each turned by 0, "
        "90, 180 and 270 degrees; every picture turned, scaled and shifted a little at random"
    )
    schedule = {"depth": STEPS, "ridge": RIDGE, "alpha": ALPHA, "ways": 20, "shots": 1, "method": method}
    network = {"kind": "features", **net.config}
    ship(net, out, name, record, what=what, data=data_words, network=network, schedule=schedule)


def mini_features(out: Path, resume: bool = False, steps: int = 20_000, width: int = 64, side: int = 84) -> None:
    """Features for MiniImageNet by sHODL, 5-way 1-shot, four tasks a step; for a GPU."""
    torch.manual_seed(0)
    net, name = Features(width, channels=3), "hodl-fewshot-mini"
    seen, held = mini("train", side), mini("val", side)
    queries = min(15, seen.shape[1] - 1)
    record = train(net, seen, held, out, ways=5, tasks=4, queries=queries, steps=steps, name=name, resume=resume)
    what = f"features for few-shot learning on MiniImageNet: four convolutions; {METHODS['shodl'].what}"
    schedule = {"depth": STEPS, "ridge": RIDGE, "alpha": ALPHA, "ways": 5, "shots": 1, "method": "shodl"}
    about = f"MiniImageNet's training classes ({len(seen)}); {len(held)} more are the validation set"
    ship(net, out, name, record, what=what, data=about, network={"kind": "features", **net.config}, schedule=schedule)


def first_order(out: Path, resume: bool = False, steps: int = 12_000, width: int = 64) -> None:
    """The same without a derivative through the lower level, to be measured beside it."""
    omniglot_features(out, resume, steps, width, "first-order", "first-order-fewshot")
