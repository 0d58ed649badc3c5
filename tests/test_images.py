"""Pictures come back as they were read: size, channels, depth, alpha; broken files are refused in one sentence."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from odlkit import images


def store(path, array):
    """Write an array with Pillow, or where Pillow cannot, with what can."""
    if array.dtype == np.uint16 and array.ndim == 3:
        if path.suffix == ".png":
            import png

            planes = array.shape[2]
            writer = png.Writer(array.shape[1], array.shape[0], bitdepth=16, greyscale=planes < 3, alpha=planes in (2, 4))
            with path.open("wb") as handle:
                writer.write(handle, array.reshape(len(array), -1))
        else:
            tifffile.imwrite(path, array, photometric="rgb", extrasamples=["unassalpha"] if array.shape[2] == 4 else None)
    else:
        Image.fromarray(array).save(path)
    return path


def pixels(path):
    """Every stored value of a picture, by a decoder that keeps the depth."""
    if path.suffix == ".tif":
        return tifffile.imread(path)
    array, _ = images._decode(path)
    return array


@pytest.mark.parametrize("size", [(7, 9), (8, 5)])
@pytest.mark.parametrize("channels", [0, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_round_trip_keeps_every_value(tmp_path, size, channels, bits, suffix):
    if suffix == ".tif" and channels == 2:
        pytest.skip("gray with alpha is a PNG matter")
    rng = np.random.default_rng(0)
    shape = (*size, channels) if channels else size
    array = rng.integers(0, 2**bits, shape).astype(np.uint16 if bits == 16 else np.uint8)
    source, target = store(tmp_path / f"in{suffix}", array), tmp_path / f"out{suffix}"
    picture = images.read(source)
    assert picture.bits == bits and picture.x.shape == (1, 3 if channels > 2 else 1, *size)
    assert (picture.alpha is not None) == (channels in (2, 4))
    images.write(target, picture.x, picture)
    again = pixels(target)
    assert again.dtype == array.dtype and np.array_equal(again, array)


@pytest.mark.parametrize("suffix,mode", [(".jpg", "L"), (".jpg", "RGB"), (".bmp", "RGB")])
def test_eight_bit_formats_keep_size_and_mode(tmp_path, suffix, mode):
    x = torch.linspace(0, 1, 63).reshape(1, 1, 7, 9).expand(1, len(mode), 7, 9)
    images.write(tmp_path / f"a{suffix}", x, images.Picture(x))
    with Image.open(tmp_path / f"a{suffix}") as again:
        assert again.mode == mode and again.size == (9, 7)
    assert (images.read(tmp_path / f"a{suffix}").x - x).abs().max() < 0.08


def test_palettes_are_expanded_and_gray_palettes_stay_gray(tmp_path):
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 7, 3)).astype(np.uint8)).quantize(8)
    colour.save(tmp_path / "c.png")
    assert images.read(tmp_path / "c.png").x.shape == (1, 3, 6, 7)
    gray = Image.fromarray((np.arange(42).reshape(6, 7) * 6).astype(np.uint8)).convert("P")
    gray.save(tmp_path / "g.png")
    assert images.read(tmp_path / "g.png").x.shape == (1, 1, 6, 7)
    colour.save(tmp_path / "t.png", transparency=0)
    assert images.read(tmp_path / "t.png").alpha is not None


def test_values_are_clamped_and_rounded_not_wrapped(tmp_path):
    x = torch.tensor([[-0.5, 0.0, 0.4999 / 255], [0.5 / 255 + 1e-6, 1.0, 1.5], [0.25, 0.5, 0.75]])[None, None]
    images.write(tmp_path / "a.png", x, images.Picture(x))
    assert pixels(tmp_path / "a.png").tolist() == [[0, 0, 0], [1, 255, 255], [64, 128, 191]]


def test_metadata_is_carried_over(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: pixels stay as stored, so the tag must stay too
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif, icc_profile=b"profile")
    picture = images.read(tmp_path / "a.jpg")
    images.write(tmp_path / "b.jpg", picture.x, picture)
    with Image.open(tmp_path / "b.jpg") as again:
        assert again.getexif()[0x0112] == 6 and again.info["icc_profile"] == b"profile"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyError), images.atomic(tmp_path / "a.txt") as handle:
        handle.write(b"half")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("bits,alpha,name", [(16, 0, "a.jpg"), (8, 1, "a.jpg"), (16, 0, "a.bmp"), (8, 0, "a.xyz")])
def test_an_output_that_cannot_hold_the_picture_is_refused(tmp_path, bits, alpha, name):
    picture = images.Picture(torch.zeros(1, 1, 4, 4), bits, np.zeros((4, 4), np.uint8) if alpha else None)
    with pytest.raises(ValueError, match="^output: expected"):
        images.check_output(tmp_path / name, picture)
    with pytest.raises(ValueError, match="^output: expected"):
        images.check_output(tmp_path / "no" / "a.png", picture)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, bool])
def test_kernels_of_any_real_type_are_read(tmp_path, dtype):
    stored = np.array([[1, 0], [1, 1], [0, 1]], dtype=dtype)
    np.save(tmp_path / "k.npy", stored)
    kernel = images.read_kernel(tmp_path / "k.npy")
    assert kernel.dtype == torch.float64 and np.array_equal(kernel.numpy(), stored.astype(float))


def test_kernel_pictures_are_read_with_their_depth(tmp_path):
    array = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    Image.fromarray(array).save(tmp_path / "k.png")
    assert np.array_equal(images.read_kernel(tmp_path / "k.png").numpy(), array.astype(float))
    colour = np.stack([array, array, array], 2) // 256
    Image.fromarray(colour.astype(np.uint8)).save(tmp_path / "c.png")
    assert np.allclose(images.read_kernel(tmp_path / "c.png").numpy(), array // 256)
