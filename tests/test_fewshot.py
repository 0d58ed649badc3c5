"""Few-shot learning: tasks, heads, and each method's hypergradient against finite differences."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from odlkit import weights
from odlkit.bilevel import Implicit, Unrolled, descent
from odlkit.training import fewshot as fs


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def task():
    drawn = fs.episode(fs.glyphs(6, 4, seed=3), 3, 1, 2, 2, seeded())
    return fs.Episode(drawn.support.double(), drawn.query.double(), drawn.seen, drawn.asked)


@pytest.fixture
def net():
    """Smooth, so that finite differences see no kink."""
    torch.manual_seed(1)
    smooth = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 6), nn.Tanh(), nn.Linear(6, 5))

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = smooth

        def forward(self, x):
            return nn.functional.normalize(self.net(x), dim=1)

    return Unit().double()


def gradient(net, task, method):
    net.zero_grad()
    fs.task_loss(net, task, method).backward()
    return parameters_to_vector([p.grad for p in net.parameters()])


def slope(net, task, method, direction, h=1e-5):
    """The directional derivative of the upper loss by central differences."""
    point, values = parameters_to_vector(net.parameters()).detach(), []
    for sign in (1, -1):
        vector_to_parameters(point + sign * h * direction, net.parameters())
        values.append(fs.task_loss(net, task, method).item())
    vector_to_parameters(point, net.parameters())
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize("method", ["rhg", "shodl", "ahodl"])
def test_unrolled_hypergradients_are_the_derivative_of_k_steps(net, task, method):
    direction = torch.randn(sum(p.numel() for p in net.parameters()), generator=seeded(), dtype=torch.float64)
    expected = slope(net, task, method, direction)
    assert (gradient(net, task, method) @ direction).item() == pytest.approx(expected, rel=1e-6)
    for biased in ("trhg", "first-order"):
        assert abs((gradient(net, task, biased) @ direction).item() - expected) > 1e-3 * abs(expected)


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_implicit_hypergradients_are_exact_at_the_lower_solution(net, task, solver, monkeypatch):
    monkeypatch.setattr(fs, "RIDGE", 0.05)
    monkeypatch.setattr(fs, "STEPS", 600)
    monkeypatch.setitem(fs.METHODS, "tight", fs.Method(Implicit(solver, tol=1e-10, max_iter=600)))
    direction = torch.randn(sum(p.numel() for p in net.parameters()), generator=seeded(), dtype=torch.float64)
    expected = slope(net, task, "tight", direction)
    assert (gradient(net, task, "tight") @ direction).item() == pytest.approx(expected, rel=1e-5)


def test_ten_terms_of_a_neumann_series_are_not_the_gradient(net, task):
    """What Table 9 calls NS is biased, and the reader should know by how much."""
    exact, short = gradient(net, task, "rhg"), gradient(net, task, "ns")
    assert 1e-3 < ((short - exact).norm() / exact.norm()).item() < 10


def test_simplified_hodl_is_unrolling_with_a_shorter_step(net, task, monkeypatch):
    def shorter(T, upper):
        return descent(T.loss, lambda w, k: fs.ALPHA * T.step_size(w, k))

    monkeypatch.setitem(fs.METHODS, "short", fs.Method(Unrolled(), shorter))
    assert torch.allclose(gradient(net, task, "short"), gradient(net, task, "shodl"), rtol=1e-10)


def test_tasks_do_not_see_each_other(net, task):
    both = fs.through(net, task)
    start = torch.zeros(2, 5, 3, dtype=torch.float64)
    together = fs.solve(fs.heads(task.seen), both, start)
    alone = [fs.solve(fs.heads(task.seen), {key: f[i : i + 1] for key, f in both.items()}, start[:1]) for i in range(2)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-12)


def test_the_curvature_bounds_the_hessian_and_is_near_it():
    f = nn.functional.normalize(torch.randn(1, 8, 16, generator=seeded(), dtype=torch.float64), dim=-1)
    labels = torch.arange(4).repeat(2)
    bound = fs.curvature(f).item()
    largest = 0.0
    for scale in (0.0, 1.0, 5.0):
        u = scale * torch.randn(16, 4, generator=seeded(), dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(lambda u: fs.head_loss(u, f[0], labels), u).reshape(64, 64)
        largest = max(largest, torch.linalg.eigvalsh(hessian).max().item())
    assert bound / 8 < largest <= bound


def test_episodes_hold_each_class_once_and_no_picture_twice():
    classes = torch.arange(7 * 5, dtype=torch.float32).view(7, 5, 1, 1, 1)
    drawn = fs.episode(classes, 4, 2, 3, 6, seeded())
    assert drawn.support.shape == (6, 8, 1, 1, 1) and drawn.query.shape == (6, 12, 1, 1, 1)
    for support, query in zip(drawn.support.flatten(1), drawn.query.flatten(1), strict=True):
        assert len({*support.tolist(), *query.tolist()}) == 20
        owner = [int(v) // 5 for v in support]
        assert len(set(owner)) == 4 and [int(v) // 5 for v in query] == [owner[2 * k] for k in drawn.asked.tolist()]


@pytest.mark.parametrize("ways, shots, queries", [(8, 1, 1), (2, 3, 3)])
def test_too_few_classes_or_pictures_are_named(ways, shots, queries):
    with pytest.raises(ValueError, match=r"ways, shots, queries: expected at most 7 classes of 5 pictures, got"):
        fs.episode(torch.zeros(7, 5, 1, 1, 1), ways, shots, queries, 1, seeded())


def test_an_unknown_method_is_named(net, task):
    with pytest.raises(ValueError, match="method: expected one of rhg, trhg"):
        fs.task_loss(net, task, "maml")


def test_accuracy_is_one_where_classes_are_apart_and_chance_where_nothing_is_seen():
    classes = torch.eye(6).view(6, 1, 1, 1, 6).expand(-1, 4, -1, -1, -1)
    tasks = lambda: fs.draws(classes, 3, 40, queries=2)  # noqa: E731
    assert fs.accuracies(nn.Flatten(), tasks()).mean() == 1
    blind = nn.Sequential(nn.Flatten(), nn.Linear(6, 4, bias=False))
    nn.init.zeros_(blind[1].weight)
    assert fs.accuracies(blind, tasks()).mean() == pytest.approx(1 / 3, abs=1e-6)


def test_glyphs_of_a_class_are_nearer_than_those_of_others():
    drawn = fs.glyphs(20, 4, seed=1).flatten(2)
    assert drawn.min() >= 0 and drawn.max() <= 1
    inside = (drawn[:, 0] - drawn[:, 1]).norm(dim=-1).mean()
    across = (drawn[:, 0] - drawn[:, 1].roll(1, 0)).norm(dim=-1).mean()
    assert inside < 0.8 * across


def test_shaken_letters_move_and_stay_themselves():
    x = fs.glyphs(6, 4, seed=2)
    assert torch.allclose(fs.shaken(x, seeded(), 0, 0, 0), x, atol=1e-5)
    y = fs.shaken(x, seeded())
    assert y.shape == x.shape and torch.equal(y, fs.shaken(x, seeded())) and y.min() >= 0 and y.max() <= 1 + 1e-6
    assert (y - x).abs().mean() > 0.02 and 0.7 < y.mean() / x.mean() < 1.4
    quarter = fs.shaken(x[:1, :1], torch.Generator().manual_seed(0), 0, 0, 0.2)  # a shift alone: the picture is in there
    assert torch.nn.functional.conv2d(quarter[0], x[0, 0][None], padding=27).max() > 0.6 * x[0, 0].square().sum()


def test_folders_of_classes_become_one_tensor(tmp_path):
    from PIL import Image

    for name, count in (("cat", 3), ("dog", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L" if i else "RGB", (20 + i, 12)).save(tmp_path / name / f"{i}.png")
    assert fs.class_folders(tmp_path, 16).shape == (2, 2, 3, 16, 16)
    with pytest.raises(ValueError, match="folder: expected at least two folders of pictures"):
        fs.class_folders(tmp_path / "cat")


def test_mini_imagenet_is_trained_on_and_measured_where_it_is(tmp_path, monkeypatch):
    """On invented classes in its layout, from folders to the record."""
    from PIL import Image

    from odlkit.bench import fewshot as bench

    monkeypatch.setenv("ODLKIT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="expected MiniImageNet's pictures as .*mini-imagenet/train/CLASS"):
        fs.mini("train")
    letters = (255 * fs.glyphs(15, 6, seed=3)).byte().numpy()
    for i, letter in enumerate(letters):
        folder = tmp_path / "mini-imagenet" / ("train", "val", "test")[i // 5] / f"n{i:02d}"
        folder.mkdir(parents=True)
        for j, picture in enumerate(letter):
            Image.fromarray(picture[0]).convert("RGB").save(folder / f"{j}.png")
    fs.mini_features(tmp_path / "out", steps=2, width=4, side=32)
    card = json.loads((tmp_path / "out" / "hodl-fewshot-mini.json").read_text())
    assert card["network"]["channels"] == 3 and card["steps"] == 2 and card["recipe"] == "odlkit train hodl-fewshot-mini"
    monkeypatch.setattr(bench, "SHORT", 2)
    monkeypatch.setattr(bench, "SEEDS", (0, 1))
    record = bench.mini(side=32)
    rows = {row["method"]: row for row in record["rows"]}
    assert rows.keys() == fs.METHODS.keys() and rows["ahodl"]["paper"] == 49.08 and rows["first-order"]["paper"] is None
    assert all(0 < row["five_way"][0] <= 100 and "twenty_way" not in row for row in rows.values())
    assert len(record["data"]["mini-imagenet"]) == 64


def test_the_recipe_learns_and_writes_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr(fs, "omniglot", lambda part: fs.glyphs(124, 8))
    fs.omniglot_features(tmp_path, steps=3, width=4)
    card = json.loads((tmp_path / "hodl-fewshot.json").read_text())
    assert card["network"] == {"kind": "features", "width": 4, "channels": 1} and card["steps"] == 3
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    x = torch.rand(2, 1, 28, 28, generator=seeded())
    assert torch.allclose(weights.load("hodl-fewshot")(x).norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.skipif("hodl-fewshot" not in weights.cards(), reason="the weights are not installed")
def test_the_shipped_features_carry_over_to_invented_letters():
    """They have seen Omniglot only, on moved letters; pixels are the control, which is as good only where nothing moves."""
    still = fs.glyphs(60, 6, seed=7)
    for letters, ahead in ((still, -0.02), (fs.shaken(still, seeded(5)), 0.2)):
        tasks = lambda: fs.draws(letters, 5, 60)  # noqa: B023, E731
        learned = fs.accuracies(weights.load("hodl-fewshot"), tasks()).mean()
        assert learned > ahead + fs.accuracies(nn.Flatten(), tasks()).mean()
