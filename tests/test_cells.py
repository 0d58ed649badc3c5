"""The search space of GDC and its bilevel problem."""

import pytest
import torch

from odlkit.models.gdc_rain import RainNet
from odlkit.networks.cells import ALL, HAND_MADE, NAMES, NODES, OPERATORS, Cell, CellNet, discretise, random_genotype
from odlkit.training.loop import log_error
from odlkit.training.search import architecture_gradient


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_keeps_the_shape_and_depends_on_its_input(name):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 11, requires_grad=True)
    z = OPERATORS[name](8)(x)
    assert z.shape == x.shape
    z.square().sum().backward()
    assert x.grad.abs().amin((1, 2, 3)).shape == (2,) and x.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "reach"), [("3-DC", 2), ("5-DC", 4), ("3-RB", 2), ("5-RB", 4), ("3-DB", 2), ("5-DB", 4)])
def test_a_convolution_operator_sees_as_far_as_its_size_says(name, reach):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 17, 17, dtype=torch.float64, requires_grad=True)
    OPERATORS[name](4).double()(x)[0, :, 8, 8].sum().backward()
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert (seen - 8).abs().max() == reach


def test_a_relaxed_cell_with_one_hot_weights_is_the_discrete_cell():
    torch.manual_seed(0)
    relaxed, genotype = Cell(4).double(), random_genotype(torch.Generator().manual_seed(3), keep=2)
    discrete, mixture = Cell(4, genotype).double(), torch.zeros(len(ALL), len(NAMES), dtype=torch.float64)
    discrete.out.load_state_dict(relaxed.out.state_dict())
    for k, (source, target, name) in enumerate(genotype):
        e, o = ALL.index((source, target)), NAMES.index(name)
        mixture[e, o] = 1
        discrete.operators[k][0].load_state_dict(relaxed.operators[e][o].state_dict())
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert torch.allclose(relaxed(x, mixture), discrete(x), atol=1e-12)


@pytest.mark.parametrize("keep", [1, 2])
def test_discretisation_keeps_the_strongest(keep):
    alpha = torch.randn(len(ALL), len(NAMES), generator=torch.Generator().manual_seed(0))
    genotype, p = discretise(alpha, keep), alpha.softmax(1)
    assert len(genotype) == sum(min(keep, node) for node in range(1, NODES + 1))
    assert len(genotype) == len(random_genotype(torch.Generator().manual_seed(0), keep))
    for node in range(1, NODES + 1):
        into = {i: p[ALL.index((i, node))].max().item() for i in range(node)}
        kept = [edge for edge in genotype if edge[1] == node]
        assert {edge[0] for edge in kept} == set(sorted(into, key=into.get)[-keep:])
        for source, _, name in kept:
            row = p[ALL.index((source, node))]
            assert row[NAMES.index(name)] == row.max()


def test_an_untrained_network_changes_nothing_and_odd_sizes_keep_their_shape():
    u = torch.rand(2, 3, 17, 14)
    assert torch.equal(CellNet(1, HAND_MADE)(u, 1.0), u)
    assert CellNet(1, HAND_MADE, logits=True)(u, 1.0).shape == (2,)


def tiny(seed):
    """A relaxed RainNet of one cell each with all weights away from zero, and two pairs of pictures; float64."""
    torch.manual_seed(seed)
    net = RainNet(width=4, stages=1, cells=(1, 1)).double()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    pairs = [(x, (x + 0.2 * torch.rand_like(x)).clamp(0, 1)) for x in torch.rand(2, 1, 3, 8, 8, dtype=torch.float64)]
    return net, pairs


def test_the_second_order_gradient_is_that_of_the_unrolled_step():
    """Eq: GDC (12)."""
    net, (train, val) = tiny(0)
    xi, (names, values) = 0.05, zip(*net.named_parameters(), strict=True)
    alphas = [k for k, name in enumerate(names) if name.endswith("alpha")]
    second, first = (architecture_gradient(net, train, val, xi, order)[0] for order in (2, 1))
    generator = torch.Generator().manual_seed(1)
    along = {names[k]: torch.randn(values[k].shape, generator=generator, dtype=torch.float64) for k in alphas}

    def phi(t, steps):  # written out: move alpha by t, take the step of descent on w, return L_val
        other, _ = tiny(0)
        with torch.no_grad():
            for name, p in other.named_parameters():
                p += t * along[name] if name in along else 0
        rest = [p for name, p in other.named_parameters() if name not in along]
        if steps:
            slopes = torch.autograd.grad(log_error(other(train[1]), train[0]), rest, materialize_grads=True)
            with torch.no_grad():
                for p, g in zip(rest, slopes, strict=True):
                    p -= xi * g
        return log_error(other(val[1]), val[0]).item()

    h = 1e-4
    for gradient, steps in ((second, 1), (first, 0)):
        slope = sum((gradient[name] * along[name]).sum().item() for name in along)
        numeric = (phi(h, steps) - phi(-h, steps)) / (2 * h)
        assert slope == pytest.approx(numeric, rel=1e-5)
    gap = sum((second[name] - first[name]).norm() for name in along) / sum(first[name].norm() for name in along)
    assert gap > 1e-2
