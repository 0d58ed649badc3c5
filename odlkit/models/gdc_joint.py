"""The jointly trained cascade of GDC: the weights of all its modules, shared by the stages, and a few numbers a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from odlkit.linear import LinearMap
from odlkit.models.gdc import Corrective, Discriminative, Generative, Module
from odlkit.models.padnet import Schedule
from odlkit.networks.classifier import Classifier
from odlkit.networks.conv import ConvUnit
from odlkit.priors import details
from odlkit.problem import LeastSquares, Problem

HAAR = 3  # levels of the wavelet prior: both sides of an image are multiples of 2^3
REFERENCE = 0.02  # the noise level at which only the first number of a pair counts
SPEED = 4.0  # the numbers live in logarithms and are few: they may move faster than the weights


class CascadeNet(nn.Module):
    """``GM``, ``GD``, ``GC`` or ``GDC`` for ``||A u - y||^2 + lambda ||B^T u||_p^p``, B^T the Haar analysis.

    A stage is ``argmin f + (gamma / 2) ||. - u||^2`` (7), then ``u + G(u)`` (2), then, as the scheme says, ``u + s D(u)``
    (4) and ``prox_{phi / c}(u - grad f(u) / c)`` (6).  All stages share the networks G and d.  Each has its own noise
    level alpha, and gamma, s and c; these, and lambda, start at

        alpha_t = first^(1 - t/(T-1)) last^(t/(T-1)), gamma_t = 2 (sigma / alpha_t)^2, s_t = step, c_t = 20, lambda = sigma^2

    and are learned as factors ``exp(4 (a + b log10(sigma / 0.02)))``.  Untrained it is the greedy cascade.  ``last`` =
    None is sigma itself.  With ``guided`` G also sees a picture of one channel, such as the mask of an interpolation.  In
    training mode G computes in bfloat16, unless ``mixed`` is False.  (GDC section VI-C, Tables III and IV.)
    """

    def __init__(
        self,
        scheme: str,
        unit: dict,
        classifier: dict | None = None,
        stages: int = 5,
        first: float = 0.2,
        last: float | None = None,
        step: float = 1.0,
        p: float = 1.0,
        guided: bool = False,
    ):
        super().__init__()
        self.mixed = True
        if scheme not in ("GM", "GD", "GC", "GDC"):
            raise ValueError(f"scheme: expected GM, GD, GC or GDC, got {scheme!r}")
        if ("D" in scheme) != (classifier is not None):
            raise ValueError(f"classifier: expected one exactly where the scheme has D, got {classifier} for {scheme}")
        self.config: dict[str, Any] = {
            "scheme": scheme,
            "unit": unit,
            "classifier": classifier,
            "stages": stages,
            "first": first,
        }
        self.config |= {"last": last, "step": step, "p": p, "guided": guided}
        self.scheme, self.stages, self.guided = scheme, stages, guided
        self.unit = ConvUnit(**unit)
        self.classifier = Classifier(**classifier) if classifier is not None else None
        names = ["alpha", "gamma", *["s"] * ("D" in scheme), *["c", "lambda"] * scheme.endswith("C")]
        self.factors = nn.ParameterDict({name: nn.Parameter(torch.zeros(stages, 2)) for name in names})

    def factor(self, name: str, stage: int, sigma: Tensor) -> Tensor:
        """``exp(4 (a + b log10(sigma / 0.02)))`` of one stage, ``(B, 1, 1, 1)``."""
        a, b = self.factors[name][min(stage, self.stages - 1)]
        return (SPEED * (a + b * (sigma / REFERENCE).log10())).exp()

    def problem(self, operator: LinearMap, y: Tensor, sigma: Tensor) -> Problem:
        """The energy; a prior only where the scheme corrects with it.  ``sigma`` is ``(B, 1, 1, 1)``."""
        fidelity = LeastSquares(operator, y, 2.0)
        if "lambda" not in self.factors:
            return Problem(fidelity)
        weight = self.factor("lambda", 0, sigma) * sigma.square()
        return Problem(fidelity, details(y, weight, self.config["p"], levels=HAAR))

    def modules_for(self, sigma: Tensor, guide: Tensor | None = None) -> Sequence[Module]:
        """One stage, for `odlkit.models.gdc.Cascade`; ``sigma`` is ``(B, 1, 1, 1)``, ``guide`` ``(B or 1, 1, H, W)``."""
        if (guide is None) == self.guided:
            raise ValueError(f"guide: expected {'a picture' if self.guided else 'none'} for this network")
        first, last = self.config["first"], self.config["last"]
        schedule = Schedule.between(first, sigma if last is None else last, self.stages)

        def alpha(stage: int) -> Tensor:
            return schedule(min(stage, self.stages - 1))[1] * self.factor("alpha", stage, sigma)

        def gamma(stage: int) -> Tensor:
            return 2 * (sigma / alpha(stage)).square() * self.factor("gamma", stage, sigma)

        def network(v: Tensor, level: Tensor) -> Tensor:
            z = v if guide is None else torch.cat([v, guide.to(v).expand(len(v), -1, -1, -1)], 1)
            with torch.autocast(v.device.type, torch.bfloat16, enabled=self.training and self.mixed):
                noise = self.unit(z, level)[:, : v.shape[1]]
            return v - level * noise.to(v)

        modules: list[Module] = [Corrective(gamma, partial=True), Generative(network, alpha)]
        if self.classifier is not None:
            step = self.config["step"]
            modules.append(Discriminative(self.classifier.potential, alpha, lambda t: step * self.factor("s", t, sigma)))
        if "c" in self.factors:
            modules.append(Corrective(lambda t: 20 * self.factor("c", t, sigma)))
        return modules
