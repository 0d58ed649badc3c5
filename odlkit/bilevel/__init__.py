"""Bilevel optimization: the gradient of an upper loss through a lower iteration, and how far that gradient is from exact."""

from odlkit.bilevel.engine import LowerLevelError, Result, hypergradient
from odlkit.bilevel.solves import Status
from odlkit.bilevel.ways import Implicit, Truncated, Unrolled, descent

__all__ = ["Implicit", "LowerLevelError", "Result", "Status", "Truncated", "Unrolled", "descent", "hypergradient"]
