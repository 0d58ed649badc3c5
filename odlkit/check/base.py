"""What every checker uses: `exercise` makes one of a generator of properties, on inputs that a few seeds draw."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from odlkit.operators import Blur
from odlkit.priors import Lp
from odlkit.problem import LeastSquares, Problem

Property = tuple[str, Any, str]  # name, whether it held, hint


class NotYet(AssertionError):
    """A property of an exercise's function does not hold yet."""


def exercise(properties: Callable[[Any], Iterator[Property]]) -> Callable[[Any], None]:
    """Make a checker of a generator of properties; an error inside the checked function fails the property *runs*."""
    label = properties.__name__

    @functools.wraps(properties)
    def checker(function: Any) -> None:
        held: dict[str, None] = {}
        try:
            for name, holds, hint in properties(function):
                if not bool(holds):
                    raise NotYet(f"{label}: {name}: not yet. {hint}")
                held[name] = None
        except NotYet:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise NotYet(f"{label}: runs: not yet. It raised {what} Expected {properties.__doc__}") from error
        print(f"{label} passed: {', '.join(held)}")

    return checker


def draws(count: int = 3) -> Iterator[Callable[..., Tensor]]:
    """``randn(*shape)`` in float64, from a few fixed seeds."""
    for seed in range(count):
        yield functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """``<a, b>`` over everything."""
    return (a * b).sum()


def like(result: Any, expected: Tensor) -> Property:
    """The result is a finite tensor of this shape, dtype and device."""
    got = f"{tuple(result.shape)} {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
    fits = got == f"{tuple(expected.shape)} {expected.dtype}" and result.device == expected.device
    hint = f"Expected a finite tensor {tuple(expected.shape)} {expected.dtype}, got {got}."
    return "shape and dtype", fits and bool(result.isfinite().all()), hint


def blur_of(randn: Callable[..., Tensor]) -> Blur:
    """A well-conditioned blur whose kernel no reflection leaves as it is."""
    kernel = randn(3, 5).abs() + torch.arange(15).view(3, 5)
    kernel *= 0.5 / kernel.sum()
    kernel[1, 2] += 0.5
    return Blur(kernel)


def problem_of(randn: Callable[..., Tensor], p: float = 1) -> tuple[Problem, Tensor]:
    """``1.5 ||A x - y||^2 + 0.05 ||x||_p^p`` for two images of 8 x 10, and a start."""
    A = blur_of(randn)
    return Problem(LeastSquares(A, A.A(randn(2, 1, 8, 10)), 3.0), Lp(p, 0.05)), randn(2, 1, 8, 10)
