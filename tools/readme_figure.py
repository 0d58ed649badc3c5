"""Make the picture of the README: a blurred photograph, the restored one, and what its certificate watches.

python tools/readme_figure.py            writes book/_assets/readme.png and the numbers behind it, readme.csv
"""

from __future__ import annotations

from pathlib import Path

import torch

from odlkit import data, viz, weights
from odlkit.metrics import psnr
from odlkit.models.padnet import Implicit, Schedule
from odlkit.operators import Blur
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import propagate
from odlkit.tasks.deblur import extend
from odlkit.training.kernels import random_kernel

OUT = Path(__file__).resolve().parent.parent / "book" / "_assets" / "readme.png"
SIGMA, SIDE, KERNEL = 0.01, 256, 21


def main() -> None:
    """Blur a photograph, restore it by implicit PADNet and plot its moves under the bound of Theorem 2."""
    import matplotlib.pyplot as plt

    kernel = random_kernel(torch.Generator().manual_seed(6), size=KERNEL)
    reach = KERNEL // 2
    scene = data.sample("astronaut", size=SIDE + 2 * reach, gray=False)
    inside = (..., slice(reach, -reach), slice(reach, -reach))  # a camera sees a window of a larger scene
    x, y = (z[inside].transpose(0, 1) for z in (scene, Blur(kernel)(scene)))  # each channel is an item: (3, 1, H, W)
    y = y + SIGMA * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))

    card = weights.card("padnet-image")["schedule"]
    schedule = Schedule.between(card["first"], SIGMA, card["depth"])
    grid, window = extend(y, kernel)
    problem = Problem(LeastSquares(Blur(kernel), grid, 1 / SIGMA**2))
    result = propagate(Implicit(weights.load("padnet-image"), schedule), problem, grid, steps=card["depth"])
    restored, trace = result.x[(..., *window)], result.trace
    before, after = (psnr(z.clamp(0, 1), x, border=reach).mean().item() for z in (y, restored))

    alpha = torch.tensor([[schedule(k)[1]] for k in range(len(trace))], dtype=torch.float64)
    slope, moves = trace["fidelity_gradient"].amax(0), (trace["dual"] / alpha).amax(0)  # M and C_N of this run
    change, bound = (q.square().sum(1).sqrt()[1:].tolist() for q in (trace["change"], slope * alpha**2 + moves * alpha))
    steps = list(range(1, len(trace)))

    with plt.rc_context(viz.LOOK):
        fig, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.5), width_ratios=(1, 1, 1.1), layout="constrained")
        for ax, picture, title in ((left, y, f"blurred, {before:.1f} dB"), (middle, restored, f"restored, {after:.1f} dB")):
            ax.imshow(picture[:, 0].clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
            ax.set_title(title, fontsize=11)
            ax.set_axis_off()
        right.semilogy(steps, bound, "--", color=viz.COLOURS[1], label="bound of Theorem 2")
        right.semilogy(steps, change, color=viz.COLOURS[0], marker=".", label="move of the image")
        right.set(title="why the iteration stops", xlabel="iteration k")
        right.legend(frameon=False)
        right.grid(alpha=0.3)
    alt = "A blurred photograph, the restored one, and the moves of the iteration falling under the bound of Theorem 2"
    viz.save(fig, OUT, {"k": steps, "move": change, "bound": bound}, alt)
    share = max(a / b for a, b in zip(change, bound, strict=True))
    print(f"{before:.2f} dB -> {after:.2f} dB, moves at most {share:.3f} of the bound")


if __name__ == "__main__":
    main()
