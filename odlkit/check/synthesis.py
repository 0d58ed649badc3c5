"""Checkers of the chapter that compares the five methods."""

from __future__ import annotations

import torch

from odlkit.check.base import draws, exercise, like


@exercise
def syn_1(front):
    """``front(seconds, decibels)``: two vectors (n,) to a bool (n,): no other is as cheap, as good, and better in one."""
    for randn in draws():
        seconds, decibels = randn(9).abs().mul(4).round() + 1, randn(9).mul(3).round()  # with ties
        got = front(seconds, decibels)
        yield like(got, torch.zeros(9, dtype=torch.bool))
        beaten = [
            any(
                seconds[i] <= seconds[j]
                and decibels[i] >= decibels[j]
                and (seconds[i] < seconds[j] or decibels[i] > decibels[j])
                for i in range(9)
            )
            for j in range(9)
        ]
        yield "nothing beaten is kept", not (got & torch.tensor(beaten)).any(), "Some kept model is beaten by another."
        yield "nothing else is left out", (got | torch.tensor(beaten)).all(), "Some model that none beats is missing."


@exercise
def syn_2(compare):
    """``compare(a, b, paired)``: mean difference and its standard error, two scalars, from two vectors of scores."""
    for randn in draws():
        common = 5 * randn(12)
        a, b = common + 0.3 * randn(12) + 0.5, common + 0.3 * randn(12)
        mean, error = compare(a, b, True)
        yield like(mean, a.mean())
        yield "paired", abs(error - (a - b).std() / 12**0.5) < 1e-12, "Paired scores: the spread is that of the differences."
        mean, error = compare(a, b, False)
        exact = (a.var() / 12 + b.var() / 12) ** 0.5
        yield "separate sets", abs(error - exact) < 1e-12, "Separate sets: the variances of the two means add."
        yield "mean", abs(mean - (a.mean() - b.mean())) < 1e-12, "The difference of the two means is another number."
