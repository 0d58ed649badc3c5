"""The command line's contract: files in, files out, exit codes, and one line on standard error for bad input."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from odlkit import cli, data, images, weights
from odlkit.bench import SUITES
from odlkit.operators import ValidBlur

trained = pytest.mark.skipif("padnet-image" not in weights.cards(), reason="the network padnet-image is not installed")
KERNEL = np.eye(5) / 5


def odlkit(*words):
    """Run the command in this process: the result has exit_code, stdout, stderr."""
    return CliRunner().invoke(cli.main, [str(word) for word in words], prog_name="odlkit")


@pytest.fixture
def folder(tmp_path):
    """A folder with a good gray picture and a good kernel."""
    y = ValidBlur(torch.from_numpy(KERNEL).float()).A(data.sample("camera", (45, 51)))
    images.write(tmp_path / "in.png", y, images.Picture(y))
    np.save(tmp_path / "k.npy", KERNEL)
    return tmp_path


def restore(folder, *words, name="in.png", kernel="k.npy", out="out.png", model=("--model", "tv")):
    return odlkit("restore", "deblur", folder / name, "--kernel", folder / kernel, "-o", folder / out,
                  "--report", folder / "r.json", *model, *words)  # fmt: skip


def break_input(folder, how):
    """Write ``bad.png``, broken in the way named."""
    path = folder / "bad.png"
    if how == "empty":
        path.touch()
    elif how == "truncated":
        path.write_bytes((folder / "in.png").read_bytes()[:-500])
    elif how == "text":
        path.write_text("not a picture")
    elif how == "one pixel":
        Image.fromarray(np.zeros((1, 1), np.uint8)).save(path)
    elif how == "floating point":
        Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(path, format="TIFF")
    elif how == "folder":
        path.mkdir()
    return path.name


def break_kernel(folder, how):
    """Write ``bad.npy``, broken in the way named."""
    arrays = {
        "NaN": np.full((3, 3), np.nan), "all zero": np.zeros((3, 3)), "negative sum": -np.ones((3, 3)),
        "three-dimensional": np.ones((3, 3, 3)), "too large": np.ones((60, 3)), "empty array": np.ones((0, 3)),
        "words": np.array([["a", "b"]]), "objects": np.array([[None, 1]], dtype=object), "complex": np.ones((3, 3)) * 1j,
    }  # fmt: skip
    path = folder / "bad.npy"
    if how in arrays:
        np.save(path, arrays[how], allow_pickle=True)
    elif how == "corrupt":
        path.write_bytes((folder / "k.npy").read_bytes()[:100])
    elif how == "empty":
        path.touch()
    elif how == "corrupt picture":
        path = folder / "bad.png"
        path.write_bytes((folder / "in.png").read_bytes()[:60])
    return path.name


INPUTS = ["missing", "empty", "truncated", "text", "one pixel", "floating point", "folder"]
KERNELS = ["missing", "NaN", "all zero", "negative sum", "three-dimensional", "too large", "empty array", "words", "objects",
           "complex", "corrupt", "empty", "corrupt picture"]  # fmt: skip
OPTIONS = {
    ("--sigma", "-0.1"): "sigma", ("--sigma", "nan"): "sigma", ("--sigma", "2"): "sigma", ("--sigma", "much"): "sigma",
    ("--sigma", "inf"): "sigma", ("--model", "none"): "model", ("--boundary", "zero"): "boundary", ("--tile", "2"): "tile",
    ("--tile", "x"): "tile", ("--device", "abacus"): "device", ("--seed", "x"): "seed", ("--mask", "m.png"): "mask",
    ("--scale", "2"): "scale", ("--report", "no/such/folder/r.json"): "report", ("-o", "out.gif"): "output",
    ("-o", "no/such/folder/out.png"): "output", ("--colour", "red"): "No such option",
}  # fmt: skip


def refused(result, folder, name):
    """Exit 2, one line that names the argument, nothing on standard output, nothing written."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"odlkit: {name}"), result.stderr
    assert result.stdout == ""
    assert not [p.name for p in folder.iterdir() if p.name not in {"in.png", "k.npy", "bad.png", "bad.npy"}]


@pytest.mark.parametrize("how", INPUTS)
def test_bad_pictures_are_refused(folder, how):
    refused(restore(folder, name=break_input(folder, how)), folder, "input: expected")


@pytest.mark.parametrize("how", KERNELS)
def test_bad_kernels_are_refused(folder, how):
    refused(restore(folder, kernel=break_kernel(folder, how)), folder, "kernel: expected")


@pytest.mark.parametrize("words", OPTIONS)
def test_bad_options_are_refused(folder, words):
    refused(restore(folder, *words), folder, OPTIONS[words])


@pytest.mark.parametrize(
    "words,name",
    [(["restore", "sharpen", "a.png", "-o", "b.png"], "task: expected one of deblur"), (["restore"], "task: expected"),
     (["restore", "deblur"], "input: expected"), (["restore", "deblur", "a.png"], "output: expected"),
     (["restore", "inpaint", "a.png", "-o", "b.png"], "mask: expected"), (["certify", "no-theorem"], "name: expected"),
     (["train", "no-recipe"], "recipe: expected"), (["data", "fetch", "no-set"], "data: unknown set"),
     (["fly"], "No such command"), (["bench"], "suite: expected"),
     (["certify", "--json", "no/such/folder/c.json"], "json: expected")],
)  # fmt: skip
def test_other_bad_words_are_refused(tmp_path, words, name):
    refused(odlkit(*words), tmp_path, name)


def test_a_process_refuses_in_one_line(folder):
    words = ["restore", "deblur", str(folder / "none.png"), "--kernel", str(folder / "k.npy"), "-o", str(folder / "out.png")]
    done = subprocess.run([sys.executable, "-m", "odlkit", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("odlkit: input: expected an image file")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kernel", [(5, 5), (4, 6)])
def test_output_has_the_input_s_size_and_mode(folder, suffix, channels, bits, kernel):
    if suffix == ".jpg" and bits == 16:
        pytest.skip("JPEG holds 8 bits")
    x = data.sample("astronaut", (33, 42), gray=channels == 1)
    images.write(folder / f"a{suffix}", x, images.Picture(x, bits))
    np.save(folder / "e.npy", np.ones(kernel) / np.prod(kernel))
    result = restore(folder, "--sigma", 0.01, name=f"a{suffix}", kernel="e.npy", out=f"b{suffix}")
    assert result.exit_code == 0, result.output
    before, after = (images._decode(folder / f"{name}{suffix}")[0] for name in "ab")
    assert before.shape == after.shape and before.dtype == after.dtype and not np.array_equal(before, after)
    assert after.dtype == (np.uint16 if bits == 16 else np.uint8)


def test_alpha_is_kept(folder):
    array = np.random.default_rng(0).integers(0, 256, (20, 23, 4)).astype(np.uint8)
    Image.fromarray(array).save(folder / "a.png")
    assert restore(folder, "--sigma", 0.05, name="a.png").exit_code == 0
    after = images._decode(folder / "out.png")[0]
    assert after.shape == array.shape and np.array_equal(after[..., 3], array[..., 3])


def test_the_report_says_what_was_run(folder, report_keys):
    result = restore(folder, "--sigma", 0.01, "--seed", 3)
    report = json.loads((folder / "r.json").read_text())
    assert result.exit_code == 0 and result.stdout.startswith(str(folder / "out.png")) and result.stderr == ""
    assert report_keys <= report.keys()
    assert report["input"]["path"] == str(folder / "in.png") and report["output"]["path"] == str(folder / "out.png")
    assert (report["input"]["height"], report["input"]["width"], report["input"]["bits"]) == (41, 47, 8)
    assert report["settings"]["sigma"] == 0.01 and report["settings"]["seed"] == 3 and report["model"] == "tv"
    assert report["versions"]["torch"] == torch.__version__


def test_a_report_to_standard_output_is_all_there_is(folder):
    result = odlkit("restore", "deblur", folder / "in.png", "--kernel", folder / "k.npy", "-o", folder / "o.png",
                    "--model", "tv", "--report", "-")  # fmt: skip
    assert json.loads(result.stdout)["task"] == "deblur" and (folder / "o.png").exists()
    assert "sigma: not given, estimated" in result.stderr


def test_a_kernel_of_another_sum_is_noted_and_harmless(folder):
    np.save(folder / "seven.npy", 7 * KERNEL)
    first = restore(folder, "--sigma", 0.01)
    second = restore(folder, "--sigma", 0.01, kernel="seven.npy", out="two.png")
    assert first.stderr == "" and "its sum was 7, normalised to 1" in second.stderr and second.exit_code == 0
    one, two = (images.read(folder / name).x for name in ("out.png", "two.png"))
    assert (one - two).abs().max() < 2.5 / 255


@trained
def test_a_diverging_run_exits_3_and_writes_nothing(folder, monkeypatch):
    class Exploding(torch.nn.Module):
        def forward(self, v, alpha):
            return 1e5 * v

    monkeypatch.setattr(weights, "load", lambda name: Exploding())
    result = restore(folder, "--sigma", 0.01, model=())
    assert result.exit_code == 3 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert "Implicit" in result.stderr and not (folder / "out.png").exists() and not (folder / "r.json").exists()


def test_certify_prints_json_alone_and_exits_3_when_a_claim_fails(monkeypatch, tmp_path):
    from odlkit import certify

    entry = {"name": certify.NAMES[0], "holds": True, "margin": 0.1, "instances": 3, "acceptance_rate": float("nan"),
             "control": {"what": "no check", "violates": True}, "dtype": "float64", "seconds": 1.0}  # fmt: skip
    monkeypatch.setattr(certify, "run", lambda names, progress: [entry])
    result = odlkit("certify", certify.NAMES[0], "--json", "-")
    assert result.exit_code == 0 and json.loads(result.stdout)[0]["acceptance_rate"] is None and result.stderr == ""
    assert "holds" in odlkit("certify", "--json", tmp_path / "c.json").stdout and json.loads(
        (tmp_path / "c.json").read_text()
    )
    for broken in ({"holds": False}, {"control": {"what": "no check", "violates": False}}):
        monkeypatch.setattr(certify, "run", lambda names, progress, broken=broken: [entry | broken])
        result = odlkit("certify")
        assert result.exit_code == 3 and result.stderr.splitlines() == [
            f"odlkit: certify: not as stated: {certify.NAMES[0]}"
        ]


def test_training_is_called_by_name(monkeypatch, tmp_path):
    from odlkit import training

    seen = []
    monkeypatch.setattr(training, "recipe", lambda name: lambda out, resume: seen.append((name, out, resume)))
    assert odlkit("train", "padnet-image", "--out", tmp_path, "--resume").exit_code == 0
    assert seen == [("padnet-image", tmp_path, True)]


def test_every_recipe_and_every_command_exists():
    from odlkit import training

    assert all(callable(training.recipe(name)) for name in training.RECIPES)
    for words in ([], ["restore"], ["certify"], ["train"], ["bench"], ["data"], ["data", "list"], ["data", "fetch"],
                  ["data", "check"], ["tasks"], ["models"]):  # fmt: skip
        result = odlkit(*words, "--help")
        assert result.exit_code == 0 and "Usage: odlkit" in result.stdout
    for words, names in (("train", training.RECIPES), ("bench", SUITES)):  # none is broken at the end of a line
        assert set(names) <= set(re.split(r"[\s,]+", odlkit(words, "--help").stdout))
    assert odlkit().exit_code == 0 and odlkit("--version").stdout.strip().endswith("0.1.0")


def test_listings(tmp_path, monkeypatch):
    monkeypatch.setenv("ODLKIT_DATA", str(tmp_path))
    assert "deblur" in odlkit("tasks").stdout and "ipadnet" in odlkit("models").stdout
    listing = odlkit("data", "list").stdout.splitlines()
    assert len(listing) == len(data.registry()) and all("not here" in line for line in listing)
    assert odlkit("data", "check").stdout == ""
    missing = odlkit("data", "fetch", "bsd68")
    assert missing.exit_code == 2 and len(missing.stderr.splitlines()) == 1 and "bsd68 is not in" in missing.stderr
