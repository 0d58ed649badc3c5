"""Networks that are 1-Lipschitz in l2 on the iterate, with a bound that is recomputed from the weights: HODL's D_net.

A spectral normalization by power iterations approaches the norm from below.  So training here projects (HODL's
Algorithm 1 projects omega as well), and `bound` takes singular values in float64.  `lipschitz` gives the bound of a network
made of these modules or of convolutions (`odlkit.networks.normalize`).  In another metric: `odlkit.models.hodl.conjugated`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from odlkit.networks.normalize import lipschitz_bound


def soft(u: Tensor, threshold: Tensor | float) -> Tensor:
    """The soft threshold ``sign(u) max(|u| - threshold, 0)``, elementwise, differentiable in a threshold >= 0."""
    threshold = torch.as_tensor(threshold, dtype=u.dtype, device=u.device)
    return u - u.clamp(-threshold, threshold)


def lipschitz(net: nn.Module) -> float:
    """A Lipschitz constant of ``net`` in its first argument: the module's own ``bound()``, else `lipschitz_bound`.

    Raises ``ValueError`` for a network without either.
    """
    own = getattr(net, "bound", None)
    return float(own()) if callable(own) else lipschitz_bound(net)


class LearnedISTA(nn.Module):
    """``D_net(u; b) = soft(W u + V b, theta)``: one step of a learned ISTA, 1-Lipschitz in u iff ``sigma(W) <= 1``.

    ``W`` (n, n) and ``V`` (n, m) act on the last dimension, u is ``(B, n)``, b ``(B, m)``; ``theta`` (n) is the magnitude of
    ``threshold``, so never negative.  Any V is allowed: it moves the fixed point, not distances.  (The fully connected layer
    with ReLU that the paper names cannot produce a negative code.)  Source: HODL section 4.2, after LISTA.
    """

    def __init__(self, n: int, m: int, threshold: float = 0.0, dtype: torch.dtype | None = None):
        super().__init__()
        self.W = nn.Parameter(torch.eye(n, dtype=dtype))
        self.V = nn.Parameter(torch.zeros(n, m, dtype=dtype))
        self.threshold = nn.Parameter(torch.full((n,), float(threshold), dtype=dtype))

    @classmethod
    def of_dictionary(cls, q: Tensor, weight: float, share: float = 1.0) -> LearnedISTA:
        """A network that is one proximal-gradient step on ``||Q u - b||^2 / 2 + weight ||u||_1`` before it is trained.

        ``W = I - g Q^T Q, V = g Q^T, theta = g weight`` with ``g = share / ||Q||^2``; Q is (m, n).  Raises ``ValueError``
        for a share outside (0, 2], with which sigma(W) would exceed 1.
        """
        if not 0 < share <= 2:
            raise ValueError(f"share: expected a number in (0, 2], got {share}")
        step = share / torch.linalg.matrix_norm(q.double(), 2).item() ** 2
        net = cls(q.shape[1], q.shape[0], step * weight, q.dtype).to(q.device)
        with torch.no_grad():
            net.W.sub_(step * q.mT @ q)
            net.V.copy_(step * q.mT)
        return net

    def forward(self, u: Tensor, b: Tensor) -> Tensor:
        return soft(u @ self.W.mT + b @ self.V.mT, self.threshold.abs())

    def bound(self) -> float:
        """``sigma_max(W)``, by singular values in float64."""
        return torch.linalg.matrix_norm(self.W.detach().double(), 2).item()

    def project(self) -> LearnedISTA:
        """Clip the singular values of W at 1 (the nearest such matrix), so that ``bound() <= 1``; changes and returns self.

        They are clipped below 1 by the rounding of W's own precision.
        """
        with torch.no_grad():
            left, sigma, right = torch.linalg.svd(self.W.double())
            most = 1 - 8 * math.sqrt(len(sigma)) * torch.finfo(self.W.dtype).eps
            if sigma[0] > most:
                self.W.copy_((left * sigma.clamp_max(most)) @ right)
        return self


class AveragedResidual(nn.Module):
    """``x -> (1 - theta) x + theta N(x, ...)``, theta in [0, 1]: 1-Lipschitz if N is, unlike ``x + N(x)``, which has 2.

    theta is the logistic function of a weight and starts at ``theta``; further arguments (data, a noise level) go to N.
    Raises ``ValueError`` for a start outside (0, 1).  Source: HODL section 2.2, the averaged step, inside a network.
    """

    def __init__(self, net: nn.Module, theta: float = 0.5):
        super().__init__()
        if not 0 < theta < 1:
            raise ValueError(f"theta: expected a number in (0, 1), got {theta}")
        self.net = net
        self.logit = nn.Parameter(torch.tensor(math.log(theta / (1 - theta))))

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return x + self.logit.sigmoid().to(x) * (self.net(x, *rest) - x)

    def bound(self) -> float:
        """``1 - theta + theta bound(N)``."""
        theta = self.logit.detach().double().sigmoid().item()
        return 1 - theta + theta * lipschitz(self.net)


class Chain(nn.Module):
    """``N_K o ... o N_1``, every network with the same further arguments; its bound is the product of theirs."""

    def __init__(self, nets: Sequence[nn.Module]):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        for net in self.nets:
            x = net(x, *rest)
        return x

    def bound(self) -> float:
        """``prod_j bound(N_j)``."""
        return math.prod(lipschitz(net) for net in self.nets)


def project(net: nn.Module) -> nn.Module:
    """Call ``project()`` of every part of ``net`` that has one, after each step of an optimiser; returns ``net``.

    With omega = the weights this is the projection of HODL's Algorithm 1, Euclidean (a metric G acts on u, not on omega).
    Eq: HODL Algorithm 1.
    """
    for part in net.modules():
        if isinstance(part, LearnedISTA):
            part.project()
    return net
