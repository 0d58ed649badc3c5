"""Sliders and before/after pictures: every frame is there, described, small, and the same bytes each time."""

import base64
import io
import re
from itertools import islice

import numpy as np
import pytest
import torch
from guards import undescribed
from PIL import Image

from odlkit import viz
from odlkit.operators import Identity
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import iterate
from odlkit.solvers import GradientDescent

GRAY = torch.rand(1, 1, 24, 32, generator=torch.Generator().manual_seed(0))


def texts(count):
    return [f"Noise brightened {i} times" for i in range(count)]


def frames(widget):
    """(alt, caption, pixels) of every frame on the stack."""
    found = []
    for page in widget.children[1].children:
        parts = re.search(r'alt="(.*?)" src="data:image/png;base64,(.*?)".*<figcaption>(.*?)<', page.value)
        alt, data, caption = parts.groups()
        found.append((alt, caption, Image.open(io.BytesIO(base64.b64decode(data)))))
    return found


def links(widget) -> list:
    """The links that a static page stores and the browser follows: (attribute of the control, attribute of the stack)."""
    from ipywidgets.embed import embed_data

    state = embed_data(views=[widget])["manager_state"]["state"]
    ends = [(m["state"]["source"], m["state"]["target"]) for m in state.values() if m["model_name"] == "LinkModel"]
    control, stack = (f"IPY_MODEL_{child.model_id}" for child in widget.children)
    return [(source[1], target[1]) for source, target in ends if source[0] == control and target[0] == stack]


def test_slider_holds_every_frame_and_is_linked_in_the_browser():
    widget = viz.slider([GRAY * k / 3 for k in range(4)], ["none", "a", "b", "full"], texts(4), name="light")
    shown = frames(widget)
    assert [caption for _, caption, _ in shown] == ["light none", "light a", "light b", "light full"]
    assert [alt for alt, _, _ in shown] == texts(4)
    for k, (_, _, image) in enumerate(shown):
        assert image.mode == "L" and image.size == (32, 24)
        assert np.array_equal(np.asarray(image), np.rint((GRAY * k / 3 * 255)[0, 0].numpy()))
    control, stack = widget.children
    assert control.options == (("none", 0), ("a", 1), ("b", 2), ("full", 3)) and control.description == "light"
    assert stack.selected_index == control.index == 0
    assert links(widget) == [("index", "selected_index")]


def test_colour_comes_from_a_palette_and_is_near():
    ramp = torch.linspace(0, 1, 32).expand(32, 32)
    smooth = torch.stack([ramp, ramp.T, 0.5 + 0 * ramp])
    (_, _, image), _ = frames(viz.slider([smooth, smooth.flip(1)], alts=texts(2)))
    assert image.mode == "P"
    assert np.abs(np.asarray(image.convert("RGB")) / 255 - smooth.permute(1, 2, 0).numpy()).mean() < 0.03


def test_same_frames_same_bytes():
    colour = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    widgets = [viz.slider([GRAY, colour], alts=texts(2)) for _ in range(2)]
    first, second = ([page.value for page in widget.children[1].children] for widget in widgets)
    assert first == second


def test_function_fills_the_stack_and_answers_on_a_kernel():
    light = [1.0]
    widget = viz.slider(function=lambda s: GRAY * s * light[0], values=[0.5, 1.0], alts=lambda s: f"Noise times {s}")
    before = [page.value for page in widget.children[1].children]
    light[0] = 0.1  # the reader changed something in the notebook
    assert [page.value for page in widget.children[1].children] == before
    widget.children[0].index = 1
    after = [page.value for page in widget.children[1].children]
    assert after[0] == before[0] and after[1] != before[1] and [alt for alt, _, _ in frames(widget)] == [
        "Noise times 0.5", "Noise times 1.0"]  # fmt: skip


def test_trace_slider_takes_what_iterate_yields_and_plain_images():
    problem = Problem(LeastSquares(Identity(), GRAY))
    states = list(islice(iterate(GradientDescent(0.5), problem, 0 * GRAY), 6))
    shown = frames(viz.trace_slider(states, "noise that appears", at=[0, 2, 5]))
    assert [(alt, caption) for alt, caption, _ in shown] == [
        (f"iteration {k}: noise that appears", f"iteration {k}") for k in (0, 2, 5)]  # fmt: skip
    assert [np.asarray(i).mean() for _, _, i in shown] == sorted(np.asarray(i).mean() for _, _, i in shown)
    (alt, caption, _), *_ = frames(viz.trace_slider([GRAY, 0.5 * GRAY], "After {k} sweeps it is darker", name="sweep"))
    assert (alt, caption) == ("After 0 sweeps it is darker", "sweep 0")


def test_compare_has_two_frames_and_buttons():
    widget = viz.compare(GRAY, 1 - GRAY, "noise and its negative", labels=("blurred", "restored"))
    assert [(alt, caption) for alt, caption, _ in frames(widget)] == [
        ("blurred: noise and its negative", "blurred"), ("restored: noise and its negative", "restored")]  # fmt: skip
    assert widget.children[0].options == ("blurred", "restored") and links(widget) == [("index", "selected_index")]


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda: viz.slider([GRAY, GRAY]), "alts: frame 0"),
        (lambda: viz.slider([GRAY, GRAY], alts=["A picture of noise"]), "alts: frame 1"),
        (lambda: viz.slider([GRAY, GRAY], alts=["A picture of noise"] * 2), "alts: frame 1"),
        (lambda: viz.slider([GRAY, GRAY], alts=["A picture of noise", "  "]), "alts: frame 1"),
        (lambda: viz.slider([]), "frames"),
        (lambda: viz.slider([GRAY, GRAY], ["one"], texts(2)), "frames"),
        (lambda: viz.slider([GRAY.repeat(1, 2, 1, 1)], alts=texts(1)), "expected shape"),
        (lambda: viz.slider([torch.rand(512, 512)] * 3, alts=texts(3)), r"\d{4} kB is above 400 kB"),
        (lambda: viz.trace_slider([GRAY], " "), "alt"),
        (lambda: viz.trace_slider([GRAY], "a picture of noise", at=[1]), r"at: .* 0 to 0, got \[1\]"),
        (lambda: viz.compare(GRAY, GRAY, ""), "alt"),
        (lambda: viz.compare(GRAY, GRAY[..., 1:], "two sizes of noise"), "after"),
    ],
)
def test_bad_input_names_the_argument(call, argument):
    with pytest.raises(ValueError, match=argument):
        call()


def test_text_is_escaped_and_passes_the_guard_on_stored_widgets():
    import nbformat
    from ipywidgets.embed import embed_data

    widget = viz.slider([GRAY], ["<1>"], ['Noise of "size" < 1 & more'])
    assert frames(widget)[0][:2] == ("Noise of &quot;size&quot; &lt; 1 &amp; more", "iteration &lt;1&gt;")
    notebook = nbformat.v4.new_notebook()
    state = embed_data(views=[widget])["manager_state"]
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": state}
    assert undescribed(notebook) == []
    bare = str(notebook.metadata["widgets"]).count("alt=")
    assert bare >= 1  # the guard had something to look at


def test_import_stays_light():
    """ipywidgets and PIL come with the first widget, not with `import odlkit.viz`."""
    import subprocess
    import sys

    code = "import sys, odlkit.viz; print([m for m in ('ipywidgets', 'PIL', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
