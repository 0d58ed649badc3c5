"""Hypergradients of data hyper-cleaning: odlkit's ways beside plain torch and beside higher, TorchOpt and BOAT.

The lower level is softmax regression with a weight ``sigmoid(psi_i)`` for every training sample, half of whose labels are
wrong; the upper level is the loss on clean samples; the hypergradient is by ``psi``.  Times, memory and errors of one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peers
import torch
from measure import arguments, compare, finish, fresh, rise, row
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import cross_entropy

from odlkit.bilevel import Implicit, Truncated, Unrolled, descent, hypergradient

Program = Callable[..., Tensor]  # (problem, psi, number of steps) -> the hypergradient
K, WINDOW, ITERATIONS, TERMS = 100, 50, 20, 100  # steps; of them kept by TRHG; iterations of CG; terms of Neumann's series
SIZES = {"large": (5000, 784, 10), "small": (200, 20, 2), "tiny": (100, 40, 3)}  # samples, features, classes


@dataclass(frozen=True)
class Cleaning:
    """Training data ``x, y``, clean data ``x_clean, y_clean``; weights are (classes, features)."""

    x: Tensor
    y: Tensor
    x_clean: Tensor
    y_clean: Tensor
    step_size: float
    ridge: float = 0.02

    def lower(self, w: Tensor, psi: Tensor) -> Tensor:
        """``mean_i sigmoid(psi_i) CE(w x_i, y_i) + ridge |w|^2 / 2``."""
        losses = cross_entropy(self.x @ w.T, self.y, reduction="none")
        return (psi.sigmoid() * losses).mean() + self.ridge / 2 * w.square().sum()

    def upper(self, w: Tensor, psi: Tensor) -> Tensor:
        """Mean cross-entropy on the clean samples."""
        return cross_entropy(self.x_clean @ w.T, self.y_clean)

    def start(self) -> Tensor:
        """Weights of zero."""
        return self.x.new_zeros(int(self.y_clean.max()) + 1, self.x.shape[1])

    def descend(self, w: Tensor, psi: Tensor, steps: int) -> Tensor:
        """``steps`` plain gradient steps."""
        with torch.enable_grad():
            for _ in range(steps):
                w = w.detach().requires_grad_()
                w = w - self.step_size * grad(self.lower(w, psi.detach()), w)[0]
        return w.detach()


def cleaning(samples: int, features: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Cleaning, Tensor]:
    """A problem with the features' variance falling as 1/j and a bound of 19 on the condition number; and a ``psi``."""
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    x = randn(2 * samples, features) / torch.arange(1, features + 1).sqrt()
    x *= (0.72 * samples / torch.linalg.eigvalsh(x[:samples].T @ x[:samples])[-1]).sqrt()
    y = (x @ randn(features, classes)).argmax(1)
    y[:classes] = y[samples : samples + classes] = torch.arange(classes)  # every class occurs
    wrong = torch.randperm(samples, generator=generator)[: samples // 2]
    y_train = y[:samples].clone()
    y_train[wrong] = torch.randint(classes, (len(wrong),), generator=generator)
    psi = randn(samples)
    # the Hessian of the cross-entropy is at most half of x x^T, and the weights are below 1
    problem = Cleaning(x[:samples].to(dtype), y_train, x[samples:].to(dtype), y[samples:], 1 / (0.5 * 0.72 + Cleaning.ridge))
    return problem, psi.to(dtype).requires_grad_()


# The shortest plain torch programs for the same arithmetic.


def floor_unrolled(problem: Cleaning, psi: Tensor, steps: int) -> Tensor:
    """RHG: the graph of every step is kept."""
    w = problem.start().requires_grad_()
    for _ in range(steps):
        w = w - problem.step_size * grad(problem.lower(w, psi), w, create_graph=True)[0]
    return grad(problem.upper(w, psi), psi)[0]


def floor_rebuilt(problem: Cleaning, psi: Tensor, steps: int, window: int | None = None) -> Tensor:
    """RHG from stored iterates, one step's graph at a time; TRHG: the last ``window`` steps."""
    states = [problem.descend(problem.start(), psi, steps - (window or steps))]
    for _ in range(window or steps):
        states.append(problem.descend(states[-1], psi, 1))
    w = states.pop().requires_grad_()
    v, total = grad(problem.upper(w, psi), w)[0], torch.zeros_like(psi)
    while states:
        w = states.pop().requires_grad_()
        new = w - problem.step_size * grad(problem.lower(w, psi), w, create_graph=True)[0]
        v, more = grad(new, (w, psi), v)
        total += more
    return total


def linearised(problem: Cleaning, psi: Tensor, w: Tensor) -> tuple[Tensor, Callable, Callable]:
    """At ``w``: the lower gradient, products with the lower Hessian, and with minus the mixed derivative."""
    w = w.requires_grad_()
    slope = grad(problem.lower(w, psi), w, create_graph=True)[0]
    return slope, lambda v: grad(slope, w, v, retain_graph=True)[0], lambda v: -grad(slope, psi, v)[0]


def conjugate_gradient(hessian: Callable, b: Tensor, iterations: int) -> Tensor:
    """Plain conjugate gradients from zero."""
    v, r, p, rr = torch.zeros_like(b), b, b, b.flatten().dot(b.flatten())
    for _ in range(iterations):
        h = hessian(p)
        alpha = rr / p.flatten().dot(h.flatten())
        v, r, old = v + alpha * p, r - alpha * h, rr
        rr = r.flatten().dot(r.flatten())
        if rr < 1e-30:
            break
        p = r + rr / old * p
    return v


def implicit_cg(problem: Cleaning, psi: Tensor, w: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Implicit differentiation at ``w`` by conjugate gradients."""
    _, hessian, mixed = linearised(problem, psi, w)
    return mixed(conjugate_gradient(hessian, grad(problem.upper(w, psi), w)[0], iterations))


def floor_cg(problem: Cleaning, psi: Tensor, steps: int) -> Tensor:
    """At ``w_K`` by conjugate gradients."""
    return implicit_cg(problem, psi, problem.descend(problem.start(), psi, steps))


def floor_neumann(problem: Cleaning, psi: Tensor, steps: int, terms: int = TERMS) -> Tensor:
    """At ``w_K`` by Neumann's series."""
    w = problem.descend(problem.start(), psi, steps)
    _, hessian, mixed = linearised(problem, psi, w)
    v = term = grad(problem.upper(w, psi), w)[0]
    for _ in range(terms):
        term = term - problem.step_size * hessian(term)
        v = v + term
    return mixed(problem.step_size * v)


def library(way, **options) -> Program:
    """The same through `odlkit.bilevel.hypergradient`."""

    def program(problem: Cleaning, psi: Tensor, steps: int) -> Tensor:
        step = descent(problem.lower, problem.step_size)
        found = hypergradient(step, problem.upper, psi, problem.start(), steps=steps, way=way, **options)
        return found.gradient

    return program


def programs() -> dict[str, dict[str, Program]]:
    """Task -> name -> program; the first of a task is its floor."""
    ours = {
        "RHG": {
            "floor": floor_unrolled,
            "floor, rebuilt": floor_rebuilt,
            "odlkit": library(Unrolled()),
            "odlkit, checkpointed": library(Unrolled("checkpointed")),
            "odlkit, rebuilt": library(Unrolled("rebuilt")),
        },
        "TRHG": {
            "floor": partial(floor_rebuilt, window=WINDOW),
            "odlkit": library(Truncated(WINDOW)),
            "odlkit, rebuilt": library(Truncated(WINDOW, "rebuilt")),
        },
        "CG": {
            "floor": floor_cg,
            "odlkit": library(Implicit("cg", tol=0, max_iter=ITERATIONS)),
            "odlkit, to 1e-4": library(Implicit("cg", tol=1e-4)),
        },
        "Neumann": {"floor": floor_neumann, "odlkit": library(Implicit("neumann", tol=0, max_iter=TERMS))},
    }
    theirs = peers.programs()
    return {task: members | theirs[task] for task, members in ours.items()}


# References in double precision.


def references(size: str) -> tuple[dict[str, Tensor], Tensor]:
    """Task -> its exact result in exact arithmetic; and the hypergradient at the minimiser, found by Newton's method."""
    problem, psi = cleaning(*SIZES[size], dtype=torch.float64)
    w = problem.descend(problem.start(), psi, K)
    implicit = implicit_cg(problem, psi, w.clone(), 60)
    for _ in range(4):
        slope, hessian, _ = linearised(problem, psi, w)
        w = (w - conjugate_gradient(hessian, slope.detach(), 60)).detach()
    left = linearised(problem, psi, w)[0].norm().item()
    assert left < 1e-13, f"Newton's method ended with a gradient of {left:.1e}"
    truncated = floor_rebuilt(problem, psi, K, WINDOW)
    own = {"RHG": floor_unrolled(problem, psi, K), "TRHG": truncated, "CG": implicit, "Neumann": implicit}
    return own, implicit_cg(problem, psi, w, 60)


def error(found: Tensor, exact: Tensor) -> float:
    """Relative distance, three digits."""
    return float(f"{((found.double() - exact).norm() / exact.norm()).item():.2e}")


# Memory: the rise of the process' peak during one call, in a fresh process that has made the same call on a tiny problem.


def child(task: str, name: str, steps: int) -> None:
    """In the fresh process: print the rise in MiB."""
    torch.set_num_threads(1)
    program, problem = programs()[task][name], cleaning(*SIZES["large"])
    program(*cleaning(*SIZES["tiny"]), K)
    print(rise(lambda: program(*problem, steps)))


def memory(task: str, name: str, steps: int = K, repeats: int = 3) -> float | None:
    """Median MiB of fresh processes; None where memory cannot be watched."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    call = f"import hypergradient; hypergradient.child({task!r}, {name!r}, {steps})"
    return round(statistics.median(fresh("-c", call) for _ in range(repeats)), 1)


# Ten outer steps: where the tolerance and the warm start of odlkit's adjoint solve pay.


def outer_steps(count: int = 10) -> dict[str, dict]:
    """Adam on ``psi``; at each of its points every program has the same task.  Products, times, worst error of each."""
    problem, psi = cleaning(*SIZES["large"])
    exact, exact_psi = cleaning(*SIZES["large"], dtype=torch.float64)
    step, warm, totals = descent(problem.lower, problem.step_size), {}, {}
    rivals = peers.programs()["CG"]
    optimiser = torch.optim.Adam([psi], lr=0.1)

    def record(name: str, seconds: float, products: int, found: Tensor, reference: Tensor) -> None:
        total = totals.setdefault(name, {"seconds": 0.0, "products": 0, "error": 0.0})
        total["seconds"] += seconds
        total["products"] += products
        total["error"] = max(total["error"], error(found, reference))

    for _ in range(count):
        w = problem.descend(problem.start(), psi, K)
        exact_psi.data = psi.detach().double()
        reference = implicit_cg(exact, exact_psi, w.double(), 60)
        for name, rival in rivals.items():
            start = time.process_time()
            found = rival(problem, psi, K)
            record(name, time.process_time() - start, ITERATIONS, found, reference)
        for name, keep in (("odlkit, cold", False), ("odlkit, warm", True)):
            start = time.process_time()
            options = {"steps": K, "way": Implicit("cg", tol=1e-4), "warm": warm.get(name) if keep else None}
            result = hypergradient(step, problem.upper, psi, problem.start(), **options)
            record(name, time.process_time() - start, result.adjoint_iterations, result.gradient, reference)
            warm[name] = result.warm
        psi.grad = result.gradient
        optimiser.step()
    return totals


def timed(size: str, rounds: int, repeats: int) -> list[dict]:
    """Rows of all tasks at one size; every program of every task takes its turn in each round."""
    problem, psi = cleaning(*SIZES[size])
    tasks = programs()
    flat = {(task, name): program for task, members in tasks.items() for name, program in members.items()}
    found: dict[tuple[str, str], Tensor] = {}
    calls = {key: lambda key=key: found.update({key: flat[key](problem, psi, K)}) for key in flat}
    times = compare(calls, rounds, repeats)
    own, exact = references(size)
    rows = []
    for task, members in tasks.items():
        spent = {name: times[task, name] for name in members}
        for name in members:
            extra = {"error": error(found[task, name], own[task]), "to exact": error(found[task, name], exact)}
            rows.append(row(f"{task}, {size}", name, spent) | extra)
    return rows


def best(rows: list[dict], task: str, key: str) -> float:
    """The least value among the peers of a task."""
    return min(r[key] for r in rows if r["task"] == task and r["program"].split()[0] in peers.PEERS)


def claim(text: str, value: float, bar: float) -> dict:
    """One line of the verdict."""
    print(f"{'met' if value <= bar else 'MISSED'}: {text}: {value:.3g}, bar {bar:g}", flush=True)
    return {"claim": text, "value": float(f"{value:.4g}"), "bar": bar, "met": value <= bar}


def main() -> None:
    """Times at two sizes, memory, ten outer steps; then what they say of the bars."""
    options = arguments(__doc__.splitlines()[0], rounds=7, small=1, memory=3)
    there = peers.versions()
    missing = [name for name in peers.PEERS if name not in there]
    if missing:
        print(f"not installed, so left out: {', '.join(missing)}", flush=True)
    rows = timed("large", options.rounds, 1)
    rows += timed("small", options.rounds, 10) if options.small else []
    flat = {}
    if options.memory:
        for r in (r for r in rows if r["task"].endswith("large")):
            r["MiB"] = memory(r["task"].split(",")[0], r["program"], repeats=options.memory)
        for task in ("RHG", "CG", "Neumann"):
            flat[task] = {str(steps): memory(task, "odlkit", steps, options.memory) for steps in (K, 2 * K, 4 * K)}
        print(f"odlkit's MiB against the number of steps: {flat}", flush=True)
    outer = outer_steps()
    print(f"ten outer steps: {outer}", flush=True)
    ours = {r["program"]: r for r in rows if r["task"] == "RHG, large"}
    verdict = [claim("CG, ten outer steps, warm: worst error", outer["odlkit, warm"]["error"], 1e-4)]
    fixed = 10 * ITERATIONS
    verdict += [claim("CG, ten outer steps, warm: products over 20 a step", outer["odlkit, warm"]["products"] / fixed, 0.5)]
    if options.memory:
        for task in ("CG", "Neumann"):
            verdict += [claim(f"{task}: MiB more at 4 K than at K", flat[task][str(4 * K)] - flat[task][str(K)], 1.0)]
    if not missing:
        time_of = best(rows, "RHG, large", "ratio")  # ratios of the same rounds, so that a busy machine cancels
        verdict += [claim("RHG: time over the best peer's", ours["odlkit"]["ratio"] / time_of, 1.05)]
        verdict += [claim("RHG, rebuilt: time over the best peer's", ours["odlkit, rebuilt"]["ratio"] / time_of, 1.7)]
        if options.memory:
            held = best(rows, "RHG, large", "MiB")
            verdict += [claim("RHG, rebuilt: memory over the best peer's", ours["odlkit, rebuilt"]["MiB"] / held, 0.2)]
    notes = {"peers": there, "missing": missing, "memory_by_steps": flat, "outer_steps": outer, "claims": verdict}
    finish(rows, options.json, dtype="float32", steps=K, sizes=SIZES, **notes)


if __name__ == "__main__":
    main()
