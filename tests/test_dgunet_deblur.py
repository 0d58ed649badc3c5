"""DGUNet where A is given: what it sees of A; unknown blur; the tasks with both, any size, and the recipes' data."""

import json

import pytest
import torch
from click.testing import CliRunner
from scipy.signal import convolve2d

from odlkit import cli, data, images, weights
from odlkit.linear import largest_eigenvalue
from odlkit.metrics import psnr
from odlkit.models.dgunet import DGUNet
from odlkit.operators import Blur, BlurDecimate, Identity, Mask, ValidBlur
from odlkit.propagate import PropagationError
from odlkit.tasks import dgunet as task
from odlkit.tasks.deblur import deblur
from odlkit.tasks.dgunet import KNOWN, MOTION, normalized, staged
from odlkit.tasks.inpaint import inpaint
from odlkit.tasks.sr import SCALES, bicubic_kernel, super_resolve
from odlkit.tasks.tiles import OVERLAP
from odlkit.training import paper
from odlkit.training import restore as recipes
from odlkit.training.masks import missing_at_random

TINY = {"channels": 1, "width": 8, "step": 4, "tail": 4, "stages": 3, "scales": 3, "fused": 2}
installed = pytest.mark.skipif(not {KNOWN, MOTION} <= set(weights.cards()), reason="its networks are not installed")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(known: bool) -> DGUNet:
    torch.manual_seed(0)
    return DGUNet("deblur", known=known, **TINY).eval()


@pytest.fixture
def untrained(monkeypatch):
    """Small random networks in the place of the shipped ones: shapes and words need no training."""
    monkeypatch.setattr(task.weights, "load", lambda name: tiny(name == KNOWN))


def shift(dy: int, dx: int) -> torch.Tensor:
    """The kernel of a shift, whose blur is orthogonal."""
    kernel = torch.zeros(2 * abs(dy) + 1, 2 * abs(dx) + 1)
    kernel[abs(dy) + dy, abs(dx) + dx] = 1
    return kernel


@pytest.mark.parametrize("operator", [Blur(shift(2, -3)), Mask(1 - 2 * torch.eye(16).expand(1, 1, 16, 16))])
def test_a_whole_step_with_an_orthogonal_operator_undoes_it(operator):
    """With rho = 1 and A^T A = I the gradient step is ``v = A^T y`` whatever x is: denoising ``A^T y``."""
    net, (y, x0) = tiny(True), torch.rand(2, 1, 1, 16, 16, generator=seeded())
    for stage in (net.first, *net.middle, net.last):
        stage.gradient.rho.data.fill_(1.0)
    with torch.no_grad():
        found, plain = net(y, operator, x0), net(operator.A_adjoint(y), Identity())
        other = net(y, Blur(torch.ones(3, 3) / 9), x0)
    for a, b, c in zip(found, plain, other, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert (a - c).abs().max() > 1e-2, "another operator must give another image"


def test_the_norm_of_the_operator_is_one_for_every_task():
    x = data.sample("camera", 48)
    operators = [Blur(torch.rand(5, 5) - 0.2), Mask(missing_at_random(0.5, 48, 48, seeded()))]
    operators += [BlurDecimate(k, s) for s in SCALES for k in (bicubic_kernel(s).float(), torch.ones(1, 1))]
    for operator in operators:
        y = operator.A(x)
        A, z = normalized(operator, y, x)
        assert abs(largest_eigenvalue(lambda v, A=A: A.A_adjoint(A.A(v)), x) - 1) < 0.02
        assert torch.allclose(A.A(x), z, atol=1e-5)


def test_stages_are_recorded_as_they_ran():
    net, x = tiny(True).double(), data.sample("camera", 32).double()
    blur = Blur(torch.ones(3, 3, dtype=torch.float64) / 9)
    y = blur.A(x)
    outcome = staged(net, y, blur, y, 4)
    with torch.no_grad():
        images = net(y, blur, y, 4)
    assert torch.equal(outcome.x, images[-1]) and outcome.result.iterations == 4
    for k, image in enumerate(images):
        before = images[k - 1] if k else y
        assert outcome.result.trace["change"][k].item() == pytest.approx((image - before).norm().item(), rel=1e-9)
        assert outcome.result.trace["misfit"][k].item() == pytest.approx((blur.A(image) - y).norm().item(), rel=1e-9)
    assert outcome.result.residual == pytest.approx(((images[3] - images[2]).norm() / images[2].norm()).item())
    assert outcome.certificate["holds"] is None and outcome.certificate["guarantee"] == "none"


def test_an_image_that_is_not_finite_is_an_error():
    net = tiny(False)
    net.first.gradient.rho.data.fill_(float("inf"))
    with pytest.raises(PropagationError, match="not finite"):
        staged(net, torch.rand(1, 1, 16, 16, generator=seeded()))


@pytest.mark.parametrize("size", [(1, 1), (7, 30), (33, 46)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_and_number_of_channels(untrained, size, channels, report_keys):
    y = torch.rand(2, channels, *size, generator=seeded())
    mask = missing_at_random(0.4, *size, seeded())
    mask[..., 0, 0] = 1
    small = torch.ones(min(3, size[0]), min(3, size[1]))
    runs = {
        "motion": deblur(y, model="dgunet"),
        "deblur": deblur(y, small, 0.01, "dgunet"),
        "inpaint": inpaint(y, mask, "dgunet"),
        "sr": super_resolve(y, 3, "dgunet"),
    }
    for name, (x, report) in runs.items():
        scale = 3 if name == "sr" else 1
        assert x.shape == (2, channels, scale * size[0], scale * size[1]) and bool(x.isfinite().all())
        assert set(report) >= report_keys and report["certificate"]["holds"] is None and report["iterations"] == 3
        json.dumps(report, allow_nan=False)
    known, unknown = runs["deblur"][1], runs["motion"][1]
    assert "kernel" in known["input"] and "kernel" not in unknown["input"]
    assert "learned" in unknown["notes"][0] and "may be wrong" in unknown["certificate"]["statement"]
    alone = deblur(y[:1, -1:], model="dgunet")[0]
    assert torch.allclose(alone, runs["motion"][0][:1, -1:], atol=1e-5), "a channel is restored by itself"


def test_without_a_kernel_only_dgunet_and_nothing_that_needs_one():
    y = torch.rand(1, 1, 20, 20, generator=seeded())
    with pytest.raises(ValueError, match=r"^kernel: expected one for ipadnet, only dgunet does without"):
        deblur(y)
    with pytest.raises(ValueError, match=r"^sigma and boundary: expected none without a kernel"):
        deblur(y, None, 0.01, "dgunet")
    with pytest.raises(ValueError, match=r"^sigma and boundary: expected none without a kernel"):
        deblur(y, None, None, "dgunet", "circular")
    with pytest.raises(ValueError, match="^input: .* finite"):
        deblur(y * float("nan"), model="dgunet")
    with pytest.raises(ValueError, match="^tile: .* got 3"):
        deblur(y, model="dgunet", tile=3)


def test_the_command_does_without_a_kernel(untrained, tmp_path):
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    images.write(source, data.sample("astronaut", (23, 26), gray=False), images.Picture(torch.zeros(1, 3, 23, 26)))
    words = ["restore", "deblur", str(source), "-o", str(target)]
    refused = CliRunner().invoke(cli.main, words)
    assert refused.exit_code == 2 and "kernel: expected one for ipadnet" in refused.stderr and not target.exists()
    done = CliRunner().invoke(cli.main, [*words, "--model", "dgunet", "--tile", "16"])
    assert done.exit_code == 0, done.output
    assert "no guarantee" in done.stdout and images.read(target).x.shape == (1, 3, 23, 26)


def test_circular_data_need_sides_that_the_scales_divide(untrained):
    with pytest.raises(ValueError, match=r"^boundary: expected sides that are multiples of 4 with circular, got \(16, 18\)"):
        deblur(torch.rand(1, 1, 16, 18), torch.ones(3, 3), 0.01, "dgunet", "circular")


def test_the_recipe_blurs_as_a_reference_does():
    """Each item under its own kernel, what lies outside the crop blurred in, and noise of a level in the range."""
    scene, side = torch.rand(3, 1, 50, 50, generator=seeded()), recipes.KERNEL
    x, y = recipes.blurred(scene, seeded(7))
    same = seeded(7)
    half = side // 2
    assert torch.equal(x, scene[..., half:-half, half:-half]) and y.shape == x.shape
    for i in range(3):
        kernel = recipes.random_kernel(same, side)
        noise = y[i, 0] - torch.tensor(convolve2d(scene[i, 0].double(), kernel.double(), "valid")).float()
        assert 0.8 * recipes.NOISE[0] < noise.std() < 1.2 * recipes.NOISE[1] and noise.mean().abs() < 2e-3


@pytest.mark.parametrize("kind", recipes.KINDS)
def test_the_recipe_gives_data_their_operator_and_a_start(kind):
    scene = torch.cat([data.sample(name, 72) for name in ("camera", "coffee", "chelsea")])
    for seed in range(4):
        x, y, A, x0 = kind(scene, seeded(seed))
        noise = (A.A(x) - y).flatten(1).std(1)
        low, high = recipes.KNOWN_NOISE if kind is recipes.blur_known else (0, 1e-6)
        assert bool((noise >= 0.9 * low).all()) and bool((noise <= 1.1 * high).all())
        assert x0.shape == x.shape
        if kind is recipes.scale_known:  # A^T y enlarges well by itself where A is bicubic
            assert (A.A(x0) - y).norm() < 0.06 * y.norm(), "a start that explains the data"
        else:
            assert bool((psnr(x0, x) > psnr(A.A_adjoint(y), x)).all()), "a start nearer to the truth than A^T y"


@pytest.mark.parametrize("known", [False, True])
def test_the_recipes_run_and_their_weights_load(known, tmp_path, monkeypatch):
    pictures = [data.sample(name, 180) for name in ("camera", "coffee")]
    monkeypatch.setattr(recipes, "pictures", lambda: (pictures, pictures))
    recipes.known(tmp_path, steps=2) if known else recipes.motion(tmp_path, steps=2, slow=(4, 1))
    name = KNOWN if known else MOTION
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    assert weights.load(name).setting.known is known and weights.card(name)["steps"] == 2


def test_gopro_as_released_is_read_and_trained_on(tmp_path, monkeypatch):
    """A folder a scene, the same names in each; blurry and sharp are not exchanged."""
    for scene, name in (("GOPR0001_11_00", "camera"), ("GOPR0002_11_00", "coffee")):
        x = data.sample(name, (40, 48), gray=False)
        for side, level in (("sharp", 1.0), ("blur", 0.5)):
            place = tmp_path / "GoPro" / "train" / scene / side
            place.mkdir(parents=True)
            images.write(place / "000001.png", (level * x).expand(-1, 3, -1, -1), images.Picture(x.expand(-1, 3, -1, -1)))
    monkeypatch.setenv("ODLKIT_DATA", str(tmp_path))
    pairs = paper.training_pairs(tmp_path / "GoPro" / "train")
    assert [(b.parent.name, s.parent.name, b.parent.parent.name) for b, s in pairs] == [
        ("blur", "sharp", "GOPR0001_11_00"), ("blur", "sharp", "GOPR0002_11_00")]  # fmt: skip
    z = paper.read_pair(*pairs[1])
    assert torch.allclose(z[:, 3:], 0.5 * z[:, :3], atol=2e-3)
    assert paper.PLANS["deblur"]["lr"] == 1e-4 and paper.PLANS["deblur"]["size"] == 256
    tiny = TINY | {"channels": 3, "shared": True}
    paper.deblur(tmp_path, steps=2, batch=2, size=32, **tiny)
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    assert weights.load("dgunet-deblur-paper").setting.channels == 3


def photograph(name: str, kernel: torch.Tensor, size: int, gray: bool = True):
    scene, blur = data.sample(name, size, gray), ValidBlur(kernel)
    y = blur.A(scene)
    return blur.crop(scene), y + 0.005 * torch.randn(y.shape, generator=seeded())


def streak(n: int) -> torch.Tensor:
    return torch.eye(n) / n


@installed
@pytest.mark.parametrize("name, gain", [("camera", 1.0), ("astronaut", 0.5)])
def test_unknown_motion_becomes_less(name, gain):
    x, y = photograph(name, streak(5), 165, gray=name == "camera")
    restored = deblur(y, model="dgunet")[0]
    assert psnr(restored, x).item() > psnr(y, x).item() + gain


@installed
def test_the_given_kernel_is_worth_more_than_what_was_learned():
    x, y = photograph("camera", streak(5), 165)
    given = deblur(y, streak(5), 0.005, "dgunet")[0]
    assert psnr(given, x).item() > psnr(deblur(y, model="dgunet")[0], x).item() + 2
    wrong = deblur(y, streak(5).flip(0), 0.005, "dgunet")[0]
    assert psnr(wrong, x).item() < psnr(given, x).item() - 3, "the network must see which A it is"


@installed
def test_tiles_of_unknown_blur_show_no_seam():
    _, y = photograph("camera", streak(7), 226)
    whole, (tiles, report) = deblur(y, model="dgunet")[0], deblur(y, model="dgunet", tile=96)
    assert report["certificate"]["runs"] == 4
    error = (tiles - whole).abs()
    assert psnr(tiles, whole).item() > 40
    at = slice(96, 96 + OVERLAP)
    assert error[..., at].mean() < 2 * error.mean() + 1e-4, "the seam is no worse than the rest"
