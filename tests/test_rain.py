"""Rain: what is drawn, which scenes are left out, pairs in folders, the recipes, and the task."""

import json

import pytest
import torch

from odlkit import data, weights
from odlkit.images import atomic
from odlkit.metrics import psnr
from odlkit.models.hodl_rain import REACH, Shifts, slopes
from odlkit.operators import Identity
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import propagate
from odlkit.solvers import ADMM
from odlkit.tasks import derain as task
from odlkit.tasks.derain import MODELS, Directional, derain
from odlkit.training import paper, rain

trained = "dgunet-derain" in weights.cards()
NEEDS = {"dgunet": "dgunet-derain", "hodl": "hodl-rain", "gdc-searched": "gdc-derain"}
NAMES = [name for name in MODELS if NEEDS.get(name, "dgunet-derain") in weights.cards()]
here = pytest.mark.skipif("rain100l" not in data.available(), reason="needs rain100l")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wet(size, slope: float = 0.0, gray: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A photograph without and with streaks that lean by ``slope`` degrees."""
    x = data.sample("astronaut", size, gray=gray)
    seeds = (torch.rand(1, 1, *size, generator=seeded()) < 0.004).float()
    streaks = torch.nn.functional.conv2d(seeds, rain.smear(24, slope, 0.5, 0.3), padding="same")
    return x, (x + 0.5 * streaks).clamp(0, 1)


# What is drawn.


def test_the_same_seed_draws_the_same_rain_and_another_does_not():
    first, again, other = (rain.streaks((2, 48, 40), seeded(seed)) for seed in (0, 0, 1))
    assert first.shape == (2, 1, 48, 40) and torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1 and not torch.equal(first[0], first[1])


def test_light_rain_covers_little_and_heavy_rain_much():
    light, heavy = (rain.streaks((40, 64, 64), seeded(), share) for share in (0.0, 1.0))
    cover = [(layer > 0.02).float().mean().item() for layer in (light, heavy)]
    assert cover[0] < 0.4 < 0.6 < cover[1]
    assert 0.01 < light.mean() < 0.06 < 0.12 < heavy.mean()


def test_streaks_are_long_along_one_direction_near_the_vertical():
    layer = rain.streaks((30, 96, 96), seeded(), 0.0)
    down, across = (layer.roll(2, dim) - layer for dim in (-2, -1))
    assert down.abs().mean() < 0.7 * across.abs().mean()
    kernel = rain.smear(30, 20.0, 0.5, 0.2)[0, 0]
    rows, cols = torch.nonzero(kernel > 0.5).float().T
    slope = torch.linalg.lstsq((rows - rows.mean())[:, None], (cols - cols.mean())[:, None]).solution.item()
    assert kernel.max() == 1 and abs(slope - torch.tan(torch.tensor(20.0).deg2rad()).item()) < 0.05
    length = 30 * (1 - 0.2 / 2) * torch.tensor(20.0).deg2rad().cos().item()  # between the middles of the fading ends
    assert (rows.max() - rows.min()).item() == pytest.approx(length, abs=2)


def test_rain_only_adds_light_the_same_in_all_channels():
    x, y = rain.rainy([0.5 * torch.rand(1, 3, 80, 70, generator=seeded(1))], 4, 32, seeded(), heavy=0.0)
    assert x.shape == y.shape == (4, 3, 32, 32) and ((y - x) >= 0).all() and y.max() <= 1
    unsaturated = (y < 1).all(1)
    difference = (y - x).permute(0, 2, 3, 1)[unsaturated]
    assert (difference.amax(1) - difference.amin(1)).max() < 1e-6


# Which scenes.


def test_a_scene_is_found_in_a_picture_in_any_orientation_and_others_are_not():
    other, picture = (data.sample(name, 320) for name in ("coffee", "astronaut"))
    crop = picture[..., 90:260, 60:250]
    for view in (crop, crop.mT, crop.flip(-1)):
        assert (rain.likeness(view.rot90(1, (-2, -1)), (picture,)) > 0.95) == (view is crop)  # turned, not mirrored
    assert rain.likeness(crop, (other,)) < 0.8


@here
def test_no_scene_of_the_tests_is_trained_on():
    """The images of CBSD68 that Rain100L shows are left out, and the pair of rain_jorder that Rain100H has too."""
    names = ("196073", "24077", "101085", "103070")
    paths = {path.stem: path for path in data.files("cbsd68")}
    assert len(rain.unseen([data.image(paths[name]) for name in names])) == 2
    folder = data.files("rain_jorder")[0].parent.parent
    clean = {path.stem: path for _, path in data.pairs(folder, "rain", "clean")}
    assert rain.unseen([data.image(clean["001"])]) == [] and len(rain.unseen([data.image(clean["009"])])) == 1
    sources = {path for name in rain.COLOUR for path in rain._clean(name)}
    assert not any(rain.DEGRADED & {path.parent.name, path.stem.split("_")[-1]} for path in sources)


# Pairs in folders, and the recipe at the paper's scale.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five rainy pairs as Rain13K is laid out, of two sizes, one smaller than the patches."""

    place = tmp_path / "Rain13K" / "train"
    for i in range(5):
        x, y = wet((40, 52) if i else (24, 40))
        for side, picture in (("target", x), ("input", y)):
            (place / side).mkdir(parents=True, exist_ok=True)
            write(place / side / f"{i}.png", picture)
    monkeypatch.setenv("ODLKIT_DATA", str(tmp_path))
    return place


def write(path, x: torch.Tensor) -> None:
    from PIL import Image

    with atomic(path) as handle:
        Image.fromarray((x[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(handle, "png")


def test_pairs_have_equal_names_and_faults_are_named(folder, tmp_path):
    found = data.pairs(folder)
    assert [degraded.name for degraded, _ in found] == [f"{i}.png" for i in range(5)]
    assert all(degraded.parent.name == "input" and clean.parent.name == "target" for degraded, clean in found)
    x, y = paper.drawn(found, 6, 32, seeded())
    assert x.shape == y.shape == (6, 3, 32, 32) and (y - x).min() >= 0 and (y - x).max() > 0.1
    with pytest.raises(FileNotFoundError, match="blur with one side of the pairs"):
        data.pairs(folder, "blur", "sharp")
    (folder / "input" / "9.png").touch()
    with pytest.raises(ValueError, match=r"folder: expected pictures of equal names .*1 without a partner, such as 9.png"):
        data.pairs(folder)
    write(folder / "target" / "9.png", torch.zeros(1, 3, 8, 8))
    write(folder / "input" / "9.png", torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match=r"pair: expected .* of one size, got \(8, 9\) and \(8, 8\)"):
        paper.read_pair(folder / "input" / "9.png", folder / "target" / "9.png")
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
    with pytest.raises(ValueError, match="got no pictures"):
        data.pairs(tmp_path, "a", "b")


def test_the_recipe_at_the_paper_s_scale_runs_and_writes_its_card(folder, tmp_path):
    small = {"width": 8, "step": 4, "tail": 4, "stages": 2, "scales": 2, "fused": 1}
    paper.derain(tmp_path / "out", steps=2, batch=2, size=32, **small)
    card = json.loads((tmp_path / "out" / "dgunet-derain-paper.json").read_text())
    assert card["steps"] == 2 and card["network"]["width"] == 8 and "Rain13K, " in card["data"]
    assert card["learning_rate"] == paper.PLANS["derain"]["lr"] == 2e-4
    assert (tmp_path / "out" / "dgunet-derain-paper.safetensors").stat().st_size > 1000


# The task.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size, gray", [((97, 131), False), ((64, 90), True)])
def test_rain_goes_and_the_report_is_whole(name, size, gray, report_keys):
    x, y = wet(size, 10.0, gray)
    restored, report = derain(y, name)
    assert restored.shape == y.shape
    assert psnr(restored.clamp(0, 1), x).item() > psnr(y, x).item() + 2
    assert set(report) >= report_keys and report["certificate"]["holds"] is not False
    json.dumps(report)


@pytest.mark.parametrize("name", NAMES)
def test_items_of_a_batch_do_not_meet(name):
    y = torch.cat([wet((48, 56), slope)[1] for slope in (-25.0, 25.0)])
    together, alone = derain(y, name)[0], torch.cat([derain(item, name)[0] for item in y.split(1)])
    assert (together - alone).abs().max() < 1e-4


@pytest.mark.skipif(not trained, reason="needs the weights")
def test_tiles_show_no_seam():
    """The network has means over the picture in it, so tiles differ a little; no more where they are blended."""
    x, y = wet((160, 226), 10.0)
    whole, (tiles, report) = derain(y)[0], derain(y, tile=96)
    assert report["certificate"]["runs"] == 2 and report["settings"]["tile"] == 96
    error = (tiles - whole).abs()
    assert psnr(tiles, whole).item() > 38 and abs(psnr(whole, x).item() - psnr(tiles, x).item()) < 0.3
    seam = error[..., 72:160]  # the second square begins at 72 and the first ends at 160
    assert seam.mean() < 2 * error.mean() + 1e-4
    jump = (tiles - whole).diff(dim=-1).abs().mean((0, 1, 2))  # what blending adds to the steps between columns
    assert jump.max() < 4 * jump.mean() + 1e-4


@pytest.mark.parametrize("slope", [-3, 0, 2])
def test_the_direction_of_streaks_is_found_on_a_photograph(slope):
    angle = torch.rad2deg(torch.atan(torch.tensor(slope / REACH))).item()
    assert slopes(wet((120, 140), angle, gray=True)[1]) == [slope]


def test_the_split_minimises_its_energy():
    """ADMM ends below the rainy picture and below small moves away from where it ends."""
    y = wet((40, 48), 0.0, gray=True)[1].double()
    operator = Shifts((0, 1), (REACH, slopes(y)[0]), (0, 0))
    problem = Problem(LeastSquares(Identity(), y, task.TRUST), Directional(operator.A(y), task.ALONG, task.SPARSE), operator)
    x = propagate(ADMM(task.PENALTY), problem, y, steps=600).x
    lowest = problem.energy(x).item()
    assert lowest < 0.8 * problem.energy(y).item()
    for i in range(5):
        move = torch.randn(y.shape, generator=seeded(i), dtype=torch.float64)
        assert problem.energy(x + 1e-3 * move).item() > lowest


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "umbrella"}, "model: expected one of dgunet, "),
        ({"y": torch.rand(1, 2, 20, 20)}, "input: expected a floating point tensor"),
        ({"y": torch.full((1, 3, 20, 20), torch.nan)}, "input: expected finite numbers"),
        ({"tile": 4}, "tile: expected at least 16 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        derain(**({"y": torch.rand(1, 3, 20, 20), "model": "directional"} | change))
