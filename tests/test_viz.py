"""Figures have the axes, lines, marks and files they promise."""

import csv

import pytest
import torch

from odlkit import viz
from odlkit.propagate import Trace


def trace(energies, accepted=None, start=None):
    made = Trace()
    for k, value in enumerate(energies):
        row = {"change": torch.tensor([0.5**k, 1.0]), "energy": torch.tensor([value, 1.0])}
        if accepted is not None:
            row["accepted"] = torch.tensor([accepted[k], True])
        made.rows.append(row)
    if start is not None:
        made.start["energy"] = torch.tensor([start, 1.0])
    return made


def test_show_titles_and_pixels():
    gray, colour = torch.rand(1, 1, 20, 30), torch.rand(3, 20, 30) * 2
    fig = viz.show({"blurred": gray, "restored": colour})
    assert [ax.get_title() for ax in fig.axes] == ["blurred", "restored"]
    shown = [ax.images[0] for ax in fig.axes]
    assert torch.equal(torch.from_numpy(shown[0].get_array().data), gray[0, 0]) and shown[0].get_clim() == (0, 1)
    assert torch.equal(torch.from_numpy(shown[1].get_array().data), colour.permute(1, 2, 0).clamp(0, 1))


def test_show_wraps_and_zooms():
    pictures = [torch.rand(20, 30) for _ in range(4)]
    fig = viz.show(pictures, zoom=(2, 3, 4))
    assert len(fig.axes) == 6 and sum(bool(ax.images) for ax in fig.axes) == 4  # two rows of three
    inset = fig.axes[0].child_axes[0]
    assert torch.equal(torch.from_numpy(inset.images[0].get_array().data), pictures[0][2:6, 3:7])


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda: viz.show([]), "images"),
        (lambda: viz.show({"two channels": torch.rand(1, 2, 8, 8)}), "two channels"),
        (lambda: viz.show([torch.rand(2, 1, 8, 8)]), "images"),
        (lambda: viz.show([torch.rand(8, 8)], zoom=(5, 0, 4)), "zoom"),
        (lambda: viz.curves({"a": trace([1.0])}, ["error"]), "error"),
        (lambda: viz.curves({}, []), "names"),
    ],
)
def test_bad_input_names_the_argument(call, argument):
    with pytest.raises(ValueError, match=argument):
        call()


def test_curves_lines_labels_and_scale():
    one, two = trace([4.0, 2.0, 1.0], start=8.0), trace([3.0, 3.0], accepted=[True, False])
    fig = viz.curves({"ADMM": one, "PADNet": two})
    energy, change = fig.axes
    assert [energy.get_ylabel(), change.get_ylabel(), change.get_xlabel()] == ["energy F", "change of x", "iteration k"]
    for ax in fig.axes:
        assert [line.get_label() for line in ax.get_lines()] == ["ADMM", "PADNet"] and ax.get_yscale() == "log"
    assert [text.get_text() for text in energy.get_legend().get_texts()] == ["ADMM", "PADNet"]
    admm, padnet = energy.get_lines()
    assert admm.get_xdata().tolist() == [0, 1, 2, 3] and admm.get_ydata().tolist() == [8, 4, 2, 1]
    assert padnet.get_xdata().tolist() == [1, 2]
    assert admm.get_linestyle() != padnet.get_linestyle() and admm.get_color() != padnet.get_color()
    assert energy.get_xlim() == change.get_xlim()
    assert fig.get_facecolor() == (1, 1, 1, 1)


def test_rejected_steps_are_marked_at_their_iteration():
    marked = trace([4.0, 3.0, 2.0, 1.0], accepted=[True, False, True, False], start=5.0)
    fig = viz.curves({"PADNet": marked, "ADMM": trace([1.0])})
    for ax in fig.axes:  # the energy has a value at iteration 0, the change has not
        line = ax.get_lines()[0]
        assert line.get_marker() == "x" and [int(line.get_xdata()[i]) for i in line.get_markevery()] == [2, 4]
        assert ax.get_lines()[1].get_marker() == "None"
    columns = viz.curve_data({"PADNet": marked})
    assert columns["PADNet rejected k"] == [2, 4] and columns["PADNet energy"] == [5, 4, 3, 2, 1]
    other = viz.curves({"PADNet": marked}, item=1)
    assert other.axes[0].get_lines()[0].get_marker() == "None"


def test_negative_values_take_a_linear_scale():
    energy, change = viz.curves({"a": trace([1.0, -1.0])}).axes
    assert energy.get_yscale() == "linear" and change.get_yscale() == "log"


def test_show_trace_has_what_was_recorded():
    fig = viz.show_trace(trace([2.0, 1.0]))
    assert [ax.get_ylabel() for ax in fig.axes] == ["energy F", "change of x"] and fig.axes[0].get_legend() is None


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_save_writes_the_figure_and_its_numbers(tmp_path, ending):
    traces = {"a": trace([4.0, 2.0], start=8.0)}
    fig = viz.curves(traces, ["energy"])
    alt = "Energy falls from 8 to 2 in two steps."
    paths = viz.save(fig, tmp_path / f"energy{ending}", viz.curve_data(traces, ["energy"]), alt=alt)
    assert paths == [tmp_path / f"energy{ending}", tmp_path / "energy.csv"]
    assert alt.encode() in paths[0].read_bytes()
    with paths[1].open() as file:
        rows = list(csv.reader(file))
    assert rows == [["a energy k", "a energy"], ["0", "8.0"], ["1", "4.0"], ["2", "2.0"]]
    before = paths[0].read_bytes()
    viz.save(fig, paths[0], {"x": [1], "y": [1, 2]}, alt=alt)
    assert paths[0].read_bytes() == before  # the same figure, the same file
    assert paths[1].read_text().split() == ["x,y", "1,1", ",2"]


@pytest.mark.parametrize(
    "path, data, alt, argument",
    [
        ("f.svg", {"x": [1]}, "", "alt"),
        ("f.svg", {"x": [1]}, "  ", "alt"),
        ("f.svg", {}, "A curve.", "data"),
        ("f.jpg", {"x": [1]}, "A curve.", "path"),
    ],
)
def test_save_refuses_and_leaves_nothing(tmp_path, path, data, alt, argument):
    with pytest.raises(ValueError, match=argument):
        viz.save(viz.show([torch.rand(8, 8)]), tmp_path / path, data, alt)
    assert list(tmp_path.iterdir()) == []


def test_save_needs_an_alt(tmp_path):
    with pytest.raises(TypeError, match="alt"):
        viz.save(viz.show([torch.rand(8, 8)]), tmp_path / "f.svg", {"x": [1]})
    assert list(tmp_path.iterdir()) == []
