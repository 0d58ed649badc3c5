"""The one loop: propose, correct, control, record, repeat.

A *step* is any object with ``init(problem, x0) -> State`` and ``__call__(problem, state) -> (State, Record)``.  `propagate`
runs it, writes down what every certificate needs, watches for divergence, and returns a result whose status cannot be
ignored: a run that diverged raises unless the caller asks for the status instead.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import cycle
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.linalg import vector_norm

from odlkit.problem import Problem, norm_items


class Status(StrEnum):
    """How a propagation ended."""

    CONVERGED = "converged"  # relative change below the tolerance, on every item, and no item was only held in place
    STEP_LIMIT = "step limit"  # the number of steps that was asked for; the tolerance was not reached
    DIVERGED = "diverged"  # an iterate grew beyond `blow_up` times its start
    NOT_FINITE = "not finite"  # NaN or infinity


class PropagationError(RuntimeError):
    """A propagation diverged or became non-finite; ``result`` holds everything up to that point."""

    def __init__(self, message: str, result: Result):
        super().__init__(message)
        self.result = result


@dataclass
class State:
    """The iterate ``x`` ``(B, C, H, W)``, the step count, and what else the method carries (``u``, ``v``, duals ...)."""

    x: Tensor
    k: int = 0
    aux: dict[str, Any] = field(default_factory=dict)

    def next(self, x: Tensor, **aux: Any) -> State:
        """The following state: a new iterate, one more step, the given auxiliaries replaced."""
        return State(x, self.k + 1, {**self.aux, **aux})


Record = dict[str, Any]  # per-step scalars: floats or (B,) tensors


class Step(Protocol):
    """One method: how it starts and what one iteration does."""

    def init(self, problem: Problem, x0: Tensor) -> State: ...
    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]: ...


class Trace:
    """What happened, one row a step: ``trace["energy"]`` is a float64 tensor ``(K, B)``.

    Always recorded: ``change`` (norm of the step), ``norm`` (of the new iterate).  With a prior: ``energy``.  With a truth:
    ``error`` (relative).  Everything a step's record holds is added under its own name.  ``start`` holds the values
    at ``x0`` for the quantities that exist there.
    """

    def __init__(self) -> None:
        self.rows: list[Record] = []
        self.start: Record = {}

    def __getitem__(self, name: str) -> Tensor:
        if not any(name in row for row in self.rows):
            raise KeyError(f"trace: {name!r} was not recorded; there are {', '.join(self.names())}")
        batch = self.rows[0]["change"].shape[0]

        def column(value: Any) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float64).cpu().reshape(-1).expand(batch)

        return torch.stack([column(row.get(name, torch.nan)) for row in self.rows])

    def __contains__(self, name: str) -> bool:
        return any(name in row for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def names(self) -> list[str]:
        """The recorded quantities."""
        return sorted({name for row in self.rows for name in row})

    def with_start(self, name: str) -> Tensor:
        """The quantity with its value at ``x0`` in front: ``(K + 1, B)``."""
        first = torch.as_tensor(self.start[name], dtype=torch.float64).cpu().reshape(1, -1)
        return torch.cat([first, self[name]])

    def acceptance_rate(self) -> float:
        """Share of steps, over the whole batch, in which the control kept the proposal; NaN for methods without one."""
        return self["accepted"].mean().item() if "accepted" in self else torch.nan


@dataclass
class Result:
    """Where a propagation ended: ``x``, ``status``, ``iterations``, ``residual`` (last relative change), ``trace``."""

    x: Tensor
    status: Status
    iterations: int
    residual: float
    trace: Trace
    state: State


def iterate(step: Step, problem: Problem, x0: Tensor) -> Iterator[tuple[State, Record]]:
    """Yield ``(state, record)`` for ever: the bare iteration, differentiable, with nothing watched or recorded."""
    state = step.init(problem, x0)
    while True:
        state, record = step(problem, state)
        yield state, record


def propagate(
    step: Step,
    problem: Problem,
    x0: Tensor,
    *,
    steps: int,
    tol: float = 0.0,
    truth: Tensor | None = None,
    measure: dict[str, Callable[[State], Any]] | None = None,
    energy: bool = True,
    every: int = 1,
    blow_up: float = 1e6,
    raises: bool = True,
    progress: bool = False,
) -> Result:
    """Run ``step`` from ``x0`` for at most ``steps`` iterations and record the trace.

    Stops early when ``||x^{k+1} - x^k|| <= tol ||x^k||`` on every item (PADNet, Algorithm 2, line 12), unless the step
    records ``held`` ``(B,)`` nonzero for one: a control refused its move and nothing took the place of it, so that it stands
    still says nothing.  (A step that falls back on another move when refused does move, and may converge.)  ``measure`` adds
    quantities of one's own to every row.  ``energy=False`` skips the energy, whose evaluation costs about one iteration;
    ``every=n`` looks at, records and tests only each n-th iterate (and the last).
    Raises `PropagationError` when an iterate is not finite or its norm exceeds ``blow_up`` times that of ``x0``
    (or of the data scale 1, if larger); with ``raises=False`` the result's status says so instead.
    """
    trace, state, status, relative = Trace(), step.init(problem, x0), Status.STEP_LIMIT, torch.inf
    record_energy = energy and problem.prior is not None
    limits = [min(blow_up * max(size, x0[0].numel() ** 0.5), sys.float_info.max) for size in norm_items(x0).tolist()]
    sizes, axes = norm_items(state.x).tolist(), tuple(range(1, x0.dim()))
    if record_energy:
        trace.start["energy"] = problem.energy(state.x)
    if truth is not None:
        truth_norm = norm_items(truth)
        trace.start["error"] = norm_items(state.x - truth) / truth_norm
    counter: Any = range(steps)
    if progress:
        from tqdm import tqdm

        counter = tqdm(counter, desc=type(step).__name__, delay=3, leave=False)
    with torch.no_grad():
        for count in counter:
            previous = state.x
            state, record = step(problem, state)
            if (count + 1) % every and count + 1 < steps:
                continue
            before = sizes if every == 1 else norm_items(previous).tolist()
            norm, change = vector_norm(state.x, dim=axes), vector_norm(state.x - previous, dim=axes)
            row = {"change": change, "norm": norm, **record}
            trace.rows.append(row)
            sizes = norm.tolist()  # plain numbers, for every further tensor operation would cost microseconds
            if not all(map(math.isfinite, sizes)):
                status = Status.NOT_FINITE
                break
            if record_energy and "energy" not in row:
                row["energy"] = problem.energy(state.x)
            if truth is not None:
                row["error"] = norm_items(state.x - truth) / truth_norm
            for name, function in (measure or {}).items():
                row[name] = function(state)
            if any(size > limit for size, limit in zip(sizes, cycle(limits), strict=False)):
                status = Status.DIVERGED
                break
            ratios = [c / max(size, sys.float_info.min) for c, size in zip(change.tolist(), cycle(before), strict=False)]
            relative = max(ratios)
            if all(ratio <= tol for ratio in ratios) and not ("held" in record and bool(record["held"].any())):
                status = Status.CONVERGED
                break
    result = Result(state.x, status, state.k, relative, trace, state)
    if raises and status in (Status.DIVERGED, Status.NOT_FINITE):
        raise PropagationError(f"{type(step).__name__}: {status.value} after {state.k} steps", result)
    return result
