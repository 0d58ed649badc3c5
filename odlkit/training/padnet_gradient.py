"""Algorithm 2 of PADNet: design the networks on the gradient domain, unit by unit and iteration by iteration.

At iteration k a network of convolution-RBF-convolution units is trained to take the propagation's own ``u^{k+1} + nu^k`` to
the true gradient; units are added until the error condition holds, and iterations until the propagation stops.  Data:
train400 without its last images, blurred by random kernels; no benchmark image and no benchmark kernel is seen.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from odlkit import data
from odlkit.images import atomic
from odlkit.models.padnet import Constants, Implicit, Schedule
from odlkit.models.padnet_gradient import BOUND, Repeated, Stages, explicit, gradient_problem, implicit
from odlkit.networks import RBFUnit, ResidualNet
from odlkit.operators import Blur, Gradient
from odlkit.problem import Problem, norm_items
from odlkit.propagate import Step, propagate
from odlkit.training import machine
from odlkit.training.kernels import random_kernel
from odlkit.training.loop import commit, hardware, patches, save_weights

SIGMA, FIRST, GROWTH, EPSILON, HELD_OUT = 0.01, 0.15, 4.0, 1e-2, 12
UNIT = {"channels": 2, "filters": 16, "size": 5, "centres": 15, "reach": 6.0}
WEIGHTS = {1.0: 4e-3, 0.8: 2e-3, 0.0: 2e-4}  # lambda of (14) for each p, see `tune` in odlkit.bench.padnet_table_1


def blurred(images: list[Tensor], count: int, size: int, seed: int, sigma: float = SIGMA) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` crops blurred by random kernels with noise: ``y (B, 1, H, W)``, kernels ``(B, 1, h, w)``, true gradients."""
    generator = torch.Generator().manual_seed(seed)
    x = patches(images, count, size, generator)
    kernel = torch.stack([random_kernel(generator) for _ in x])[:, None]
    y = Blur(kernel).A(x)
    return y + sigma * torch.randn(y.shape, generator=generator), kernel, Gradient().A(x)


def fit_network(
    net: ResidualNet,
    w: Tensor,
    alpha: float,
    truth: Tensor,
    *,
    steps: int,
    lr: float,
    seed: int,
    batch: int = 8,
    crop: int = 32,
) -> float:
    """Fit ``N_alpha(w) ~ truth`` ``(B, C, H, W)`` with Adam on random crops, in relative squared error.

    Returns the mean relative error on the whole batch afterwards, ``mean ||N(w) - truth|| / ||truth||``.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=lr)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, lr / 20)
    crop = min(crop, *w.shape[-2:])
    edge = crop // 8 if crop < min(w.shape[-2:]) else 0  # the units wrap around; a crop of the image does not
    share = 1 / truth.square().mean((1, 2, 3))
    for _ in range(steps):
        draw = [torch.randint(n, (k,), generator=generator) for n, k in ((len(w), batch), (w.shape[-2] - crop + 1, 1),
                                                                        (w.shape[-1] - crop + 1, 1))]  # fmt: skip
        items, (top,), (left,) = draw[0].to(w.device), draw[1].tolist(), draw[2].tolist()
        start, goal = (t[items, :, top : top + crop, left : left + crop] for t in (w, truth))
        error = (net(start, alpha) - goal)[..., edge : crop - edge, edge : crop - edge]
        loss = (error.square().mean((1, 2, 3)) * share[items]).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"padnet-gradient: the loss is {loss.item()}; lower the learning rate")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        rate.step()
    with torch.no_grad():
        return (norm_items(net(w, alpha) - truth) / norm_items(truth)).mean().item()


def design(
    problem: Problem,
    truth: Tensor,
    x0: Tensor,
    make_step: Callable[[ResidualNet], Step],
    schedule: Schedule,
    *,
    t_max: int = 2,
    k_max: int = 12,
    epsilon: float = EPSILON,
    share: float = 0.9,
    check: bool = True,
    unit: dict | None = None,
    bound: float | None = BOUND,
    start: Stages | None = None,
    steps: int = 100,
    lr: float = 2e-2,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> tuple[Stages, list[dict]]:
    """Algorithm 2: the networks of all iterations and, for each iteration, what happened.  Eq: PADNet Algorithm 2.

    ``problem`` is a batch of training problems with true solutions ``truth`` ``(B, C, H, W)``; ``make_step(net)`` is the
    step of one iteration with that network (its control is Condition 1).  At iteration k units are added one at a time;
    each time all units so far are trained, from where they are, on the batch's ``u^{k+1} + nu^k``.  Adding stops when the
    step accepts the network's proposal for at least ``share`` of the batch, or at ``t_max`` units.  Where the condition
    fails even then, the step's fallback acts, image by image (Algorithm 2 as printed would keep the violating candidate).
    The iteration stops when the mean of ``||x^{k+1} - x^k|| / ||x^k||`` is at most ``epsilon``, or after ``k_max``.

    ``check=False`` is the implicit case: nothing is checked, every network has ``t_max`` units, which from the second
    iteration on are trained together.  New units start as copies of those in the same place of the iteration before, or of
    ``start``; a network whose last unit has nothing to copy trains three times as long at four times the rate.  With a
    ``checkpoint`` file every trained network is kept, and a second call replays them: a run that was interrupted ends with
    the same weights, bit for bit.
    """
    from tqdm import tqdm

    unit = UNIT if unit is None else unit
    stages, log = Stages(bound=bound), []
    kept = torch.load(checkpoint, weights_only=True) if checkpoint is not None and checkpoint.exists() else {}
    seen: list[Tensor] = []

    def watch(v: Tensor, alpha: float) -> Tensor:  # a network that only looks: what it is given is u + nu
        seen.append(v)
        return v

    state = make_step(watch).init(problem, x0)  # type: ignore[arg-type]
    bar = tqdm(total=k_max * t_max, desc="Algorithm 2: units", disable=not progress, mininterval=2)
    for k in range(k_max):
        seen.clear()
        with torch.no_grad():
            make_step(watch)(problem, state)  # type: ignore[arg-type]
        w, alpha = seen[0], schedule(k)[1]
        units: list[nn.Module] = []
        for t in range(t_max):
            earlier = start.nets[k] if start is not None and k < len(start) else stages.nets[-1] if k else None
            units.append(_new_unit(unit, t, cast(ResidualNet | None, earlier), seed + k * t_max + t))
            net = ResidualNet(units, bound).to(w)
            if not check and k and t + 1 < t_max:
                continue
            name = f"{k}.{t}"
            if name in kept:
                net.load_state_dict(kept[name]["net"])
                error = kept[name]["error"]
            else:
                fresh = earlier is None or t >= len(cast(ResidualNet, earlier).units)  # nothing to start from
                length, rate = (3 * steps, lr) if fresh else (steps, lr / 4)
                error = fit_network(net, w, alpha, truth, steps=length, lr=rate, seed=seed + 1000 * k + t)
                kept[name] = {"net": copy.deepcopy(net.state_dict()), "error": error}
                if checkpoint is not None:
                    checkpoint.parent.mkdir(parents=True, exist_ok=True)
                    with atomic(checkpoint) as handle:
                        torch.save(kept, handle)
            bar.update()
            if not check and t + 1 < t_max:
                continue
            with torch.no_grad():
                following, record = make_step(net)(problem, state)
            accepted = record["accepted"].mean().item() if check else None
            if accepted is not None and accepted >= share:
                break
        stages.nets.append(net)
        change = (norm_items(following.x - state.x) / norm_items(state.x)).mean().item()
        row = {"k": k, "units": len(units), "accepted": accepted, "change": change, "network_error": error,
               "error": (norm_items(following.x - truth) / norm_items(truth)).mean().item()}  # fmt: skip
        log.append({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
        bar.set_postfix(log[-1], refresh=False)
        state = following
        if change <= epsilon:
            break
    bar.close()
    return stages, log


def _new_unit(config: dict, place: int, earlier: ResidualNet | None, seed: int) -> nn.Module:
    """A unit that starts as the one in the same place of an earlier network, if there is one."""
    if earlier is not None and place < len(earlier.units):
        return copy.deepcopy(earlier.units[place])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RBFUnit(**config)


def gradient(out: Path, resume: bool = False, count: int = 48, size: int = 96, steps: int = 200) -> None:
    """Design one IPADNet and, starting from its units, one EPADNet for each p; save the weights of each with its card.

    On the processor, whose order of sums the stored replay keeps.
    """
    machine.plain()
    images = data.images("train400")
    y, kernel, truth = blurred(images[:-HELD_OUT], count, size, seed=0)
    yv, kernel_v, truth_v = blurred(images[-HELD_OUT:], HELD_OUT, size, seed=1)
    schedule, x0, start = Schedule(FIRST**-2, GROWTH), Gradient().A(y), None
    for p in (None, *WEIGHTS):
        name = "padnet-gradient" + ("" if p is None else f"-l{p:g}".replace(".", ""))
        checkpoint = out / f"{name}.pt"
        if not resume:
            checkpoint.unlink(missing_ok=True)
        lam = 0.0 if p is None else WEIGHTS[p]
        problem = gradient_problem(y, kernel, SIGMA, p, lam)
        constants = Repeated.constants_for(problem.lipschitz)

        def make_step(net: ResidualNet, p: float | None = p, constants: Constants = constants) -> Step:
            return Implicit(net, schedule) if p is None else Repeated([net], constants, schedule)

        clock = time.process_time()
        stages, log = design(
            problem,
            truth,
            x0,
            make_step,
            schedule,
            check=p is not None,
            start=start,
            steps=steps if p is None else steps // 2,
            checkpoint=checkpoint,
        )
        seconds = time.process_time() - clock
        start = start or stages
        step = implicit(stages, schedule) if p is None else explicit(stages, schedule, constants)
        held = gradient_problem(yv, kernel_v, SIGMA, p, lam)
        result = propagate(step, held, Gradient().A(yv), steps=len(stages), truth=truth_v)
        card = {
            "name": name,
            "what": "convolution-RBF-convolution networks on image gradients, one an iteration, by Algorithm 2 of PADNet; "
            + ("implicit" if p is None else f"explicit with the l{p:g} prior of weight {lam:g}"),
            "recipe": "odlkit train padnet-gradient",
            "data": f"train400 without its last {HELD_OUT} images: {count} crops of {size}x{size}, random blur kernels",
            "network": stages.card(),
            "schedule": {"first": FIRST, "growth": GROWTH, "stages": len(stages)},
            "energy": {"p": p, "lambda": lam, "sigma": SIGMA},
            "constants": None if p is None else {"moreau": 0.3, "tolerance": 0.45, "times": "lipschitz, moreau"},
            "steps": steps if p is None else steps // 2,
            "seed": 0,
            "cpu_seconds": round(seconds),
            "threads": torch.get_num_threads(),
            "hardware": hardware(),
            "versions": {"torch": torch.__version__},
            "commit": commit(),
            "history": log,
            "validation_error": round(result.trace["error"][-1].mean().item(), 4),
        }
        save_weights(stages, out / f"{name}.safetensors", card)
