"""Pictures and curves with one look: colour-blind safe, told apart by line style too, legible at phone width, on white.

matplotlib is imported on first use.  The plots return its figures; `save` writes one with the numbers behind it.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import product, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from odlkit.propagate import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")  # Okabe and Ito (2008)
STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
LABELS = {"energy": "energy F", "change": "change of x", "error": "relative error", "norm": "norm of x"}
LOOK: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "odlkit"}
LOOK |= dict.fromkeys(["figure.facecolor", "axes.facecolor"], "white")  # black on white whatever the page's theme
LOOK |= dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"], "black")


def show(images: Mapping[str, Tensor] | Sequence[Tensor], zoom: Sequence[int] | None = None, columns: int = 3) -> Figure:
    """Pictures side by side under their titles, at most ``columns`` in a row, clamped to [0, 1] and never rescaled.

    Each is ``(1, C, H, W)``, ``(C, H, W)`` or ``(H, W)`` with C = 1 (gray) or 3.  ``zoom = (top, left, side)`` marks that
    square in every picture and shows it enlarged, to three times its size or 45% of the picture, in the lower right corner.
    Raises ``ValueError`` when there is no picture, a shape does not fit or the square is not inside a picture.
    """
    named = dict(images) if isinstance(images, Mapping) else {str(i): x for i, x in enumerate(images)}
    if not named:
        raise ValueError("images: expected at least one picture")
    pictures = {title: _picture(title, x) for title, x in named.items()}
    columns = min(max(columns, 1), len(named))
    rows = -(-len(named) // columns)
    height, width = next(iter(pictures.values())).shape[:2]
    fig, axes = _subplots(rows, columns, (2.2 * columns, (2.2 * height / width + 0.35) * rows))
    for ax, (title, picture) in zip(axes, pictures.items(), strict=False):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        if isinstance(images, Mapping):
            ax.set_title(title, fontsize=11)
        if zoom is not None:
            _inset(ax, picture, *zoom)
    for ax in axes:
        ax.set_axis_off()
    return fig


def curves(traces: Mapping[str, Trace], names: Sequence[str] = ("energy", "change"), item: int = 0) -> Figure:
    """One panel a quantity, one line a trace, over the iterations of batch item ``item``; log scale where all is positive.

    A quantity known at ``x0`` starts at iteration 0.  Steps whose proposal the control rejected carry a cross.  A trace that
    did not record a quantity has no line in its panel.  Raises ``ValueError`` when no trace recorded a name.
    """
    absent = [name for name in names if not any(name in trace for trace in traces.values())]
    if absent or not names:
        raise ValueError(f"names: expected quantities that were recorded, got {absent or 'none'}")
    fig, axes = _subplots(len(names), 1, (5, 2.6 * len(names)))
    for ax, name in zip(axes, names, strict=True):
        if ax is not axes[-1]:
            ax.sharex(axes[-1])
        shown: list[float] = []
        for i, (label, trace) in enumerate(traces.items()):  # a trace keeps its colour and style in all panels
            if name in trace:
                k, values, rejected = _line(trace, name, item)
                look = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "linewidth": 1.8}
                ax.plot(k, values, label=label, marker="x" if rejected else None, markevery=rejected, **look)
                shown += [v for v in values if math.isfinite(v)]
        ax.set_yscale("log" if shown and min(shown) >= 0 < max(shown) else "linear")
        ax.set_ylabel(LABELS.get(name, name))
        ax.grid(alpha=0.3)
    axes[-1].set_xlabel("iteration k")
    if any(traces):  # a trace without a name needs no legend
        axes[0].legend(frameon=False)
    return fig


def show_trace(trace: Trace, item: int = 0) -> Figure:
    """`curves` of one trace: energy, change and error, as far as they were recorded."""
    return curves({"": trace}, [name for name in ("energy", "change", "error") if name in trace], item)


def curve_data(traces: Mapping[str, Trace], names: Sequence[str] = ("energy", "change"), item: int = 0) -> dict[str, list]:
    """The numbers that `curves` draws from the same arguments, as columns for `save`: iterations, values, rejected steps."""
    columns: dict[str, list] = {}
    for name, (label, trace) in product(names, traces.items()):
        if name in trace:
            k, values, rejected = _line(trace, name, item)
            columns |= {f"{label} {name} k".strip(): k, f"{label} {name}".strip(): values}
            columns |= {f"{label} rejected k".strip(): [k[i] for i in rejected]} if rejected else {}
    return columns


def save(fig: Figure, path: str | os.PathLike, data: Mapping[str, Sequence], alt: str) -> list[Path]:
    """Write ``path`` (``.svg`` or ``.png``) and, beside it, a ``.csv`` with the columns of ``data``; returns both paths.

    ``alt`` says in words what the figure shows; it is stored in the file as its description.  Raises ``ValueError`` for
    an empty ``alt``, empty ``data`` or another ending.
    """
    path = Path(path)
    if not alt.strip():
        raise ValueError("alt: a figure is saved only with a text that says what it shows")
    if not data:
        raise ValueError("data: expected the columns behind the figure")
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"path: expected an ending .svg or .png, got {path.name!r}")
    import matplotlib

    with matplotlib.rc_context(LOOK):  # no date, fixed identifiers: the same figure gives the same file
        date = {"Date": None} if path.suffix == ".svg" else {}
        fig.savefig(path, dpi=160, metadata={"Description": alt, **date}, facecolor="white")
    table = path.with_suffix(".csv")
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(data), *zip_longest(*data.values(), fillvalue="")])
    return [path, table]


BUDGET = 400_000  # bytes of text that one widget may add to a page


def slider(
    frames: Sequence[Tensor] | None = None,
    labels: Sequence[Any] | None = None,
    alts: Sequence[str] | Callable[[Any], str] = (),
    name: str = "iteration",
    *,
    function: Callable[[Any], Tensor] | None = None,
    values: Sequence[Any] = (),
) -> Any:
    """Pictures under a slider that works on a page without a kernel, by mouse and by arrow keys; the first is shown first.

    ``frames`` are as for `show`, values in [0, 1]; ``labels`` (default 0, 1, ...) stand under them after ``name``.  ``alts``
    says in words what each frame shows, or is a function of the label.  Instead of frames, ``function`` makes one of each of
    the ``values``: all are computed at once and stored, and on a live kernel each is computed again when it is chosen, with
    what the function then finds in the notebook.
    Raises ``ValueError`` when a frame has no text of its own, numbers do not agree, or the widget is above `BUDGET`.
    """
    if function is not None:
        frames, labels = [function(value) for value in values], list(values) if labels is None else labels
    frames = list(frames or [])
    labels = list(range(len(frames))) if labels is None else list(labels)
    if not frames or len(frames) != len(labels):
        raise ValueError(f"frames: expected one for each label and one at least, got {len(frames)} for {len(labels)} labels")
    texts = [alts(label) for label in labels] if callable(alts) else list(alts)
    pages = _pages(frames, [f"{name} {label}" for label in labels], texts)
    import ipywidgets

    look = {"layout": ipywidgets.Layout(width="min(100%, 24rem)"), "style": {"description_width": "initial"}}
    options = [(str(label), i) for i, label in enumerate(labels)]
    control = ipywidgets.SelectionSlider(options=options, description=name, **look)
    widget = _stacked(control, pages)
    if function is not None:

        def again(change: Any) -> None:
            i = change["new"]
            widget.children[1].children[i].value = _pages([function(values[i])], [f"{name} {labels[i]}"], [texts[i]])[0]

        control.observe(again, "index")
    return widget


def trace_slider(states: Sequence[Any], alt: str, at: Sequence[int] | None = None, name: str = "iteration") -> Any:
    """`slider` over iterates: ``states`` holds one image an iteration from 0, or what `odlkit.propagate.iterate` yields.

    ``at`` chooses iterations (default: all).  ``alt`` says what is seen, with ``{k}`` where the iteration stands; without
    it, the iteration is put in front.
    """
    if not alt.strip():
        raise ValueError("alt: expected a text that says what the iterates show")
    images = [getattr(s[0] if isinstance(s, tuple) else s, "x", s) for s in states]
    chosen = list(range(len(images))) if at is None else list(at)
    outside = [k for k in chosen if not 0 <= k < len(images)]
    if outside:
        raise ValueError(f"at: expected iterations from 0 to {len(images) - 1}, got {outside}")
    words = alt if "{k}" in alt else f"{name} {{k}}: {alt}"
    return slider([images[k] for k in chosen], chosen, [words.replace("{k}", str(k)) for k in chosen], name)


def compare(before: Tensor, after: Tensor, alt: str, labels: tuple[str, str] = ("before", "after")) -> Any:
    """Two pictures of one size in one place, changed by two buttons, without a kernel; ``alt`` says what they show."""
    if not alt.strip():
        raise ValueError("alt: expected a text that says what the two pictures show")
    if before.shape[-2:] != after.shape[-2:]:
        raise ValueError(f"after: expected the size of before, {tuple(before.shape[-2:])}, got {tuple(after.shape[-2:])}")
    import ipywidgets

    pages = _pages([before, after], labels, [f"{label}: {alt}" for label in labels])
    return _stacked(ipywidgets.ToggleButtons(options=list(labels), style={"button_width": "auto"}), pages)


def _stacked(control: Any, pages: Sequence[str]) -> Any:
    """The pages on top of each other; the browser itself links the control's index to the one on top."""
    import ipywidgets

    stack = ipywidgets.Stack([ipywidgets.HTML(page) for page in pages], selected_index=0)
    ipywidgets.jslink((control, "index"), (stack, "selected_index"))
    return ipywidgets.VBox([control, stack])


def _pages(frames: Sequence[Tensor], captions: Sequence[str], alts: Sequence[str]) -> list[str]:
    """Each frame as HTML with its picture inside; a text under ten letters, or the same text twice, is an error."""
    for i in range(len(frames)):
        if i >= len(alts) or len(alts[i].strip()) < 10 or alts[i] in alts[:i]:
            raise ValueError(f"alts: frame {i} ({captions[i]}) needs a text of its own that says what it shows")
    pages = []
    for frame, caption, alt in zip(frames, captions, alts, strict=True):
        data = base64.b64encode(_png(caption, frame)).decode()
        style = f"width: {max(256, min(frame.shape[-1], 480))}px; max-width: 100%; image-rendering: pixelated"
        picture = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}" style="{style}">'
        pages.append(f'<figure style="margin: 0">{picture}<figcaption>{html.escape(caption)}</figcaption></figure>')
    size = sum(map(len, pages))
    if size > BUDGET:
        limit = f"{BUDGET // 1000} kB for one widget"
        raise ValueError(f"frames: {size // 1000} kB is above {limit}: show fewer, or a smaller part")
    return pages


def _png(title: str, x: Tensor) -> bytes:
    """The picture alone, 8 bits a pixel: gray as it is, colours from a palette of 256; the same bytes each time."""
    from PIL import Image

    pixels = (_picture(title, x) * 255).round().astype("uint8")
    image = Image.fromarray(pixels)
    image = image if pixels.ndim == 2 else image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(file := io.BytesIO(), "png", optimize=True)
    return file.getvalue()


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list]:
    """A figure that pyplot has forgotten, so that a notebook shows it once: where it is returned."""
    import matplotlib.pyplot as plt

    with plt.rc_context(LOOK):
        fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    plt.close(fig)
    return fig, list(axes.flat)


def _line(trace: Trace, name: str, item: int) -> tuple[list[int], list[float], list[int]]:
    """Iterations, values, and the positions in both at which a proposal was rejected."""
    first = 0 if name in trace.start else 1
    values = (trace[name] if first else trace.with_start(name))[:, item].tolist()
    kept = trace["accepted"][:, item].tolist() if "accepted" in trace else []
    return list(range(first, first + len(values))), values, [k + 1 - first for k, yes in enumerate(kept) if yes == 0]


def _picture(title: str, x: Tensor):
    x = x[None] if x.dim() == 2 else x[0] if x.dim() == 4 and len(x) == 1 else x
    if x.dim() != 3 or len(x) not in (1, 3):
        raise ValueError(f"images: {title!r}: expected shape (1, C, H, W) with C = 1 or 3, got {tuple(x.shape)}")
    picture = x.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    return picture[..., 0] if picture.shape[-1] == 1 else picture


def _inset(ax: Any, picture: Any, top: int, left: int, side: int) -> None:
    height, width = picture.shape[:2]
    if min(top, left) < 0 or side < 1 or top + side > height or left + side > width:
        raise ValueError(f"zoom: the square {(top, left, side)} is not inside a picture of {height}x{width}")
    shown = min(3 * side, 0.45 * min(height, width))
    inset = ax.inset_axes((1 - shown / width, 0, shown / width, shown / height))
    inset.imshow(picture[top : top + side, left : left + side], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    inset.set(xticks=[], yticks=[])
    for spine in inset.spines.values():
        spine.set(visible=True, color=COLOURS[1], linewidth=1.5)
    ax.indicate_inset((left - 0.5, top - 0.5, side, side), edgecolor=COLOURS[1], linewidth=1.2, alpha=1)
