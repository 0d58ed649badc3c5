"""Super-resolution: the operator against Pillow, the energy, the gain on photographs, the report, the command, refusals."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from odlkit import cli, data, images, weights
from odlkit.metrics import psnr
from odlkit.operators import Adjoint, Blur, BlurDecimate, Wavelet
from odlkit.priors import Lp
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import propagate
from odlkit.solvers import FISTA, tikhonov
from odlkit.tasks import sr as task
from odlkit.tasks.sr import MODELS, SCALES, SMOOTH, bicubic_kernel, energy, enlarge, extend, super_resolve

PLAIN = torch.ones(1, 1)
NEEDS = {"rpodm": "rpodm-sr", "dgunet": "dgunet-known", "podm": "podm-denoiser", "pnp": "podm-denoiser"}
ITERATED = ["rpodm", "podm", "fista", "pnp"]


def model(name: str):
    """The model as a parameter, skipped where its weights are not installed."""
    missing = name in NEEDS and NEEDS[name] not in weights.cards()
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"the network {NEEDS.get(name)} is not installed"))


def reduced(x: torch.Tensor, scale: int) -> torch.Tensor:
    """Pillow's antialiased bicubic reduction, each channel by itself."""
    size = (x.shape[-1] // scale, x.shape[-2] // scale)
    planes = [Image.fromarray(p).resize(size, Image.Resampling.BICUBIC) for p in x.flatten(0, 1).float().numpy()]
    return torch.from_numpy(np.stack([np.asarray(p) for p in planes])).view(*x.shape[:2], size[1], size[0]).to(x)


def photograph(name: str, scale: int, size: int = 96, gray: bool = True):
    """A picture whose sides are multiples of the scale, and its reduction."""
    x = data.sample(name, size - size % scale, gray)
    return x, reduced(x, scale)


@pytest.mark.parametrize("scale", SCALES)
def test_the_bicubic_operator_is_pillow_s_away_from_the_border(scale, dtype):
    x = data.sample("camera", (20 * scale, 25 * scale)).to(dtype)
    y = BlurDecimate(bicubic_kernel(scale).to(dtype), scale).A(x)
    assert (y - reduced(x, scale))[..., 3:-3, 3:-3].abs().max() < 2e-6
    assert (y - reduced(x, scale)).abs().max() > 1e-3  # circular here, cut off there
    assert abs(bicubic_kernel(scale).sum() - 1) < 1e-14


@pytest.mark.parametrize("scale", SCALES)
def test_enlarging_is_torch_s_interpolation_where_the_grids_agree(scale):
    y = data.sample("coffee", (18, 21), gray=False)
    bicubic = torch.nn.functional.interpolate(y, scale_factor=scale, mode="bicubic", antialias=True)
    assert (enlarge(y, scale, bicubic_kernel(scale)) - bicubic)[..., 9:-9, 9:-9].abs().max() < 1e-5
    assert enlarge(y, scale, bicubic_kernel(scale)).shape == bicubic.shape


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (-1, 2)])
def test_enlarging_knows_where_the_samples_were_taken(scale, shift):
    rows, columns = torch.meshgrid(torch.arange(60.0), torch.arange(72.0), indexing="ij")
    ramp = (0.3 * rows + 0.7 * columns)[None, None] / 72  # bicubic interpolation is exact on it
    kernel = torch.zeros(5, 7)
    kernel[2 + shift[0], 3 + shift[1]] = 2.0  # not normalised
    y = BlurDecimate(kernel / 2, scale).A(ramp)
    assert (enlarge(y, scale, kernel) - ramp)[..., 16:-16, 16:-16].abs().max() < 1e-5


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kernel", [None, PLAIN], ids=["bicubic", "plain"])
def test_interpolation_explains_the_data(scale, kernel):
    operator = BlurDecimate((bicubic_kernel(scale) if kernel is None else kernel).double(), scale)
    x = data.sample("camera", (24 * scale, 24 * scale)).double()
    y = operator.A(x)
    start = tikhonov(operator, y, SMOOTH)
    slope = 2 * operator.A_adjoint(operator.A(start) - y)  # of ||A x - y||^2, balanced by the smoothness
    assert (operator.A(start) - y).square().mean() < 1e-3 * y.var() and slope.abs().max() < 0.05
    nearest = y.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    assert (start - x).square().mean() < 0.9 * (nearest - x).square().mean()


@pytest.mark.parametrize("size", [(3, 3), (17, 40), (31, 5)])
@pytest.mark.parametrize("scale", SCALES)
def test_the_grid_holds_the_picture_and_fits_haar(size, scale):
    y = torch.rand(2, 1, *size)
    for kernel in (bicubic_kernel(scale), torch.ones(40, 3)):
        z, window = extend(y, scale, kernel)
        assert torch.equal(z[..., *(slice(w.start // scale, w.stop // scale) for w in window)], y)
        for side, n, w in zip(z.shape[-2:], size, window, strict=True):
            assert scale * side % 8 == 0 and side - n >= 2 * task.MARGIN and w.stop - w.start == scale * n
            assert w.start >= max(kernel.shape) / 2  # nothing wraps around into the picture


@pytest.mark.parametrize("kernel", [None, PLAIN], ids=["bicubic", "plain"])
def test_coefficients_and_pixels_have_the_same_iterates(kernel):
    """The energy of section 5.1 in coefficients and in pixels.  Eq: PODM (1)."""
    scale, haar = 2, Wavelet("haar", 3)
    operator = BlurDecimate((bicubic_kernel(scale) if kernel is None else kernel).double(), scale)
    y = operator.A(data.sample("camera", 64).double())
    pixels = energy(operator, y, 1e-3)
    codes = Problem(LeastSquares(operator @ Adjoint(haar), y, 2.0), Lp(0.8, 1e-3))
    start = tikhonov(operator, y, SMOOTH)
    assert abs(codes.lipschitz - pixels.lipschitz) < 1e-9
    steps = [propagate(FISTA(1 / pixels.lipschitz), p, s, steps=15) for p, s in ((pixels, start), (codes, haar.A(start)))]
    assert (steps[0].x - haar.A_adjoint(steps[1].x)).abs().max() < 1e-9
    energies = [s.trace.with_start("energy") for s in steps]
    assert (energies[0] - energies[1]).abs().max() < 1e-6 * energies[0].max()
    by_hand = (operator.A(start) - y).square().sum() + 1e-3 * (haar.A(start).abs() ** 0.8).sum()
    assert abs(pixels.energy(start).item() - by_hand.item()) < 1e-6 * by_hand


@pytest.mark.parametrize("name", [model(name) for name in MODELS])
@pytest.mark.parametrize("scale", SCALES)
def test_every_model_enlarges_and_reports(name, scale, device, report_keys):
    x, y = photograph("camera", scale, 72)
    y = y[..., :-1].to(device)  # an odd size
    large, report = super_resolve(y, scale, name)
    assert large.shape == (1, 1, y.shape[-2] * scale, y.shape[-1] * scale)
    assert large.dtype == y.dtype and large.device.type == device.type
    nearest = y.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    truth = x[..., : large.shape[-1]]
    assert psnr(large.cpu(), truth, scale).item() > psnr(nearest.cpu(), truth, scale).item() + 0.8
    assert report.keys() >= report_keys
    assert report["task"] == "sr" and report["model"] == name and report["settings"]["scale"] == scale
    assert report["certificate"].keys() >= {"guarantee", "statement", "holds", "of"}
    assert report["certificate"]["holds"] is (True if name == "podm" else None)
    json.dumps(report, allow_nan=False)
    if name in ("podm", "fista"):
        assert len(report["energies"]) == report["iterations"] + 1 == task.STEPS + 1
    else:
        assert report["energies"] == []


@pytest.mark.parametrize("name", [model("podm")])
@pytest.mark.parametrize("kernel", [None, PLAIN], ids=["bicubic", "plain"])
def test_podm_descends_counts_its_start_and_is_not_below_fista(name, kernel):
    for scale in SCALES:
        x = data.sample("camera", 24 * scale)
        y = BlurDecimate((bicubic_kernel(scale) if kernel is None else kernel).float(), scale).A(x)
        large, report = super_resolve(y, scale, "podm", kernel)
        about, start = report["certificate"], task.START_STAGES
        assert about["holds"] and about["kappa"] > 0 and about["unchecked_stages"] == start
        assert report["accepted"] + report["rejected"] == report["iterations"] - start > 0
        assert all(b <= a for a, b in zip(report["energies"][start:], report["energies"][start + 1 :], strict=False))
        other, _ = super_resolve(y, scale, "fista", kernel)
        assert psnr(large, x, 8) >= psnr(other, x, 8)


@pytest.mark.parametrize("name", [model("podm")])
def test_the_certificate_notices_a_stage_that_climbs(name, monkeypatch):
    """Control: everything is accepted, and the network moves far."""
    from odlkit.control import AlwaysAccept

    _, y = photograph("camera", 2, 64)
    setup = task.podm_setup

    def careless(*arguments):
        step, problem, start = setup(*arguments)
        step.solver.control, step.solver.networks = AlwaysAccept(), [lambda x, level: x + 0.2 * torch.sin(40 * x)]
        return step, problem, start

    assert super_resolve(y, 2, "podm")[1]["certificate"]["holds"] is True
    monkeypatch.setattr(task, "podm_setup", careless)
    assert super_resolve(y, 2, "podm")[1]["certificate"]["holds"] is False


@pytest.mark.parametrize("name", [model("rpodm")])
def test_relaxed_podm_is_far_above_fista(name):
    """The bar of the benchmark, on small samples; and the trained noise level is the one that is told."""
    from odlkit.training.podm import LEVEL

    assert LEVEL == task.RPODM_SIGMA
    for scale in SCALES:
        gains = []
        for picture in ("astronaut", "coffee", "chelsea"):
            x, y = photograph(picture, scale, 144)
            both = [psnr(super_resolve(y, scale, name)[0], x, scale).item() for name in ("rpodm", "fista")]
            gains.append(both[0] - both[1])
        assert sum(gains) / len(gains) > 0.5


@pytest.mark.parametrize("name", ["bicubic", "fista"])
def test_colour_changes_by_the_luminance_alone(name):
    x, y = photograph("astronaut", 2, 80, gray=False)
    large, _ = super_resolve(y, 2, name)
    base = enlarge(y, 2, bicubic_kernel(2))
    change = large - base
    assert (change - change[:, :1]).abs().max() < 1e-5 and psnr(large, x, 2).item() >= psnr(base, x, 2).item() - 1e-4
    gray, _ = super_resolve(task.luma(y), 2, name)
    assert (task.luma(large) - gray).abs().max() < 1e-4


def test_a_batch_is_enlarged_item_by_item():
    y = torch.cat([photograph(name, 3, 60)[1] for name in ("camera", "coffee")])
    together, alone = super_resolve(y, 3, "fista")[0], super_resolve(y[1:], 3, "fista")[0]
    assert torch.allclose(together[1:], alone, atol=1e-5)


def test_a_kernel_of_one_s_own():
    kernel = torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([1.0, 2, 1]))
    x = data.sample("camera", 72)
    y = BlurDecimate(kernel / 16, 2).A(x)
    large, report = super_resolve(y, 2, "fista", kernel)
    assert "its sum was 16" in report["notes"][0] and psnr(large, x, 8) > psnr(super_resolve(y, 2, "fista")[0], x, 8) + 1
    assert abs(Blur(kernel / 16).A(large)[..., 8:-8:2, 8:-8:2] - y[..., 4:-4, 4:-4]).max() < 0.05


NAN = float("nan")
BAD = {
    "scale: expected 2, 3 or 4, got 5": (torch.zeros(1, 1, 9, 9), 5, {}),
    "scale: .* got 1": (torch.zeros(1, 1, 9, 9), 1, {}),
    "model: .* got 'none'": (torch.zeros(1, 1, 9, 9), 2, {"model": "none"}),
    "input: .* finite": (torch.full((1, 1, 9, 9), NAN), 2, {}),
    "input: .* floating": (torch.zeros(1, 1, 9, 9, dtype=torch.uint8), 2, {}),
    "input: .*1 or 3": (torch.zeros(1, 2, 9, 9), 2, {}),
    "kernel: .* no larger than the enlarged image": (torch.zeros(1, 1, 9, 9), 2, {"kernel": torch.ones(19, 1)}),
    "kernel: .* positive sum": (torch.zeros(1, 1, 9, 9), 2, {"kernel": -torch.ones(3, 3)}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    y, scale, arguments = BAD[message]
    with pytest.raises(ValueError, match=f"^{message}"):
        super_resolve(y, scale, **({"model": "fista"} | arguments))


@pytest.mark.parametrize("name", [model(name) for name in MODELS])
def test_degenerate_pictures_come_back_finite(name):
    for y in (torch.zeros(1, 1, 3, 3), torch.ones(1, 3, 5, 20), torch.full((2, 1, 4, 3), 0.5)):
        for scale in SCALES:
            large, _ = super_resolve(y, scale, name, steps=3)
            assert bool(torch.isfinite(large).all()) and (large.mean() - y.mean()).abs() < 0.2


# The command.


def odlkit(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words], prog_name="odlkit")


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I;16"])
def test_the_command_keeps_the_mode_and_multiplies_the_size(tmp_path, mode):
    picture = Image.fromarray(data.sample("astronaut", (23, 26), gray=False)[0].permute(1, 2, 0).mul(255).byte().numpy())
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    if mode.endswith("A"):
        picture.putalpha(Image.fromarray(np.linspace(0, 255, 23 * 26).reshape(23, 26).astype(np.uint8)))
    picture.save(tmp_path / "a.png")
    result = odlkit("restore", "sr", tmp_path / "a.png", "--scale", 3, "-o", tmp_path / "b.png", "--model", "fista",
                    "--report", tmp_path / "r.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    before, after = (images.read(tmp_path / f"{name}.png") for name in "ab")
    assert after.describe() == before.describe() | {"height": 69, "width": 78}
    if mode.endswith("A"):
        assert abs(after.alpha.mean() - before.alpha.mean()) < 1 and after.alpha.dtype == before.alpha.dtype
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["input"]["height"], report["output"]["height"]) == (23, 69) and report["settings"]["scale"] == 3
    assert report["certificate"]["holds"] is None and "no guarantee" in result.stdout


REFUSED = {
    (): "scale: expected", ("--scale", "5"): "scale: expected 2, 3 or 4", ("--scale", "two"): "scale",
    ("--scale", "2", "--tile", "64"): "tile: expected no value, the task sr does not use it",
    ("--scale", "2", "--sigma", "0.1"): "sigma: expected no value", ("--scale", "2", "--boundary", "circular"): "boundary: ",
    ("--scale", "2", "--ratio", "0.5"): "ratio: ", ("--scale", "2", "--mask", "m.png"): "mask: ",
    ("--scale", "2", "--model", "tv"): "model: expected one of rpodm", ("--scale", "2", "--kernel", "no.npy"): "kernel: ",
    ("--scale", "2", "-o", "b.gif"): "output: ", ("--scale", "2", "--report", "no/r.json"): "report: ",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_bad_options_end_in_one_line_and_no_file(tmp_path, words):
    images.write(tmp_path / "a.png", data.sample("camera", 12), images.Picture(data.sample("camera", 12)))
    result = odlkit("restore", "sr", tmp_path / "a.png", "-o", tmp_path / "b.png", *words)
    assert result.exit_code == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1, result.output
    assert result.stderr.startswith(f"odlkit: {REFUSED[words]}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_tasks_and_models_are_listed():
    assert {"deblur", "sr"} <= {line.split()[0] for line in odlkit("tasks").stdout.splitlines()}
    listing = odlkit("models").stdout
    assert listing.index("\nsr\n") < listing.index("  rpodm ", listing.index("\nsr\n")) and "  fista " in listing
    assert next(iter(MODELS)) == "rpodm" == super_resolve.__defaults__[0]


@pytest.mark.parametrize("name", [model("podm")])
def test_the_printed_constant_keeps_no_proposal(name):
    """Source: PODM section 5.1: mu = 0.01, the whole move of the network; a hundredth of it with the repaired mu is kept."""
    from odlkit.bench.podm_sr import Case
    from odlkit.models.podm import PODM, Constants

    case = Case(data.sample("camera", 72), 3, "plain")
    step, problem, start = task.podm_setup(case.operator, case.y)
    printed = Constants(0.01, 0.95 / problem.lipschitz, 0.0049, 0.95 / problem.lipschitz)
    assert printed.accepted() < 0
    begun = propagate(step, problem, start, steps=step.stages).x
    rates = [propagate(solver, problem, begun, steps=5).trace.acceptance_rate()
             for solver in (PODM([step.network], printed, step.solver.levels), step.solver)]  # fmt: skip
    assert rates == [0.0, 1.0]
