"""Benchmark images by name, checked by SHA-256, from the folder that ``ODLKIT_DATA`` names.

The registry (`registry.json`) holds the data sets' task, licence, canonical address and the checksum of every file; no data
is part of the package.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class DataNotFound(FileNotFoundError):
    """A data set is not on this machine; the message says where it was looked for and where it comes from."""


@cache
def registry() -> dict[str, dict]:
    """Name -> ``{"task", "url", "terms", "notes", "files": {path: sha256}, ...}``."""
    text = Path(__file__).with_name("registry.json").read_text()
    return {entry["name"]: entry for entry in json.loads(text)["datasets"]}


def root() -> Path:
    """The data folder: ``ODLKIT_DATA``, else ``odlkit`` in the user's cache folder."""
    chosen = os.environ.get("ODLKIT_DATA")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "odlkit"


def files(name: str, check: bool = False) -> list[Path]:
    """The files of a data set in registry order; with ``check`` every SHA-256 is compared.

    Raises `DataNotFound` when the set is unknown or not here, ``ValueError`` when a checksum differs.
    """
    if name not in registry():
        raise DataNotFound(f"data: unknown set {name!r}; there are {', '.join(registry())}")
    entry = registry()[name]
    paths = [root() / file for file in entry["files"]]
    missing = [p for p in paths if not p.exists()]
    if missing:
        raise DataNotFound(f"data: {name} is not in {root()} ({len(missing)} files missing); see {entry['url']}")
    for path, digest in zip(paths, entry["files"].values(), strict=True):
        if check and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(f"data: {path} does not have the registered SHA-256")
    return paths


def to_tensor(array: np.ndarray) -> Tensor:
    """``(H, W)`` or ``(H, W, C)`` integers or floats -> ``(1, C, H, W)`` float32 in [0, 1]."""
    scale = np.iinfo(array.dtype).max if array.dtype.kind in "ui" else 1
    array = np.asarray(array, dtype=np.float32) / scale
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)[None].contiguous()


def image(path: Path | str, gray: bool = False) -> Tensor:
    """Read one picture as ``(1, C, H, W)`` float32 in [0, 1]; with ``gray`` as luminance by the rule of ``PIL``'s mode L."""
    from PIL import Image

    with Image.open(path) as picture:
        picture = picture.convert("L" if gray else "RGB") if gray or picture.mode not in ("L", "RGB") else picture.copy()
    return to_tensor(np.asarray(picture))


def images(name: str, gray: bool = True) -> list[Tensor]:
    """All pictures of a data set, each ``(1, C, H, W)`` float32 in [0, 1]."""
    kinds = {".png", ".bmp", ".jpg", ".jpeg", ".tif"}
    return [image(path, gray) for path in files(name) if path.suffix.lower() in kinds]


def levin_kernels() -> list[Tensor]:
    """The eight kernels of Levin et al. (2009), ``(h, w)`` float32, sum 1."""
    stored = np.load(files("levin09_kernels")[_index("levin09_kernels", ".npz")])
    return [torch.tensor(stored[f"k{i}"], dtype=torch.float32) for i in range(8)]


def _index(name: str, ending: str) -> int:
    return next(i for i, path in enumerate(registry()[name]["files"]) if path.endswith(ending))
