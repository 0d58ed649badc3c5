"""Pictures and kernels as files: read with their depth, channels and alpha, written back the same way, whole or not at all.

Pillow reads and writes everything except 16-bit colour, which it would silently cut to 8 bits: pypng (PNG) and tifffile
(TIFF) do that.  Every refusal is a ``ValueError`` of one sentence that names the argument.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
SMALLEST = 3  # pixels a side: below this there is no picture to restore


@dataclass
class Picture:
    """A picture and what is needed to write another one like it.

    ``x`` is ``(1, C, H, W)`` float32 in [0, 1] with C = 1 or 3; ``alpha`` the ``(H, W)`` integers of the file or ``None``;
    ``bits`` 8 or 16; ``info`` the EXIF block and colour profile, which are copied (pixels stay in their stored orientation).
    """

    x: Tensor
    bits: int = 8
    alpha: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Height, width, channels, bits and alpha, for a report."""
        channels, height, width = self.x.shape[1:]
        return {"height": height, "width": width, "channels": channels, "bits": self.bits, "alpha": self.alpha is not None}


def read(path: Path | str, name: str = "input") -> Picture:
    """Read a PNG, JPEG, BMP or TIFF; gray or colour, 8 or 16 bit, palettes expanded, alpha set aside.

    Raises ``ValueError`` naming ``name`` when the file is missing, empty, cut off, not a picture, or smaller than 3 x 3.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{name}: expected an image file, {path} does not exist or is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{name}: expected an image file, {path} is empty")
    try:
        array, info = _decode(path)
    except Exception as error:  # decoders raise a dozen types on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: expected a readable PNG, JPEG, BMP or TIFF image, {path} is not ({reason})") from error
    array = array[..., None] if array.ndim == 2 else array
    if min(array.shape[:2]) < SMALLEST:
        size = f"{array.shape[0]}x{array.shape[1]}"
        raise ValueError(f"{name}: expected at least {SMALLEST}x{SMALLEST} pixels, {path} has {size}")
    alpha = array[..., -1].copy() if array.shape[2] in (2, 4) else None
    colour = array[..., : array.shape[2] - (alpha is not None)]
    bits = 8 * array.dtype.itemsize
    x = torch.from_numpy(colour.astype(np.float32) / (2**bits - 1)).permute(2, 0, 1)[None].contiguous()
    return Picture(x, bits, alpha, info)


def _decode(path: Path) -> tuple[np.ndarray, dict]:
    """The pixels as ``(H, W)`` or ``(H, W, C)`` of uint8 or uint16, and the metadata worth keeping."""
    from PIL import Image

    with Image.open(path) as picture:
        if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
            raise ValueError(f"it holds {picture.n_frames} pictures")  # type: ignore[attr-defined]
        info = {key: picture.info[key] for key in ("exif", "icc_profile") if picture.info.get(key)}
        if picture.format == "PNG" and picture.mode not in ("I;16", "I") and path.read_bytes()[24] == 16:
            return _decode_png16(path), info
        if picture.format == "TIFF" and picture.mode != "I;16B" and max(picture.tag_v2.get(258, (8,))) == 16:  # type: ignore[attr-defined]
            import tifffile

            return tifffile.imread(path).astype(np.uint16), info
        if picture.mode.startswith("I"):
            array = np.asarray(picture)
            if array.min() < 0 or array.max() > 65535:
                raise ValueError("its values exceed 16 bits")
            return array.astype(np.uint16), info
        if picture.mode == "F":
            raise ValueError("it holds floating point values, expected 8 or 16 bits")
        return np.asarray(_plain(picture)), info


def _plain(picture):
    """The picture in mode L, LA, RGB or RGBA; a palette of grays becomes L."""
    alpha = "transparency" in picture.info or picture.mode in ("LA", "PA", "RGBA", "La", "RGBa")
    if picture.mode in ("1", "L", "LA", "La"):
        return picture.convert("LA" if alpha else "L")
    colour = picture.convert("RGBA" if alpha else "RGB")
    if picture.mode in ("P", "PA"):
        planes = [np.asarray(band) for band in colour.split()[:3]]
        if (planes[0] == planes[1]).all() and (planes[0] == planes[2]).all():
            return colour.convert("LA" if alpha else "L")
    return colour


def _decode_png16(path: Path) -> np.ndarray:
    import png

    width, height, rows, info = png.Reader(filename=str(path)).asDirect()
    return np.vstack([np.asarray(row, dtype=np.uint16) for row in rows]).reshape(height, width, info["planes"])


def check_output(path: Path | str, picture: Picture, name: str = "output") -> Path:
    """Raise ``ValueError`` before any work is done if ``path`` cannot hold a picture like this one."""
    path = Path(path)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{name}: expected a name that ends in {', '.join(SUFFIXES)}, got {path.name!r}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{name}: expected a folder that can be written to, got {path.parent}")
    if path.is_dir():
        raise ValueError(f"{name}: expected a file name, {path} is a folder")
    if kind in ("JPEG", "BMP") and (picture.bits == 16 or picture.alpha is not None):
        what = "16 bits" if picture.bits == 16 else "an alpha channel"
        raise ValueError(f"{name}: expected .png or .tif, since the input has {what} and {kind} has not")
    return path


def write(path: Path | str, x: Tensor, like: Picture) -> None:
    """Write ``x`` ``(1, C, H, W)``, clamped to [0, 1] and rounded, with the depth, alpha and metadata of ``like``."""
    path = check_output(path, like)
    dtype = np.uint16 if like.bits == 16 else np.uint8
    values = x[0].detach().cpu().to(torch.float64).clamp(0, 1).mul(2**like.bits - 1).round().permute(1, 2, 0)
    array = values.numpy().astype(dtype)
    if like.alpha is not None:
        array = np.concatenate([array, like.alpha[..., None]], axis=2)
    array = np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)
    kind = SUFFIXES[path.suffix.lower()]
    with atomic(path) as handle:
        if like.bits == 16 and array.ndim == 3 and kind == "PNG":
            import png

            height, width, planes = array.shape
            png.Writer(width, height, bitdepth=16, greyscale=planes < 3, alpha=planes in (2, 4)).write(
                handle, array.reshape(height, -1)
            )
        elif like.bits == 16 and array.ndim == 3:
            import tifffile

            photometric = "rgb" if array.shape[2] > 2 else "minisblack"
            extra = ["unassalpha"] if like.alpha is not None else None
            tifffile.imwrite(handle, array, photometric=photometric, extrasamples=extra, planarconfig="contig")
        else:
            from PIL import Image

            options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
            Image.fromarray(array).save(handle, format=kind, **options, **({} if kind == "BMP" else like.info))


def centre(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """The middle of ``x`` ``(..., H, W)``: ``size`` pixels a side or ``(height, width)``, all of a side that has fewer."""
    height, width = (size, size) if isinstance(size, int) else size
    top, left = max(x.shape[-2] - height, 0) // 2, max(x.shape[-1] - width, 0) // 2
    return x[..., top : top + height, left : left + width]


def matching(x: Tensor, like: Picture) -> Picture:
    """``x`` as a picture with the depth and metadata of ``like``; its alpha is resized (bicubic) to that of ``x``."""
    alpha, size = like.alpha, tuple(x.shape[-2:])
    if alpha is not None and alpha.shape != size:
        values = torch.from_numpy(alpha.astype(np.float64))[None, None]
        values = torch.nn.functional.interpolate(values, size=size, mode="bicubic", antialias=True)
        alpha = values[0, 0].round().clamp(0, 2**like.bits - 1).numpy().astype(alpha.dtype)
    return replace(like, x=x, alpha=alpha)


class atomic:
    """``with atomic(path) as handle``: a temporary file beside ``path`` that takes its name only if the block succeeds."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self):
        self.handle = open(self.temporary, "w+b")  # noqa: SIM115  closed in __exit__
        return self.handle

    def __exit__(self, kind, error, trace) -> None:
        self.handle.close()
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def read_kernel(path: Path | str, name: str = "kernel") -> Tensor:
    """The numbers of a ``.npy`` file or of a picture (the mean of its channels, alpha left out) as float64, not yet checked.

    Raises ``ValueError`` when the file is missing, corrupt, or holds no real numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{name}: expected a .npy file or an image, {path} does not exist or is not a file")
    try:
        if path.suffix.lower() in SUFFIXES:
            array = _decode(path)[0]
            array = array[..., : array.shape[2] - (array.shape[2] in (2, 4))].mean(2) if array.ndim == 3 else array
        else:
            array = np.load(path, allow_pickle=False)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"its type is {array.dtype}, expected real numbers")
    except Exception as error:  # decoders raise a dozen types on broken files
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{name}: expected a readable .npy file or image, {path} is not ({reason})") from error
    return torch.from_numpy(np.array(array, dtype=np.float64))


def check_kernel_output(path: Path | str, name: str = "kernel_out") -> Path:
    """The path, if `write_kernel` can write there.  Raises ``ValueError`` if not."""
    path = Path(path)
    if path.suffix.lower() not in (".npy", *SUFFIXES) or path.is_dir():
        raise ValueError(f"{name}: expected a file name that ends in .npy, {', '.join(SUFFIXES)}, got {path.name!r}")
    check_output(path.with_suffix(".png"), Picture(torch.zeros(0)), name)
    return path


def write_kernel(path: Path | str, kernel: Tensor) -> None:
    """Write a kernel ``(h, w)``: its numbers as ``.npy``, or a gray picture of 8 bits, white its largest."""
    path = check_kernel_output(path)
    if path.suffix.lower() == ".npy":
        with atomic(path) as handle:
            np.save(handle, kernel.detach().cpu().numpy())
    else:
        write(path, (kernel / kernel.max())[None, None], Picture(torch.zeros(0)))
