"""GDC's model of the deraining task: Algorithm 2 on ``||u - y||^2`` with searched modules, and Proposition 2 on the run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from odlkit import weights
from odlkit.models.gdc import PartiallyDefined
from odlkit.models.gdc_rain import RainNet
from odlkit.propagate import Result, propagate
from odlkit.tasks.report import ROUND_OFF, Outcome

NETWORK = "gdc-derain"


def restored(
    net: RainNet, y: Tensor, steps: int | None = None, progress: bool = False
) -> tuple[Tensor, Result, PartiallyDefined]:
    """``u^T``, the run and its step from rainy pictures ``y`` ``(B, 1 or 3, H, W)``; a gray one is three equal channels.

    Eq: GDC Algorithm 2.
    """
    z = y.expand(-1, 3, -1, -1)
    step = net.step(z)
    result = propagate(step, net.problem(z), z, steps=steps or net.stages, energy=False, progress=progress)
    return result.x.mean(1, keepdim=True) if y.shape[1] == 1 else result.x, result, step


def gdc_searched(y: Tensor, steps: int | None, progress: bool) -> Outcome:
    """The shipped network; ``steps`` beyond the trained stages add ever smaller moves."""
    net: Any = weights.load(NETWORK).to(y)
    x, result, step = restored(net, y, steps, progress)
    return Outcome(x, result, proposition_2(result, step, net.config["growth"]))


def proposition_2(result: Result, step: PartiallyDefined, growth: float) -> dict[str, Any]:
    """GDC's Proposition 2 on this run: ``||u^{t+1} - u^t|| <= M / gamma_t + sqrt(c / gamma_t)``, and the tails."""
    from odlkit.propositions.gdc import proposition_2_checks

    assert step.c is not None
    checks = proposition_2_checks(result.trace, step.gate, step.c, growth, ROUND_OFF)[1:]  # the first needs float64
    return {
        "guarantee": "GDC, Proposition 2: moves clipped to sqrt(c / gamma), a gate on the gradient, gamma that grows",
        "statement": "every step is at most M / gamma + sqrt(c / gamma), so the iterates converge; nothing says that the "
        "limit is free of rain, and the networks have learned drawn streaks only",
        "holds": all(check.holds for check in checks),
        "margin": min(check.margin for check in checks),
        "acceptance_rate": result.trace.acceptance_rate(),
        "within": result.trace["within"].mean().item(),
    }
