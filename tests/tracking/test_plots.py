"""Curves as pictures: all that a dialect has, figures in the legend, one tracker or many."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from peft_vision.errors import BadSetting, CannotWrite, MissingExtra
from peft_vision.tracking import plots
from peft_vision.tracking.scoring import Scoring, TrackingEvaluation
from tests.tracking.moving_square import path, sequence

pytest.importorskip("matplotlib")


def evaluated(by: float, dialect: str = "otb", names: str = "ab") -> TrackingEvaluation:
    scoring = Scoring("demo", dialect)
    for number, name in enumerate(names):
        boxes = path(20) + np.random.default_rng(number).normal(0, by, (20, 4)).clip(-12, 12)
        scoring.add(sequence(name, path(20)), boxes, None)
    return scoring.result("demo/tracking", "test")


def test_each_curve_is_a_file_with_the_figures_in_its_legend(tmp_path):
    found = {"worse": evaluated(5), "better <&>": evaluated(1)}
    files = plots.draw(found, tmp_path, "svg")
    assert [file.name for file in files] == [
        "success.svg",
        "precision.svg",
        "normalized_precision.svg",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    again = plots.draw(found, tmp_path / "again", "svg")
    assert [a.read_bytes() for a in again] == [file.read_bytes() for file in files]
    for file in plots.draw(found, tmp_path):
        assert file.read_bytes().startswith(b"\x89PNG")


def legend_of(name: str, found: dict[str, TrackingEvaluation]) -> tuple[str, list[str]]:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    plots._plot(axes, name, found)
    legend = axes.get_legend()
    return legend.get_title().get_text(), [text.get_text() for text in legend.get_texts()]


def test_the_legend_says_which_figure_and_has_the_best_first():
    found = {"worse": evaluated(5), "better": evaluated(1)}
    for name, figure, title in (
        ("success", "SUC", "SUC"),
        ("precision", "P", "P (at 20 px)"),
        ("normalized_precision", "P_norm", "P_norm (at 0.20)"),
    ):
        values = {label: one.figures[figure] for label, one in found.items()}
        ranked = sorted(values, key=lambda label: -values[label])
        assert legend_of(name, found) == (title, [f"{n} [{values[n]:.3f}]" for n in ranked])
    got10k = evaluated(1, "got10k")
    assert legend_of("success", {"one": got10k}) == ("AO", [f"one [{got10k.figures['AO']:.3f}]"])
    area = evaluated(1, "trackingnet")
    assert legend_of("precision", {"one": area}) == ("P", [f"one [{area.figures['P']:.1f}]"])


def test_got10k_has_success_alone(tmp_path):
    assert [f.name for f in plots.draw({"a": evaluated(1, "got10k")}, tmp_path)] == ["success.png"]


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    one = evaluated(1)
    with pytest.raises(BadSetting, match="png, svg"):
        plots.draw({"a": one}, tmp_path, "pdf")
    with pytest.raises(BadSetting, match="otb, trackingnet"):
        plots.draw({"a": one, "b": evaluated(1, "trackingnet")}, tmp_path)
    with pytest.raises(BadSetting, match="no curve"):
        plots.draw({}, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite):
        plots.draw({"a": one}, tmp_path / "file")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"peft-vision\[report\]"):
        plots.draw({"a": one}, tmp_path)
