"""One file a task: check the input, build the problem, choose and run a model, report.  Only here are degradations known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Task:
    """A task as ``odlkit restore`` runs it: ``function(y, model=..., progress=..., **options) -> (image, report)``.

    ``place`` is ``module:function``, imported when it is used; the module's ``MODELS`` names what ``model`` may be, the
    default first.  ``needs`` and ``takes`` are the options of the command line that must and that may be given.
    """

    what: str
    place: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()

    def function(self) -> Callable[..., tuple[Any, dict[str, Any]]]:
        """What restores."""
        module, name = self.place.split(":")
        return getattr(import_module(module), name)

    def models(self) -> dict[str, Any]:
        """Name -> `odlkit.tasks.report.Model`."""
        return import_module(self.place.split(":")[0]).MODELS


TASKS = {
    "deblur": Task(
        "remove the blur of a known kernel from a photograph with noise; without one (dgunet) unknown motion blur",
        "odlkit.tasks.deblur:deblur",
        takes=("kernel", "sigma", "boundary", "tile"),
    ),
    "deblur-blind": Task(
        "remove motion blur that nobody knows from a photograph, by estimating its kernel (blind deconvolution)",
        "odlkit.tasks.deblur_blind:deblur_blind",
        takes=("size", "sigma", "tile", "kernel_out"),
    ),
    "sr": Task(
        "enlarge a picture 2, 3 or 4 times (super-resolution)",
        "odlkit.tasks.sr:super_resolve",
        needs=("scale",),
        takes=("kernel",),
    ),
    "inpaint": Task(
        "fill in the pixels that a mask leaves out (interpolation)",
        "odlkit.tasks.inpaint:inpaint",
        needs=("mask",),
    ),
    "cs": Task(
        "recover a picture from few numbers for each block, which are measured here (compressive sensing, simulated)",
        "odlkit.tasks.sense:sense",
        needs=("ratio",),
        takes=("tile",),
    ),
    "derain": Task(
        "remove rain streaks from a photograph",
        "odlkit.tasks.derain:derain",
        takes=("tile",),
    ),
    "dehaze": Task(
        "remove haze from a photograph",
        "odlkit.tasks.dehaze:dehaze",
    ),
    "lowlight": Task(
        "brighten a photograph that had too little light",
        "odlkit.tasks.lowlight:enhance",
    ),
    "flow": Task(
        "find where each pixel of a frame is in the next one (optical flow): a .flo file, or directions as colours",
        "odlkit.tasks.flow:optical_flow",
        needs=("second",),
    ),
    "denoise": Task(
        "remove the noise of a camera, or Gaussian noise",
        "odlkit.tasks.denoise:denoise",
        takes=("sigma", "tile"),
    ),
    "smooth": Task(
        "remove texture and noise, keep edges (l0 smoothing)",
        "odlkit.tasks.smooth:smooth",
        takes=("strength",),
    ),
}
