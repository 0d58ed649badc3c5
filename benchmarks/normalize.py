"""What architecture normalization adds to a training step: forward, backward and Adam of PADNet's network of seven layers.

`normalized` carries a power iteration of each convolution as an operator; torch's spectral normalization does so for the
weights reshaped to a matrix, whose norm does not bound the convolution's.  The cost is that of the weights, whatever the
batch: the bar is for the batch of 16 that the recipes train on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import arguments, compare, finish, row
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from odlkit.networks import ConvUnit
from odlkit.networks.normalize import certified, certify_norms, lipschitz_bound, normalized, share, weighted

DELTA = 0.9


def training_step(net: nn.Module, batch: int, patch: int) -> Callable[[], None]:
    """One step on the noise of a batch of ``patch x patch`` images."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(batch, 1, patch, patch, generator=generator) for _ in range(2))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-4)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        (net(clean + 0.1 * noise, 0.1) - noise).square().mean().backward()
        optimiser.step()

    return step


def unit(width: int) -> ConvUnit:
    """The same network every time."""
    torch.manual_seed(0)
    return ConvUnit(width=width)


def spectral(net: ConvUnit) -> ConvUnit:
    """torch's spectral normalization of every layer."""
    for layer, _ in weighted(net):
        spectral_norm(layer)
    return net


def main() -> None:
    """One task for each batch; then how far the trained network's own norms are from what is certified."""
    options = arguments(__doc__.splitlines()[0], rounds=11, small=4, large=16, patch=64, width=64)
    rows, trained = [], normalized(unit(options.width), DELTA)
    for batch in (options.small, options.large):
        nets = {"floor": unit(options.width), "odlkit": trained, "torch spectral_norm": spectral(unit(options.width))}
        times = compare({name: training_step(net, batch, options.patch) for name, net in nets.items()}, options.rounds)
        task = f"training step, {batch} x {options.patch}²"
        rows += [row(task, name, times, bar=1.1 if name == "odlkit" and batch == options.large else None) for name in times]
        print(f"batch {batch}: ratio {rows[-2]['ratio']}", flush=True)
    part = share(trained, DELTA)
    excess = [round(norm / part, 4) for norm in certify_norms(trained.eval())]
    bounds = {"plain": lipschitz_bound(unit(options.width)), "trained": lipschitz_bound(trained)}
    bounds["certified"] = lipschitz_bound(certified(trained, DELTA))
    print(f"bound of each layer over what it may have: {excess}; of the networks: {bounds}")
    finish(rows, options.json, delta=DELTA, layer_bound_over_share=excess, lipschitz_bounds=bounds)


if __name__ == "__main__":
    main()
