"""Several processes on one problem: gradients and hypergradients of means over data or tasks, by `torch.distributed`.

Each process has its part of the data and the same state.  Nothing here does anything in a single process, so that one
program serves both.  ``torchrun --nproc-per-node 2 -m odlkit train RECIPE`` starts two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


class LostProcess(RuntimeError):
    """Another process did not answer: it was killed, has failed, or is stuck."""


@contextmanager
def joined(timeout: float = 300.0, **where: Any) -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started: ``(index of this one, how many)``; (0, 1) where nothing was started.

    ``timeout``: seconds that one waits for the others before `LostProcess`; a process that is gone is noticed at once.
    By gloo, whatever the device: there a lost process is an exception.  ``where``: ``init_method``, ``rank``, ``world_size``
    of `torch.distributed.init_process_group` instead of torchrun's.
    """
    if not where and "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout), **where)
    except RuntimeError as error:
        raise LostProcess(f"the processes did not meet within {timeout:g} s ({str(error).splitlines()[0]})") from error
    try:
        yield place()
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """``(index of this process, how many)``."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def together(call: Callable[..., Any], *args: Any) -> None:
    """A collective call; its failure is a `LostProcess`."""
    try:
        call(*args)
    except RuntimeError as error:
        rank, count = place()
        text = f"process {rank} of {count}: no answer from the others, one was killed or is stuck; start again with --resume"
        raise LostProcess(f"{text} ({str(error).splitlines()[0]})") from error


class Mean(torch.autograd.Function):
    """``y = (1/N) sum_r x_r`` on every process.

    Cotangents pass as they are: they agree on all processes where all that follows is shared, or goes through `shared`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The mean over the processes."""
        y = x.detach().clone(memory_format=torch.contiguous_format)
        together(dist.all_reduce, y)
        return y / place()[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        """The mean of the cotangents."""
        return v


class Shared(torch.autograd.Function):
    """The identity on tensors that all processes share; cotangents are averaged, all in one message."""

    @staticmethod
    def forward(ctx: Any, *leaves: Tensor) -> Any:
        """The same tensors."""
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> Any:
        """Their mean, in one message."""
        parts = mean(torch.cat([leaf.reshape(-1) for leaf in v])).split([leaf.numel() for leaf in v])
        return tuple(part.view_as(leaf) for part, leaf in zip(parts, v, strict=True))


def mean(x: Tensor) -> Tensor:
    """The mean over the processes, differentiable as in `Mean`.  All must call it, in the same order."""
    return Mean.apply(x) if place()[1] > 1 else x


def shared(tree: Any) -> Any:
    """The same tree of tensors; derivatives by it are averaged over the processes, also those of a derivative."""
    leaves, spec = tree_flatten(tree)
    return tree_unflatten(list(Shared.apply(*leaves)), spec) if place()[1] > 1 else tree


def everywhere(loss: Callable[[Any, Any], Tensor], value: bool = True) -> Callable[[Any, Any], Tensor]:
    """``(u, w) -> (1/N) sum_r loss_r(u, w)``, each process having a loss of its own: value and derivatives of all orders.

    Give a lower and an upper loss through it to `odlkit.bilevel.descent` and `odlkit.bilevel.hypergradient`: iterates,
    linear solves and the hypergradient are then those of the whole data, the same on all processes, whichever the way.
    ``value=False``: only the derivatives are; a descent does not look at more, and a message a step is saved.
    """

    def whole(u: Any, w: Any) -> Tensor:
        own = loss(shared(u), shared(w))
        return mean(own) if value else own

    return whole


def mine(x: Tensor) -> Tensor:
    """This process' part of a batch: every N-th item.  Raises ``ValueError`` where parts differ in size: means would lie."""
    rank, count = place()
    if len(x) % count:
        raise ValueError(f"x: expected a batch that {count} processes can share evenly, got {len(x)} items")
    return x[rank::count]


def over_tasks(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Any:
    """``(1/n) sum function(task)``, a tree of tensors; each process takes every N-th task.  Not differentiable.

    Raises ``ValueError`` where there are fewer tasks than processes.
    """
    rank, count = place()
    if len(tasks) < count:
        raise ValueError(f"tasks: expected one a process at least, {count}, got {len(tasks)}")
    total: list[Tensor] = []
    for task in tasks[rank::count]:
        leaves, spec = tree_flatten(function(task))
        total = [a + b.detach() for a, b in zip(total, leaves, strict=True)] if total else [x.detach() for x in leaves]
    if count > 1:
        total = [mean(leaf) * count for leaf in total]
    return tree_unflatten([leaf / len(tasks) for leaf in total], spec)


def same(model: nn.Module) -> None:
    """Give every process the first one's weights and buffers."""
    if place()[1] > 1:
        for value in model.state_dict().values():
            together(dist.broadcast, value, 0)


def average_gradients(model: nn.Module, value: Tensor) -> Tensor:
    """Replace each ``.grad`` by its mean over the processes, in one message; returns the mean of ``value``."""
    if place()[1] == 1:
        return value
    of = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in of]
    flat = mean(torch.cat([value.detach().reshape(1).to(grads[0]), *[g.reshape(-1) for g in grads]]))
    for p, part in zip(of, flat[1:].split([g.numel() for g in grads]), strict=True):
        p.grad = part.view_as(p).clone()
    return flat[0]


def gather(mine: list) -> list[list]:
    """What each process gives, on all of them."""
    if place()[1] == 1:
        return [mine]
    found: list = [None] * place()[1]
    together(dist.all_gather_object, found, mine)
    return found
