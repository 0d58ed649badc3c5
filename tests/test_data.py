"""The registry, its checksums, the sample pictures, and the facts about the Levin pairs."""

import hashlib
import os

import pytest
import torch

from odlkit import data, metrics
from odlkit.operators import Blur

CONTENT = {"tiny/a.bin": b"first", "tiny/sub/b.bin": b"second"}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A data folder with one small set laid out as the registry says, and a registry that holds just it."""
    entry = {
        "task": "none", "size": "", "paper": "Nobody (2000)", "url": "https://example.org/tiny", "terms": "free",
        "provenance": "owner/repository@abc:folder/", "files": {path: digest(content) for path, content in CONTENT.items()},
    }  # fmt: skip
    monkeypatch.setattr(data, "registry", lambda: {"tiny": entry})
    monkeypatch.setenv("ODLKIT_DATA", str(tmp_path))
    for path, content in CONTENT.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    return tmp_path


@pytest.fixture
def levin():
    if not os.environ.get("ODLKIT_DATA"):
        pytest.skip("ODLKIT_DATA is not set: the Levin pairs are not here")
    if "levin09" not in data.available():
        pytest.skip(f"levin09 is not in {data.root()}")
    return data.levin_pairs()


def test_registry_entries_are_complete():
    assert len(data.registry()) == 28
    for name, entry in data.registry().items():
        assert set(entry) - {"notes"} == {"task", "size", "paper", "url", "terms", "provenance", "files"}, name
        assert entry["terms"] and entry["files"], name
        for path, sha in entry["files"].items():
            assert path.startswith(f"{name}/") and len(sha) == 64 and int(sha, 16) >= 0


def test_files_are_found_and_checked(tiny):
    assert data.files("tiny", check=True) == [tiny / path for path in CONTENT]
    assert data.fetch("tiny") == data.files("tiny")
    assert data.available() == ["tiny"]
    both = "\n".join(sorted(map(digest, CONTENT.values())))
    assert data.check("tiny") == data.checksum("tiny") == digest(both.encode())


def test_a_tampered_file_fails_the_check_and_is_named(tiny):
    (tiny / "tiny/sub/b.bin").write_bytes(b"secund")
    assert len(data.files("tiny")) == 2  # only a check reads the bytes
    for call in (lambda: data.files("tiny", check=True), lambda: data.check("tiny"), lambda: data.fetch("tiny")):
        with pytest.raises(ValueError, match=r"tiny: not the registered SHA-256: .*b\.bin") as caught:
            call()
        assert "a.bin" not in str(caught.value)


def test_a_missing_set_says_where_it_comes_from_and_goes(tiny):
    (tiny / "tiny/a.bin").unlink()
    assert data.available() == []
    for call in (data.files, data.fetch, data.check):
        with pytest.raises(data.DataNotFound) as caught:
            call("tiny")
        facts = ("1 of 2 files missing", "https://example.org/tiny", "owner/repository@abc", "free", "Nobody (2000)")
        for part in (*facts, str(tiny / "tiny/a.bin")):
            assert part in str(caught.value)


@pytest.mark.parametrize("call", [data.files, data.fetch, data.check, data.checksum, data.where, data.images])
def test_an_unknown_set_is_named(call):
    with pytest.raises(data.DataNotFound, match="'bsd69'.*bsd68"):
        call("bsd69")


def test_root_without_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("ODLKIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.root() == tmp_path / "odlkit"


def test_samples_need_no_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ODLKIT_DATA", str(tmp_path))
    for name, x in data.samples(size=48).items():
        assert x.shape == (1, 1, 48, 48) and x.dtype == torch.float32, name
        assert x.min() >= 0 and x.max() <= 1 and x.std() > 0.02, name


def test_sample_sizes_and_colours():
    import skimage.data

    camera = data.sample("camera")
    torch.testing.assert_close(camera[0, 0], torch.from_numpy(skimage.data.camera()) / 255)
    assert data.sample("coffee", gray=False).shape == (1, 3, 400, 600)
    assert data.sample("coffee", size=(32, 96), gray=False).shape == (1, 3, 32, 96)
    assert torch.equal(data.sample("coffee", 64), data.sample("coffee", 64))
    halved = torch.nn.functional.avg_pool2d(camera, 2)  # an antialiased resize stays near the block means
    assert metrics.psnr(data.sample("camera", 256), halved).item() > 30
    assert torch.equal(data.sample("camera", 512), camera)
    astronaut = data.sample("astronaut", gray=False)
    weighted = (astronaut * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    assert (data.sample("astronaut") - weighted).abs().max() < 1.1 / 255


@pytest.mark.parametrize(
    "arguments, argument", [(("nobody",), "name"), (("camera", 0), "size"), (("camera", (8, -1)), "size")]
)
def test_bad_samples_name_the_argument(arguments, argument):
    with pytest.raises(ValueError, match=argument):
        data.sample(*arguments)


def test_image_reads_gray_colour_and_16_bit(tmp_path):
    import numpy as np
    from PIL import Image

    colour = np.zeros((4, 5, 3), np.uint8)
    colour[..., 0] = 255
    Image.fromarray(colour).save(tmp_path / "red.png")
    red = data.image(tmp_path / "red.png")
    assert red.shape == (1, 3, 4, 5) and red[0, :, 0, 0].tolist() == [1, 0, 0]
    assert data.image(tmp_path / "red.png", gray=True)[0, 0, 0, 0].item() == pytest.approx(76 / 255)  # 0.299 * 255 rounded
    deep = np.array([[0, 1000], [30000, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for gray in (True, False):
        read = data.image(tmp_path / "deep.png", gray=gray)
        assert read.shape == (1, 1, 2, 2) and read.flatten().tolist() == pytest.approx((deep.flatten() / 65535).tolist())


def test_levin_pairs_are_unit_images_with_normalised_odd_kernels(levin):
    assert len(levin) == 24 and [p.name for p in levin] == sorted(p.name for p in levin)
    for p in levin:
        assert p.sharp.shape == p.blurry.shape == (1, 1, 255, 255) and p.sharp.dtype == torch.float32
        assert min(p.sharp.min(), p.blurry.min()) >= 0 and max(p.sharp.max(), p.blurry.max()) <= 1
        assert p.kernel.shape[0] % 2 == p.kernel.shape[1] % 2 == 1 and p.kernel.sum().item() == pytest.approx(1, abs=1e-5)
        if "levin09_kernels" in data.available():
            assert torch.equal(p.kernel, data.levin_kernels()[int(p.name[-1]) - 1].flip(0, 1))


def test_levin_model_agrees_after_the_shift_and_only_then(levin):
    """Interior agreement of Blur(kernel)(sharp), rolled by the shift, with the photograph: 38 to 48 dB for all 24 pairs."""
    for p in levin:
        border = max(p.kernel.shape) // 2 + 5
        blurred = Blur(p.kernel)(p.sharp)
        agreement = metrics.psnr(blurred.roll(p.shift, (-2, -1)), p.blurry, border=border).item()
        assert 38 < agreement < 48, p.name
        assert tuple(metrics.best_shift(blurred, p.blurry, border=border)[0].tolist()) == p.shift, p.name
        as_stored = Blur(p.kernel.flip(0, 1))(p.sharp)
        assert metrics.psnr_up_to_shift(as_stored, p.blurry, border=border).item() < agreement - 2, p.name
