"""Data hyper-cleaning: which training labels are wrong, learned from a small set whose labels are right.

The lower level trains softmax regression with a weight for every sample, the upper asks for a small loss on clean ones:

``lower(u, w) = mean_i sigmoid(w_i) CE(u x_i, y_i) + (ridge / 2) ||u||^2``,
``upper(u) = mean_j CE(u x_j, y_j)`` over clean samples.

Half of the training labels are wrong.  A method is a lower-level map and a way to differentiate its iterates; the rest is
one loop.  Source: HODL sections 5, 6.3, which name no classifier; this one is that of Franceschi et al., ICML 2017.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy

from odlkit import data
from odlkit.bilevel import Implicit, Truncated, Unrolled, descent, hypergradient
from odlkit.models.hodl import Diagonal, aggregated, averaged, outer_step


class Samples(NamedTuple):
    """Features ``(n, d)`` and labels ``(n,)``."""

    x: Tensor
    y: Tensor

    def accuracy(self, u: Tensor) -> float:
        """The share that the classifier ``u`` (classes, d) gets right."""
        return ((self.x @ u.T).argmax(1) == self.y).double().mean().item()


@dataclass(frozen=True)
class Cleaning:
    """One draw of the problem; ``train.y`` are the labels as given, ``wrong`` says which of them are."""

    train: Samples
    wrong: Tensor  # (n,) bool
    clean: Samples  # what the upper level sees
    held: Samples  # to choose settings with
    test: Samples
    ridge: float = 1e-3

    def to(self, device: torch.device) -> Cleaning:
        """The same draw there; whoever cleans it then computes there."""
        train, clean, held, test = (
            Samples(*(t.to(device) for t in part)) for part in (self.train, self.clean, self.held, self.test)
        )
        return Cleaning(train, self.wrong.to(device), clean, held, test, self.ridge)

    def lower(self, u: Tensor, w: Tensor) -> Tensor:
        """The weighted training loss of ``u`` (classes, d), weights ``sigmoid(w)``."""
        losses = cross_entropy(self.train.x @ u.T, self.train.y, reduction="none")
        return (w.sigmoid() * losses).mean() + self.ridge / 2 * u.square().sum()

    def upper(self, u: Tensor, w: Tensor) -> Tensor:
        """The loss on the clean samples."""
        return cross_entropy(self.clean.x @ u.T, self.clean.y)

    @property
    def start(self) -> Tensor:
        """The classifier ``u = 0``, (classes, d)."""
        return self.train.x.new_zeros(int(self.clean.y.max()) + 1, self.train.x.shape[1])

    @property
    def lipschitz(self) -> float:
        """``L = 1/2 + ridge``: cross-entropy's Hessian in the logits is at most 1/2, and ``X^T X / n <= I``."""
        return 0.5 + self.ridge


def corrupt(y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the labels, rounded down, each replaced by another one, all others alike; and which those are, bool."""
    wrong = torch.zeros(len(y), dtype=torch.bool)
    wrong[torch.randperm(len(y), generator=generator)[: len(y) // 2]] = True
    return torch.where(wrong, (y + torch.randint(1, classes, y.shape, generator=generator)) % classes, y), wrong


def draw(train: Samples, test: Samples | None, sizes: tuple[int, int, int], seed: int, damping: float = 0.1) -> Cleaning:
    """Disjoint random parts of ``sizes``: to train on, clean for the upper level, held for settings; the first corrupted.

    Without ``test`` the rest is the test set.  Features are centred and whitened with damping, so that few lower steps do:
    ``x -> (C + damping c I)^(-1/2) (x - mean)``, C the covariance of the training part and c its largest eigenvalue; then a
    constant feature 1 is appended.  Raises ``ValueError`` where there are too few samples.
    """
    if sum(sizes) + (test is None) > len(train.y):
        raise ValueError(f"sizes: expected at most {len(train.y)} samples in all, got {sizes}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.y), generator=generator)
    first, second, third, rest = (Samples(train.x[i], train.y[i]) for i in order.split([*sizes, len(order) - sum(sizes)]))
    mean = first.x.mean(0)
    values, vectors = torch.linalg.eigh((first.x - mean).T @ (first.x - mean) / len(first.y))
    damped = values.clamp_min(0) + damping * values[-1]
    matrix = vectors * damped.rsqrt() @ vectors.T

    def ready(part: Samples) -> Samples:
        return Samples(torch.cat([(part.x - mean) @ matrix, part.x.new_ones(len(part.y), 1)], 1), part.y)

    given, wrong = corrupt(first.y, int(train.y.max()) + 1, generator)
    return Cleaning(ready(first)._replace(y=given), wrong, ready(second), ready(third), ready(test or rest))


SIZES = {"digits": (600, 300, 200), "mnist": (2000, 2000, 1000), "fashion_mnist": (2000, 2000, 1000)}


def task(name: str, seed: int) -> Cleaning:
    """The problem on ``digits``, ``mnist`` or ``fashion_mnist``, in the `SIZES`; the two larger at half resolution.

    The digits (8 x 8) have no test part, so the rest is that; of the others (14 x 14, means of four pixels) all 10000 are.
    """
    pairs = [Samples(avg_pool2d(x, x.shape[-1] // 14 or 1).flatten(1), y) for x, y in data.labelled(name)]
    return draw(pairs[0], pairs[1] if len(pairs) > 1 else None, SIZES[name], seed)


# -- the methods: a lower-level map (u, w, k) -> u and a way to differentiate through it

Method = Callable[[Cleaning], tuple[Callable, Any]]
ALPHA = 0.9  # all methods take lower steps of 2 alpha / L


def gradient(problem: Cleaning, share: float = ALPHA) -> descent:
    """``D(u) = u - 2 share / L grad lower(u, w)``, non-expansive up to ``share = 1``."""
    return descent(problem.lower, 2 * share / problem.lipschitz)


def rhg(problem: Cleaning, memory: str = "full") -> tuple[Callable, Any]:
    """Reverse mode through all steps; ``memory`` as in `odlkit.bilevel.Unrolled`.  Source: Franceschi et al., ICML 2017."""
    return gradient(problem), Unrolled(memory)


def trhg(window: int) -> Method:
    """Reverse mode through the last steps only.  Source: Shaban et al., AISTATS 2019."""
    return lambda problem: (gradient(problem), Truncated(window))


def cg(iterations: int) -> Method:
    """Implicit, by so many conjugate gradient steps.  Source: Pedregosa, ICML 2016."""
    return lambda problem: (gradient(problem), Implicit("cg", tol=0, max_iter=iterations))


def ns(terms: int) -> Method:
    """Implicit, by so many terms of Neumann's series.  Source: Lorraine et al., AISTATS 2020."""
    return lambda problem: (gradient(problem), Implicit("neumann", tol=0, max_iter=terms))


def hodl(mu: float = 0.0, alpha: float = ALPHA, window: int | None = None) -> Method:
    """sHODL, ``T = I + alpha (D - I)`` with the longest non-expansive D; for ``mu > 0`` aHODL, with steps on the upper loss.

    sHODL is `rhg`: of a gradient step, alpha only changes the length.  ``window``: differentiated as by `trhg`, which is not
    HODL any more.  Source: HODL (3), (4), (5).
    """
    way = Unrolled() if window is None else Truncated(window)

    def method(problem: Cleaning) -> tuple[Callable, Any]:
        x = problem.clean.x
        s = outer_step(Diagonal(), torch.linalg.matrix_norm(x, 2).item() ** 2 / len(x) / 2)
        return aggregated(averaged(gradient(problem, 1.0), alpha), problem.upper, Diagonal(), mu, s), way

    return method


# -- the loop


@dataclass
class Cleaned:
    """The weights' logits ``w``, the classifier ``u`` trained with them, and the run: one entry an outer step."""

    w: Tensor
    u: Tensor
    seconds: list[float]  # of the processor, so far
    loss: list[float]  # of the upper level
    states: list[Tensor]  # u^K


def clean(problem: Cleaning, method: Method, steps: int, outer: int, lr: float) -> Cleaned:
    """``outer`` steps of Adam on the upper loss at ``u^steps``, from ``w = 0``, each from ``u = 0``."""
    w = torch.zeros_like(problem.train.x[:, 0])
    optimiser = torch.optim.Adam([w], lr=lr)
    (step, way), found = method(problem), Cleaned(w, problem.start, [], [], [])
    clock = time.process_time()
    for taken in range(outer + 1):
        result = hypergradient(step, problem.upper, w, problem.start, steps=steps, way=way)
        found.u = result.state
        found.states.append(found.u)
        found.seconds.append(time.process_time() - clock)
        found.loss.append(result.value.item())
        if taken < outer:
            w.grad = result.gradient
            optimiser.step()
    return found


def weighted(problem: Cleaning, w: Tensor, steps: int) -> Tensor:
    """The classifier after ``steps`` lower steps from zero, at the weights ``sigmoid(w)``."""
    u, step = problem.start, gradient(problem)
    with torch.no_grad():
        for k in range(steps):
            u = step(u, w, k)
    return u


def f1(w: Tensor, wrong: Tensor) -> float:
    """``2 TP / (2 TP + FP + FN)`` of "``w_i < 0``, so label i is wrong", the harmonic mean of precision and recall."""
    flagged = w < 0
    hits = (flagged & wrong).sum().item()
    return 2 * hits / max((flagged.sum() + wrong.sum()).item(), 1)
