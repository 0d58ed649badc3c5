"""What the certificates are played on: small problems of real pictures, three networks, and the runs that controls need.

Everything is float64 and uses the pictures that ship inside scikit-image, so no data folder is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from odlkit import weights
from odlkit.control import AlwaysAccept
from odlkit.data import sample
from odlkit.models.padnet import Constants, Explicit, Implicit, Network, Schedule
from odlkit.networks import ConvUnit, RBFUnit, ResidualNet, clip_to_ball
from odlkit.operators import Blur, Gradient, Identity, Wavelet
from odlkit.priors import Lp
from odlkit.problem import LeastSquares, Problem, norm_items
from odlkit.propagate import Result, State, propagate

IMAGES = ("camera", "coins", "astronaut")
WEIGHT = {1.0: 2e-3, 0.8: 1.5e-3, 0.0: 1e-3}  # lambda of Eq. 14 for each p


def picture(name: str, size: int) -> Tensor:
    """A gray sample picture in float64, ``(1, 1, size, size)``."""
    return sample(name, size, gray=True).double()


def gaussian(size: int = 11, width: float = 1.5, delta: float = 0.0) -> Tensor:
    """A Gaussian kernel of sum 1; ``delta`` mixes in the identity, which keeps every frequency: a well-conditioned blur."""
    t = torch.arange(size, dtype=torch.float64) - size // 2
    kernel = torch.exp(-(t[:, None].square() + t.square()) / (2 * width**2))
    kernel *= (1 - delta) / kernel.sum()
    kernel[size // 2, size // 2] += delta
    return kernel


def blurred(name: str, size: int, kernel: Tensor) -> tuple[Blur, Tensor]:
    """The blur and a picture blurred by it, with 1% noise, ``(1, 1, size, size)``."""
    x, blur = picture(name, size), Blur(kernel)
    return blur, blur.A(x) + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)


def gradient_problem(name: str, size: int, p: float, kernel: Tensor) -> tuple[Problem, Tensor]:
    """``F(g) = ||k * g - D y||^2 / 2 + lambda ||g||_p^p`` on the two gradient channels, and ``D y``.  Eq: PADNet (14)."""
    blur, y = blurred(name, size, kernel)
    data = Gradient().A(y)
    return Problem(LeastSquares(blur, data), Lp(p, WEIGHT[p])), data


def _at_any_level(model: Any, schedule: dict) -> Callable[[Tensor, Any], Tensor]:
    """Networks that were trained one for each iteration, as one network: the stage whose alpha is nearest."""
    if "stages" not in schedule:
        return model

    def network(v: Tensor, alpha: Any) -> Tensor:
        k = round(2 * math.log(schedule["first"] / float(alpha)) / math.log(schedule["growth"]))
        return model.nets[min(max(k, 0), len(model.nets) - 1)](v, alpha)

    return network


TRAINED = {"rbf": "padnet-gradient", "conv": "padnet-image"}  # trained without the priors of the certificates


def networks(kind: str, bound: float | None = None, trained: str | None = None) -> dict[str, Network]:
    """A trained (if installed), an untrained and an adversarial network, for ``kind`` rbf or conv.

    ``trained`` names the weights, `TRAINED` by default.  The network computes in float32; the move it proposes is a float64
    tensor like any other, and with ``bound`` it is clipped in float64 to ``||N(v) - v|| <= bound alpha``.  The adversary
    moves eight times the opposite way and oscillates: ``v - 8 (N(v) - v) + 0.3 alpha sin(40 v)``.
    """
    trained = trained or TRAINED[kind]
    card = weights.cards().get(trained)
    with torch.random.fork_rng(devices=[]):  # building a module draws from the global generator
        torch.manual_seed(0)
        raw = ResidualNet([RBFUnit() if kind == "rbf" else ConvUnit(width=16)]).eval().requires_grad_(False)
        net = _at_any_level(weights.load(trained), card["schedule"]) if card else None

    def play(net: Callable, factor: float = 1.0, wave: float = 0.0) -> Network:
        def network(v: Tensor, alpha: Any) -> Tensor:
            move = factor * (net(v.float(), alpha).to(v) - v)
            move = move + wave * alpha * torch.sin(40 * v) if wave else move
            return v + (move if bound is None else clip_to_ball(move, bound * alpha))

        return network

    known = {"trained": play(net)} if net is not None else {}
    return known | {"untrained": play(raw), "adversary": play(raw, -8.0, 0.3)}


def alternating(network: Network) -> Network:
    """The same network with its move's sign changed at every call: weights ``W^k`` may vary with k."""
    sign = [1.0]

    def flip(v: Tensor, alpha: Any) -> Tensor:
        sign[0] = -sign[0]
        return v + sign[0] * (network(v, alpha) - v)

    return flip


class OnIterate(Explicit):
    """`Explicit` whose networks see ``x^k`` instead of ``u + nu``: Theorem 1 does not ask where a proposal comes from."""

    def proposals(self, x: Tensor, w: Tensor, alpha: float) -> Iterator[Tensor]:
        yield from (network(x, alpha) for network in self.networks)


def two_cycle(a: Tensor, weight: float) -> tuple[Problem, OnIterate]:
    """A problem and a run of EPADNet that meets Condition 1 with ``e = 0`` and alternates between two points for ever.

    ``F(x) = 0.2 ||x - a||^2 + weight ||x||_0``, ``mu = 0.1``, the paper's unit step.  The linear network ``A(x) = -5 x``,
    followed by the fidelity's prox, proposes ``v = 0.8 a - x``; from ``x = 0`` the orbit is 0, 0.8 a, 0, ... wherever
    ``1.25 sqrt(2 weight) < |a_i| < sqrt(2 weight) / 0.48``.  With ``weight = 0.9, a = 2.5`` it is the case in one dimension.
    """
    problem, constants = Problem(LeastSquares(Identity(), a, 0.4), Lp(0, weight)), Constants(0.1, 1.0, 0.04)
    return problem, OnIterate([lambda x, alpha: problem.fidelity.prox(-5 * x, 10.0)], constants, Schedule(1.0, 1.0))


def haar_band(size: int = 128, weight: float = 0.008) -> Tensor:
    """The 3-level Haar coefficients of camera for which `two_cycle` cycles, ``(1, 1, 1, n)``."""
    a, unit = Wavelet("haar", 3).A(picture("camera", size)).flatten(), (2 * weight) ** 0.5
    return a[(a.abs() > 1.25 * unit) & (a.abs() < unit / 0.48)].view(1, 1, 1, -1)


def deblur_run(name: str, size: int, p: float, network: Network, steps: int = 40) -> tuple[Constants, Result]:
    """EPADNet on `gradient_problem` with a Gaussian blur, constants from the problem's own L, two half-moves."""
    problem, data = gradient_problem(name, size, p, gaussian())
    constants = Constants.for_lipschitz(problem.lipschitz)
    return constants, propagate(Explicit([network], constants, Schedule(400.0, 1.2), halvings=2), problem, data, steps=steps)


def run_to_the_end(p: float, network: Network, size: int) -> tuple[Problem, Constants, Result]:
    """A well-conditioned blur; 40 steps with the network, then without it until nothing moves: criticality itself."""
    problem, data = gradient_problem("camera", size, p, gaussian(delta=0.5))
    constants = Constants.for_lipschitz(problem.lipschitz, moreau=8, tolerance=3.9)
    first = propagate(Explicit([network], constants, Schedule(400.0, 1.2)), problem, data, steps=40)
    last = propagate(Explicit([], constants), problem, first.x, steps=1000, tol=1e-9)
    last.trace.rows, last.trace.start = first.trace.rows + last.trace.rows, first.trace.start
    last.iterations += first.iterations
    return problem, constants, last


def unchecked_run(size: int, step_size: float | None = None) -> tuple[Problem, Constants, Result]:
    """Control: no error condition, no fallback; with a constant penalty it settles where the subgradient is not 0.

    With ``step_size = 1``, Eq. 7 as printed, and a growing penalty: at L = 1 the gradient step on f_k is expansive.
    """
    problem, data = gradient_problem("camera", size, 1.0, gaussian(delta=0.5 if step_size is None else 0.0))
    constants, schedule = Constants.for_lipschitz(problem.lipschitz), Schedule(1.0, 1.0)
    if step_size is not None:
        constants, schedule = Constants(1.9, step_size, 0.9), Schedule(25.0, 1.2)
    step = Explicit([networks("rbf")["untrained"]], constants, schedule, control=AlwaysAccept(), fallback=False)
    return problem, constants, propagate(step, problem, data, steps=200, raises=False)


def measure_gradient(problem: Problem, x0: Tensor, moreau: float) -> Callable[[State], Tensor]:
    """``M_k = ||grad f(u^{k+1}) + mu (u^{k+1} - x^k)||`` by definition, for ``propagate(measure={"gradient_fk": ...})``."""
    last = [x0]

    def measure(state: State) -> Tensor:
        old, last[0] = last[0], state.x
        return norm_items(problem.fidelity.grad(state.aux["u"]) + moreau * (state.aux["u"] - old))

    return measure


BOUND = 20.0  # C_N of Theorem 2's instances
IMPLICIT = Schedule(25.0, 1.5)


def implicit_run(name: str, size: int, network: Network, schedule: Callable = IMPLICIT, steps: int = 30) -> Result:
    """IPADNet on the image domain with mu = 0.5; ``M_k`` is measured from the gradient itself."""
    blur, y = blurred(name, size, gaussian())
    problem = Problem(LeastSquares(blur, y))
    measure = {"gradient_fk": measure_gradient(problem, y, 0.5)}
    return propagate(Implicit(network, schedule, 0.5), problem, y, steps=steps, measure=measure)  # type: ignore[arg-type]


def pushing(bound: float, shape: tuple[int, ...]) -> Network:
    """A network that uses up Condition 2: ``N(v) = v + bound alpha d`` with one fixed direction ``||d|| = 1``."""
    d = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return lambda v, alpha: v + bound * alpha * d / d.norm()
