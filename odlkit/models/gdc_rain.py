"""GDC for rain: Algorithm 2 on ``f(u) = ||u - y||^2`` with a generative and a discriminative module made of cells."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from odlkit.models.gdc import Discriminative, Generative, Module, PartiallyDefined, Penalty
from odlkit.networks.cells import CellNet, Genotype
from odlkit.operators import Identity
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import iterate


class RainNet(nn.Module):
    """The modules of Algorithm 2 for rain: ``u + G(u)``, then ``u - grad d(u)``; ``cells`` are those of G and of d.

    ``gamma_t = gamma growth^t``; the clip is ``c = gamma reach^2 n`` and the gate ``M = 2 bar sqrt(n)`` for pictures of n
    values: a first move of at most ``reach`` a value and, in all, of at most ``bar``, in root mean square.  Both networks
    serve every stage and are told it.  A genotype that is None is relaxed.  Eq: GDC Algorithm 2, (2), (4), (7).
    """

    def __init__(
        self,
        generative: Genotype | None = None,
        discriminative: Genotype | None = None,
        width: int = 8,
        stages: int = 2,
        cells: Sequence[int] = (4, 2),
        gamma: float = 16.0,
        growth: float = 4.0,
        reach: float = 0.3,
        bar: float = 0.4,
    ):
        super().__init__()
        self.config: dict[str, Any] = {"generative": generative, "discriminative": discriminative, "width": width}
        self.config |= {"stages": stages, "cells": list(cells), "gamma": gamma, "growth": growth, "reach": reach, "bar": bar}
        self.stages, self.G = stages, CellNet(cells[0], generative, width)
        self.d = CellNet(cells[1], discriminative, width, logits=True)

    def step(self, y: Tensor) -> PartiallyDefined:
        """Algorithm 2 for pictures of the shape of ``y`` ``(B, 3, H, W)``."""
        at, n = self.config, y[0].numel()

        def level(stage: int) -> float:
            return at["growth"] ** -stage

        modules: list[Module] = [Generative(self.G, level), Discriminative(self.d, level)]
        penalty, c = Penalty(at["gamma"], at["growth"]), at["gamma"] * at["reach"] ** 2 * n
        return PartiallyDefined(modules, penalty, 2 * at["bar"] * n**0.5, c)

    def problem(self, y: Tensor) -> Problem:
        """``f(u) = ||u - y||^2``, no prior."""
        return Problem(LeastSquares(Identity(), y, 2.0))

    def forward(self, y: Tensor) -> list[Tensor]:
        """``u^1 ... u^T`` from ``u^0 = y``, differentiable, the control included."""
        return [state.x for state, _ in islice(iterate(self.step(y), self.problem(y), y), self.stages)]
