"""Benchmark images by name, checked by SHA-256, from the folder that ``ODLKIT_DATA`` names; sample pictures without it.

The registry (`registry.json`) holds the data sets' task, licence, canonical address and the checksum of every file; no data
is part of the package.  Pictures are ``(1, C, H, W)`` float32 in [0, 1].
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit.images import centre

SAMPLES = ("camera", "astronaut", "coffee", "chelsea", "rocket", "coins", "brick", "moon", "page")

PICTURES = {".png", ".bmp", ".jpg", ".jpeg", ".tif"}  # the suffixes of images


class DataNotFound(FileNotFoundError):
    """A data set is not on this machine; the message says where it was looked for and where it comes from."""


@cache
def registry() -> dict[str, dict]:
    """Name -> ``{"task", "size", "paper", "url", "terms", "provenance", "files": {path: sha256}}``, some with ``"notes"``.

    Paths are relative to `root`: the set's name, then the path inside the set.
    """
    sets = json.loads(Path(__file__).with_name("registry.json").read_text(encoding="utf-8"))
    return {name: {**entry, "files": {f"{name}/{p}": h for p, h in entry["files"].items()}} for name, entry in sets.items()}


def root() -> Path:
    """The data folder: ``ODLKIT_DATA``, else ``odlkit`` in the user's cache folder."""
    chosen = os.environ.get("ODLKIT_DATA")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "odlkit"


def available() -> list[str]:
    """The names of the sets whose files are all in `root` (their checksums are not read)."""
    return [name for name, entry in registry().items() if all((root() / file).is_file() for file in entry["files"])]


def files(name: str, check: bool = False) -> list[Path]:
    """The files of a data set in registry order; with ``check`` every SHA-256 is compared.

    Raises `DataNotFound` when the set is unknown or not here, ``ValueError`` when a checksum differs.
    """
    entry = _entry(name)
    paths = [root() / file for file in entry["files"]]
    missing = sum(not path.is_file() for path in paths)
    if missing:
        raise DataNotFound(f"data: {name} is not in {root()} ({missing} of {len(paths)} files missing).\n{where(name)}")
    if check:
        digests = (hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
        wrong = [str(path) for path, d, e in zip(paths, digests, entry["files"].values(), strict=True) if d != e]
        if wrong:
            raise ValueError(f"data: {name}: not the registered SHA-256: {', '.join(wrong)}")
    return paths


def check(name: str) -> str:
    """Compare every file of a set with its SHA-256 and return the set's `checksum`; raises as `files` does."""
    files(name, check=True)
    return checksum(name)


def checksum(name: str) -> str:
    """One SHA-256 for a set, to be written beside results: that of its files' registered digests, sorted, one a line."""
    return hashlib.sha256("\n".join(sorted(_entry(name)["files"].values())).encode()).hexdigest()


def where(name: str) -> str:
    """Where a data set comes from, under which terms, and where its files go."""
    entry = _entry(name)
    sources = entry["provenance"] if isinstance(entry["provenance"], list) else [entry["provenance"]]
    return "\n".join([
        f"Home page: {entry['url'] or 'none known'}",
        f"Exact source (GitHub repository@commit:folder): {'; '.join(sources)}",
        f"Terms: {entry['terms']}. Cite: {entry['paper']}",
        f"Put its {len(entry['files'])} files where ODLKIT_DATA points, as {root() / next(iter(entry['files']))} and so on.",
    ])  # fmt: skip


def fetch(name: str) -> list[Path]:
    """The files of a set that is already here, every SHA-256 compared; odlkit downloads nothing by itself.

    No registered set has a direct address whose bytes are the registered files: the addresses are home pages and archives,
    and most terms ask the user to agree first.  So a set that is not here raises `DataNotFound` with the text of `where`.
    """
    return files(name, check=True)


def to_tensor(array: np.ndarray) -> Tensor:
    """``(H, W)`` or ``(H, W, C)`` integers or floats -> ``(1, C, H, W)`` float32 in [0, 1]."""
    scale = np.iinfo(array.dtype).max if array.dtype.kind in "ui" else 1
    array = np.asarray(array, dtype=np.float32) / scale
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)[None].contiguous()


def image(path: Path | str, gray: bool = False) -> Tensor:
    """Read one picture as ``(1, C, H, W)`` float32 in [0, 1]; with ``gray`` as luminance by the rule of ``PIL``'s mode L."""
    from PIL import Image

    with Image.open(path) as picture:
        as_is = picture.mode.startswith("I;16") or (not gray and picture.mode in ("L", "RGB"))  # PIL would clip 16 bits
        return to_tensor(np.array(picture if as_is else picture.convert("L" if gray else "RGB")))


def images(name: str, gray: bool = True) -> list[Tensor]:
    """All pictures of a data set, each ``(1, C, H, W)`` float32 in [0, 1]."""
    return [image(path, gray) for path in files(name) if path.suffix.lower() in PICTURES]


def pairs(folder: Path | str, degraded: str = "input", clean: str = "target") -> list[tuple[Path, Path]]:
    """``(degraded, clean)`` pictures of equal names in two folders of ``folder``, sorted by name.

    ``input`` and ``target`` is the layout of Rain13K, and of GoPro and SIDD as they are prepared for training.  Raises
    `DataNotFound` when a folder is missing and ``ValueError`` when it is empty or a picture has no partner.
    """
    sides = []
    for name in (degraded, clean):
        place = Path(folder) / name
        if not place.is_dir():
            raise DataNotFound(f"data: expected a folder {place} with one side of the pairs, it does not exist")
        sides.append({path.name: path for path in place.iterdir() if path.suffix.lower() in PICTURES})
    first, second = sides
    alone = sorted(first.keys() ^ second.keys())
    if alone or not first:
        what = f"{len(alone)} without a partner, such as {alone[0]}" if alone else "no pictures"
        raise ValueError(f"folder: expected pictures of equal names in {degraded} and {clean} of {folder}, got {what}")
    return [(first[name], second[name]) for name in sorted(first)]


def sample(name: str = "camera", size: int | tuple[int, int] | None = None, gray: bool = True) -> Tensor:
    """A picture that ships inside scikit-image, ``(1, C, H, W)`` float32 in [0, 1]; needs no data folder.

    ``size`` is ``(H, W)`` or one number for a square: the largest centred window of that shape, resized by antialiased
    bicubic interpolation and clamped to [0, 1].  With ``gray`` C = 1, by the rule of ``PIL``'s mode L; else colour pictures
    keep C = 3.  Raises ``ValueError`` for a name not in `SAMPLES` or a size that is not positive.
    """
    import skimage.data
    from PIL import Image

    if name not in SAMPLES:
        raise ValueError(f"name: no sample picture {name!r}; there are {', '.join(SAMPLES)}")
    picture = Image.fromarray(getattr(skimage.data, name)())
    x = to_tensor(np.asarray(picture.convert("L") if gray else picture))
    if size is None:
        return x
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size: expected positive numbers of pixels, got {size}")
    scale = min(x.shape[-2] / height, x.shape[-1] / width)
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    return nnf.interpolate(centre(x, (h, w)), (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def samples(size: int | tuple[int, int] | None = None, gray: bool = True) -> dict[str, Tensor]:
    """Every sample picture by name; the arguments are those of `sample`."""
    return {name: sample(name, size, gray) for name in SAMPLES}


def labelled(name: str) -> list[tuple[Tensor, Tensor]]:
    """Pictures ``(n, 1, H, W)`` float32 in [0, 1] with their classes ``(n,)``: a pair to train on and one to test with.

    ``mnist`` and ``fashion_mnist`` (28 x 28, the files at hand), or ``digits`` (8 x 8), which are part of scikit-learn and
    come as one pair of 1797.  Raises `DataNotFound` when a set is not here, and ``ImportError`` without scikit-learn.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        return [(torch.from_numpy(x).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(y).long())]
    arrays = {path.name.split("-ubyte")[0]: idx(path) for path in files(name)}
    pairs = []
    for part in ("train", "t10k"):
        x, y = (torch.from_numpy(array) for key, array in sorted(arrays.items()) if key.startswith(part))  # images, labels
        pairs.append((x.float()[:, None] / 255, y.long()))
    return pairs


def idx(path: Path) -> np.ndarray:
    """A gzipped idx file of bytes: two zeros, 8, the number of dimensions, each in four bytes, the data."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"path: expected an idx file of bytes, got {path.name}, which begins with {content[:3].hex()}")
    shape = np.frombuffer(content, ">u4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape).copy()


def levin_kernels() -> list[Tensor]:
    """The eight kernels of Levin et al. (2009) as stored, ``(h, w)`` float32 of odd sides, sum 1."""
    stored = np.load(next(path for path in files("levin09_kernels") if path.suffix == ".npz"))
    return [torch.tensor(stored[f"k{i}"], dtype=torch.float32) for i in range(8)]


class LevinPair(NamedTuple):
    """A captured pair: ``blurry`` is about ``Blur(kernel)(sharp)`` rolled by ``shift`` = (dy, dx); see `levin_pairs`."""

    name: str  # im0i_ker0k
    sharp: Tensor  # (1, 1, 255, 255) float32 in [0, 1]
    blurry: Tensor  # the same
    kernel: Tensor  # (h, w) float32, sum 1
    shift: tuple[int, int]


LEVIN_SHIFTS = {1: (0, 1), 2: (0, -1), 3: (1, 1), 4: (-2, 3), 5: (0, 0), 6: (-4, 4), 7: (-2, 2), 8: (-2, 2)}


def levin_pairs() -> list[LevinPair]:
    """The captured pairs of Levin et al. (2009) that are registered (24 of the 32), in the order of their names.

    What the files leave unsaid.  The blurry image is the *correlation* of the sharp one with the stored kernel f, so
    ``kernel`` is f rotated by 180 degrees and ``odlkit.operators.Blur(kernel)`` is the model.  The stored kernels are also
    off centre by up to 4 pixels: the model's output rolled by ``shift`` agrees best with ``blurry``, so a restoration comes
    out moved by ``shift`` and is scored up to a shift (`odlkit.metrics.psnr_up_to_shift`).  The blur was captured, so what
    the border shows came partly from outside the frame: no circular or zero boundary is right there, and half a kernel plus
    the shift must be discarded or treated as unknown.  The sharp images of one scene are different crops for different
    kernels: always take ``sharp`` from the same pair.  Raises `DataNotFound` when the set is not here.
    """
    from scipy.io import loadmat

    pairs = []
    for path in files("levin09"):
        if "_ker" in path.stem:  # the other file, sizeL.mat, lists the kernel sizes used in blind estimation
            stored = loadmat(path, variable_names=["x", "y", "f"])
            kernel = torch.tensor(np.rot90(stored["f"], 2).copy(), dtype=torch.float32)
            pairs.append(LevinPair(path.stem, to_tensor(stored["x"]), to_tensor(stored["y"]), kernel,
                                   LEVIN_SHIFTS[int(path.stem[-2:])]))  # fmt: skip
    return pairs


def _entry(name: str) -> dict:
    if name not in registry():
        raise DataNotFound(f"data: unknown set {name!r}; there are {', '.join(registry())}")
    return registry()[name]
