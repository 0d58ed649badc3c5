"""FISTA, ADMM and TV deconvolution: what `propagate` costs over a bare torch loop with the same arithmetic.

Each floor is the shortest plain loop one would write: the spectrum, its square and the denominator are kept, two real
transforms an iteration.  Both programs give the same iterates, which is checked before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import arguments, compare, finish, row
from torch import Tensor
from torch.fft import irfft2, rfft2
from torch.nn.functional import relu, softshrink

from odlkit.data import sample
from odlkit.operators import Blur, Gradient
from odlkit.priors import GroupLp, Lp
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import propagate
from odlkit.solvers import ADMM, FISTA

Run = Callable[[int], Tensor]  # number of iterations -> the last iterate
L1, TV = (0.004, 0.1), (0.002, 0.04)  # (weight, penalty) of the two priors
SLACK = 1e-4  # TV: objective within this of the floor's after 100 iterations


def gaussian(width: float = 2.0, size: int = 17) -> Tensor:
    """The blur kernel: a Gaussian of standard deviation ``width``, sum 1."""
    g = torch.exp(-((torch.arange(size) - size // 2) ** 2) / (2 * width**2))
    return g[:, None] * g / g.sum() ** 2


def spikes(size: int) -> Tensor:
    """One pixel in a hundred is lit, with a height between 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(2, 1, 1, size, size, generator=generator)
    return (draw[0] < 0.01) * draw[1]


def blurred(truth: Tensor) -> Tensor:
    """Circular blur and 1 % noise."""
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    return Blur(gaussian()).A(truth) + 0.01 * noise


def otf(y: Tensor) -> Tensor:
    """The floors' spectrum: the kernel in the corner of an image like ``y``, transformed."""
    k, (height, width) = gaussian(), y.shape[-2:]
    padded = torch.zeros(height, width)
    padded[: len(k), : len(k)] = k
    return rfft2(padded.roll((-(len(k) // 2), -(len(k) // 2)), (0, 1)))


def fista_floor(y: Tensor) -> Run:
    """FISTA on ``||A x - y||^2 / 2 + weight ||x||_1``."""
    k = otf(y)
    gram, back = k.abs().square(), irfft2(k.conj() * rfft2(y), s=y.shape[-2:])
    tau = 1 / gram.max().item()

    def run(steps: int) -> Tensor:
        x, z, t = y, y, 1.0
        for _ in range(steps):
            old, x = x, softshrink(z - tau * (irfft2(gram * rfft2(z), s=y.shape[-2:]) - back), L1[0] * tau)
            t_old, t = t, (1 + (1 + 4 * t * t) ** 0.5) / 2
            z = x + (t_old - 1) / t * (x - old)
        return x

    return run


def admm_floor(y: Tensor) -> Run:
    """ADMM on the same objective, the data step by one division in the Fourier domain."""
    (weight, rho), k = L1, otf(y)
    inverse, back = 1 / (k.abs().square() + rho), irfft2(k.conj() * rfft2(y), s=y.shape[-2:])

    def run(steps: int) -> Tensor:
        v, nu = y, torch.zeros_like(y)
        for _ in range(steps):
            t = irfft2(inverse * rfft2(back + rho * (v - nu)), s=y.shape[-2:]) + nu
            v = softshrink(t, weight / rho)
            nu = t - v
        return v

    return run


def tv_floor(y: Tensor) -> Run:
    """ADMM on ``||A x - y||^2 / 2 + weight TV(x)``, isotropic, split at the gradient: one solve an iteration."""
    (weight, rho), k = TV, otf(y)
    height, width = y.shape[-2:]
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width // 2 + 1) / width
    laplacian = 4 * (torch.sin(torch.pi * rows) ** 2 + torch.sin(torch.pi * columns) ** 2)
    inverse, back = 1 / (k.abs().square() + rho * laplacian), irfft2(k.conj() * rfft2(y), s=y.shape[-2:])

    def gradient(x: Tensor) -> Tensor:
        return torch.cat([x.roll(-1, -1) - x, x.roll(-1, -2) - x], 1)

    def run(steps: int) -> Tensor:
        x, v, nu = y, gradient(y), torch.zeros(1, 2, height, width)
        for _ in range(steps):
            dx, dy = (v - nu).chunk(2, 1)
            x = irfft2(inverse * rfft2(back + rho * (dx.roll(1, -1) - dx + dy.roll(1, -2) - dy)), s=y.shape[-2:])
            t = gradient(x) + nu
            v = t * relu(1 - weight / rho / (t[:, :1] ** 2 + t[:, 1:] ** 2).sqrt())
            nu = t - v
        return x

    return run


def library(step, make: Callable[[Tensor], Problem], y: Tensor, **options) -> Run:
    """The same through `propagate`."""
    problem = make(y)
    return lambda steps: propagate(step, problem, y, steps=steps, **options).x


def spike_problem(y: Tensor) -> Problem:
    """l1 on the pixels."""
    return Problem(LeastSquares(Blur(gaussian()), y), Lp(1, L1[0]))


def tv_problem(y: Tensor) -> Problem:
    """Isotropic total variation as a group prior of the gradient."""
    return Problem(LeastSquares(Blur(gaussian()), y), GroupLp(1, TV[0]), Gradient())


def steps_to(run: Run, energy: Callable[[Tensor], float], target: float, limit: int = 128) -> int:
    """The first iteration whose objective is at most ``target``, by bisection: the objective falls towards the end."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if energy(run(middle)) <= target else (middle, high)
    return high


def measure(task: str, floor, step, make, y: Tensor, steps: int, rounds: int, bar: float) -> list[dict]:
    """Rows of one task: the iterations (set-up done before), then the set-up with a first iteration."""
    bare, ours = floor(y), library(step, make, y, energy=False)
    for n in (1, 2, 20):
        torch.testing.assert_close(ours(n), bare(n), rtol=1e-4, atol=1e-5)
    energy = make(y).energy
    if task == "TV":
        target = (1 + SLACK) * energy(bare(100)).item()
        counts = [steps_to(run, lambda x: energy(x).item(), target) for run in (bare, ours)]
        print(f"{task}: floor and odlkit reach the objective {target:.5g} after {counts} iterations", flush=True)
    else:
        counts = [steps, steps]
    sparse, full = library(step, make, y, energy=False, every=10), library(step, make, y)
    programs = {
        "floor": lambda: bare(counts[0]),
        "odlkit": lambda: ours(counts[1]),
        "odlkit, every=10": lambda: sparse(counts[1]),
        "odlkit, with energies": lambda: full(counts[1]),
    }
    times = compare(programs, rounds)
    name = f"{task} {y.shape[-1]}²"
    # TV is judged by the time to the objective, the others by the iteration
    label, calls = (f"{name}, to the objective", 1) if task == "TV" else (f"{name}, an iteration", steps)
    rows = [row(label, p, times, calls, None if p in ("floor", "odlkit, with energies") else bar) for p in programs]
    times = compare({"floor": lambda: floor(y)(1), "odlkit": lambda: library(step, make, y, energy=False)(1)}, rounds)
    return rows + [row(f"{name}, set-up and one iteration", p, times) for p in times]


def main() -> None:
    """Both sizes; a size of 0 is left out."""
    options = arguments(__doc__.splitlines()[0], rounds=11, small=256, large=1024)
    rows = []
    for size, steps in ((options.small, 40), (options.large, 8)):
        if not size:
            continue
        dots, camera = blurred(spikes(size)), blurred(sample("camera", size))
        for task in (
            ("FISTA l1", fista_floor, FISTA(), spike_problem, dots, steps, options.rounds, 1.15),
            ("ADMM l1", admm_floor, ADMM(L1[1]), spike_problem, dots, steps, options.rounds, 1.15),
            ("TV", tv_floor, ADMM(TV[1]), tv_problem, camera, steps, options.rounds, 1.5),
        ):
            if task[0] == "TV" and size == options.large:
                continue  # its time to the objective is measured at one size
            rows += measure(*task)
            print(f"{task[0]} {size}: ratio {rows[-5]['ratio']}", flush=True)
    finish(rows, options.json, dtype="float32", blur="circular Gaussian, sigma 2", noise=0.01, l1=L1, tv=TV, tv_slack=SLACK)


if __name__ == "__main__":
    main()
