"""What a recipe computes on, and how: the device, the networks' precision, compiled or not, how many times the batch.

`odlkit train` chooses once, for all of a run; a recipe asks here.  Random numbers are drawn on the CPU, so a run sees the
same data everywhere.  Only networks compute in bfloat16: transforms, linear solves and sums stay in float32.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Machine:
    """``device``: auto, cpu or cuda; ``precision`` of the networks: bf16 or float32; ``backend`` of torch.compile, or None.

    ``times``: a batch is so many times that of the recipe.  Raises ``ValueError`` for other words, a CUDA device that is not
    there, and ``times`` below 1.
    """

    device: str = "auto"
    precision: str = "bf16"
    backend: str | None = None
    times: int = 1

    def __post_init__(self) -> None:
        for name, known in (("device", ("auto", "cpu", "cuda")), ("precision", ("bf16", "float32"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected auto or cpu, since CUDA is not available here, got 'cuda'")
        if self.times < 1:
            raise ValueError(f"batch: expected 1 or more times the recipe's, got {self.times}")


_CHOSEN: ContextVar[Machine] = ContextVar("machine", default=Machine())  # noqa: B039 (frozen)


def chosen() -> Machine:
    """What the run was started with."""
    return _CHOSEN.get()


@contextmanager
def on(machine: Machine) -> Iterator[None]:
    """Recipes inside the block run so."""
    token = _CHOSEN.set(machine)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def best_device() -> torch.device:
    """The GPU where there is one and nobody said otherwise; under torchrun each process has its own."""
    if chosen().device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def mixed() -> bool:
    """Whether networks compute in bfloat16."""
    return chosen().precision == "bf16"


def autocast() -> torch.autocast:
    """The context in which a recipe calls its network."""
    return torch.autocast(best_device().type, torch.bfloat16, enabled=mixed())


def times(batch: int) -> int:
    """The size of a batch that is ``batch`` in the recipe."""
    return batch * chosen().times


def plain() -> None:
    """For a recipe that runs on the processor, as it is.  Raises ``ValueError`` where it was told anything else."""
    for name, value in asdict(chosen()).items():
        if value not in (getattr(Machine(), name), "cpu"):
            option = {"backend": "compile", "times": "batch"}.get(name, name)
            raise ValueError(f"{option}: expected no value, this recipe runs on the processor and as it is")


def prepare(parts: Sequence[nn.Module], validate: Callable[[], Any] | None = None) -> Callable[[], Any] | None:
    """Compile ``parts`` of a model in place, if that was asked for; returns ``validate`` so that it runs uncompiled.

    Parts are networks, whole; what lies around them, an iteration with transforms and linear solves, is left as it is.  They
    are compiled for the one shape that training has; validation has others, and would have every one of them compiled.
    Raises ``ValueError`` where a recipe has no parts to offer, since torch.compile cannot differentiate a gradient, and
    where the machine has no compiler.
    """
    if chosen().backend is None:
        return validate
    if not parts:
        raise ValueError("compile: expected no value, the networks of this recipe are not made for it")
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if chosen().backend == "inductor" and best_device().type == "cpu" and not any(map(shutil.which, compilers)):
        raise ValueError("compile: expected a C++ compiler on this machine, g++ or clang++, found none")
    for part in parts:
        part.compile(backend=chosen().backend, dynamic=False)
    return validate and partial(_eagerly, validate)


def _eagerly(call: Callable[[], Any]) -> Any:
    with torch.compiler.set_stance("force_eager"):
        return call()
