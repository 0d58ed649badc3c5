"""The hypergradients of `hypergradient.py` by other libraries; what is not installed is left out.

``pip install higher==0.2.1 torchopt==0.7.3 boat-torch==1.1.1`` beside torch; odlkit needs none of them.  (BOAT also asks
for an old numpy and for torchvision, of which it uses nothing here: ``pip install --no-deps boat-torch``.)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import grad

Program = Callable[..., Tensor]  # (problem, psi, number of steps) -> the hypergradient
PEERS = {"higher": "higher", "torchopt": "torchopt", "boat_torch": "boat-torch"}  # import name -> distribution
CURRENT: list = []  # BOAT finds its losses by import path, so the problem has to lie where they can see it


def versions() -> dict[str, str]:
    """The installed peers with their versions."""
    return {name: importlib.metadata.version(PEERS[name]) for name in PEERS if importlib.util.find_spec(name)}


def linear(problem) -> torch.nn.Linear:
    """The lower level as a module, from zero."""
    model = torch.nn.Linear(*problem.start().shape[::-1], bias=False)
    model.weight.data = problem.start()
    return model


def higher_unrolled(problem, psi: Tensor, steps: int) -> Tensor:
    """`higher`: a differentiable copy of SGD."""
    import higher

    model = linear(problem)
    optimiser = torch.optim.SGD(model.parameters(), lr=problem.step_size)
    with higher.innerloop_ctx(model, optimiser, copy_initial_weights=False) as (patched, differentiable):
        for _ in range(steps):
            differentiable.step(problem.lower(patched.weight, psi))
        return grad(problem.upper(patched.weight, psi), psi)[0]


def torchopt_unrolled(problem, psi: Tensor, steps: int) -> Tensor:
    """TorchOpt's ``MetaSGD``."""
    import torchopt

    model = linear(problem)
    optimiser = torchopt.MetaSGD(model, lr=problem.step_size)
    for _ in range(steps):
        optimiser.step(problem.lower(model.weight, psi))
    return grad(problem.upper(model.weight, psi), psi)[0]


def torchopt_implicit(solver: Callable) -> Program:
    """TorchOpt's ``custom_root`` with a linear solver."""

    def program(problem, psi: Tensor, steps: int, start: Tensor | None = None) -> Tensor:
        from torchopt.diff.implicit import custom_root

        @custom_root(torch.func.grad(problem.lower), argnums=1, solve=solver(problem))
        def root(w: Tensor, psi: Tensor) -> Tensor:
            return problem.descend(w, psi, steps)

        return grad(problem.upper(root(problem.start() if start is None else start, psi), psi), psi)[0]

    return program


def torchopt_cg(iterations: int = 20, rtol: float = 0.0) -> Program:
    """Conjugate gradients: a fixed number of iterations, or up to ``rtol``."""

    def solver(problem):
        from torchopt.linear_solve import solve_cg

        return solve_cg(maxiter=iterations, rtol=rtol)

    return torchopt_implicit(solver)


def torchopt_neumann(terms: int = 100) -> Program:
    """Neumann series with the lower level's step size."""

    def solver(problem):
        from torchopt.linear_solve import solve_inv

        return solve_inv(ns=True, maxiter=terms, alpha=problem.step_size)

    return torchopt_implicit(solver)


def boat_lower(data, upper_model, lower_model, params=None) -> Tensor:
    """BOAT's lower loss."""
    return CURRENT[-1].lower(next(iter(lower_model.parameters())) if params is None else params[0], upper_model.psi)


def boat_upper(data, upper_model, lower_model, params=None) -> Tensor:
    """BOAT's upper loss."""
    return CURRENT[-1].upper(next(iter(lower_model.parameters())) if params is None else params[0], upper_model.psi)


def boat(*operations: str, cut: int = 0, iterations: int = 20) -> Program:
    """BOAT: ``NGD`` with these operations; ``cut`` is the number of steps that RGT leaves out."""

    def program(problem, psi: Tensor, steps: int, start: Tensor | None = None) -> Tensor:
        import boat_torch

        CURRENT[:] = [problem]
        upper, lower = torch.nn.Module(), linear(problem)
        if start is not None:
            lower.weight.data = start.clone()
        upper.psi = torch.nn.Parameter(psi.detach().clone())
        config = {
            "fo_op": None,
            "gm_op": ["NGD"],
            "na_op": list(operations),
            "lower_level_model": lower,
            "upper_level_model": upper,
            "lower_level_var": list(lower.parameters()),
            "upper_level_var": [upper.psi],
            "lower_level_opt": torch.optim.SGD(lower.parameters(), lr=problem.step_size),
            "upper_level_opt": torch.optim.SGD([upper.psi], lr=1.0),
            "lower_iters": steps,
            "device": "cpu",
            "loss_log_path": os.devnull,
            "accumulate_grad": False,
            "copy_last_param": False,
            "return_grad": True,
            "GDA": {"alpha_init": 0.0, "alpha_decay": 0.5},
            "RGT": {"truncate_iter": cut},
            "CG": {"tolerance": 0.0, "k": iterations},
        }
        losses = {f"{level}_level_loss": {"function": f"peers.boat_{level}", "params": {}} for level in ("lower", "upper")}
        solver = boat_torch.Problem(config, losses)
        solver.build_ll_solver()
        solver.build_ul_solver()
        gradients, _ = solver.run_iter({}, {}, 0)
        return gradients[0]

    return program


def programs() -> dict[str, dict[str, Program]]:
    """Task -> name -> program, of the peers that are installed."""
    there, tasks = versions(), {}
    everything = {
        "RHG": {
            "higher": higher_unrolled,
            "torchopt MetaSGD": torchopt_unrolled,
            "boat_torch NGD + RAD": boat("RAD"),
        },
        "TRHG": {"boat_torch NGD + RGT + RAD": boat("RGT", "RAD", cut=50)},
        "CG": {"torchopt custom_root + solve_cg": torchopt_cg(), "boat_torch NGD + CG": boat("CG")},
        "Neumann": {
            "torchopt custom_root + solve_inv": torchopt_neumann(),
            "boat_torch NGD + NS": boat("NS", iterations=100),
        },
    }
    for task, members in everything.items():
        tasks[task] = {name: program for name, program in members.items() if name.split()[0] in there}
    return tasks
