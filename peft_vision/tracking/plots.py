"""Curves of success and precision of one tracker or several, with their figures in the legend."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vision.errors import BadSetting, MissingExtra
from peft_vision.files import writing
from peft_vision.tracking.scoring import TrackingEvaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMS = ("png", "svg")

# Okabe and Ito's colors, told apart with any color vision; dashes tell them apart in gray.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
_MUTED = "#5f6368"
_RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": "#202124",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e0e0e0",
    "grid.linewidth": 0.7,
    "svg.hashsalt": "tracking",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}


@dataclass(frozen=True)
class _Kind:
    """One sort of curve: its figure by dialect, and the words on the axes."""

    figure: str
    title: str
    across: str
    up: str


_KINDS = {
    "success": _Kind("SUC", "Success", "overlap threshold", "share of frames above it"),
    "precision": _Kind("P", "Precision", "distance of centers, pixels", "share of frames within"),
    "normalized_precision": _Kind(
        "P_norm",
        "Normalized precision",
        "distance of centers / target size",
        "share of frames within",
    ),
}

_READ_AT = {
    ("otb", "precision"): 20.0,
    ("toolkit", "precision"): 20.0,
    ("otb", "normalized_precision"): 0.2,
}
"""Where the figure is the curve's value at a place; elsewhere it is a mean or an area."""


def draw(
    found: Mapping[str, TrackingEvaluation], folder: str | Path, form: str = "png"
) -> list[Path]:
    """Draw each sort of curve that all trackers have, the best tracker first in the legend.

    Args:
        found: what to call a tracker in the legend -> its evaluation.
        folder: where ``success.png`` and the others go.
        form: "png" or "svg".

    Returns:
        The files written: success, precision and normalized precision; for GOT-10k success alone.

    Raises:
        BadSetting: there is nothing to draw, the evaluations are in different dialects, or there is
            no such form.
        MissingExtra: matplotlib is not installed. CannotWrite: the disk is full or closed.
    """
    if form not in FORMS:
        raise BadSetting(f"form is {form!r}; possible: {', '.join(FORMS)}.")
    dialects = sorted({one.dialect for one in found.values()})
    if len(dialects) > 1:
        raise BadSetting(
            f"The evaluations are in the dialects {', '.join(dialects)}, whose curves do not "
            "compare. Evaluate all of them in one."
        )
    names = [name for name in _KINDS if found and all(name in one.curves for one in found.values())]
    if not names:
        raise BadSetting("There is no curve to draw: no evaluation, or one without labels.")
    _require_matplotlib()
    return [_drawn(name, found, Path(folder) / f"{name}.{form}") for name in names]


def _drawn(name: str, found: Mapping[str, TrackingEvaluation], path: Path) -> Path:
    """One figure of its own, without matplotlib's global state."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_RC), writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(8.0, 4.4), layout="constrained")
        _plot(figure.add_subplot(), name, found)
        beside = path.with_name(f".{path.name}")
        try:
            metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            figure.savefig(beside, format=path.suffix[1:], dpi=160, metadata=metadata)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    return path


def _plot(axes: Axes, name: str, found: Mapping[str, TrackingEvaluation]) -> None:
    kind, dialect = _KINDS[name], next(iter(found.values())).dialect
    figure = "AO" if dialect == "got10k" else kind.figure
    ranked = sorted(found.items(), key=lambda item: -item[1].figures[figure])
    place = {label: number for number, label in enumerate(found)}
    for label, one in ranked:
        curve, number = one.curves[name], place[label]
        value = one.figures[figure]
        axes.plot(
            curve.thresholds,
            curve.values,
            color=_COLORS[number % len(_COLORS)],
            linestyle=_DASHES[number % len(_DASHES)],
            linewidth=2,
            label=f"{label} [{value:.1f}]"
            if dialect == "trackingnet"
            else f"{label} [{value:.3f}]",
        )
    at = _READ_AT.get((dialect, name))
    if at is not None:
        axes.axvline(at, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    axes.set_xlim(0, float(curve.thresholds[-1]))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(kind.across)
    axes.set_ylabel(kind.up)
    data = ", ".join(dict.fromkeys(f"{one.kind} {one.split}" for one in found.values()))
    axes.set_title(f"{kind.title} on {data}", loc="left", fontsize=11.5)
    # Beside the axes: inside, it would lie over the curve of a weak tracker.
    axes.legend(
        title=_said(figure, at),
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        alignment="left",
        frameon=False,
    )


def _said(figure: str, at: float | None) -> str:
    """The legend's title: which figure stands behind each name."""
    if at is None:
        return figure
    return f"{figure} (at {at:g} px)" if at > 1 else f"{figure} (at {at:.2f})"


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra(
            "Plots need matplotlib, which is not installed. "
            'Install it with: pip install "peft-vision[report]"'
        )
