"""A picture of what each attention head is worth: one cell for each, blocks by heads."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_vision.errors import BadSetting, MissingExtra
from peft_vision.files import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")

Map = Sequence[Sequence[float | None]]
"""Blocks x heads in [0, 1]; None where there is no head."""


def write_heads_map(path: Path | str, rank: Map, agreement: Mapping[str, float | None]) -> Path:
    """Draw ranks, and beside them how far each score agrees with leaving heads out.

    Args:
        path: a .png, .svg or .pdf file; one that is there is replaced.
        rank: dark cells are to be kept.
        agreement: score -> Kendall's tau; nothing is drawn of none.

    Raises:
        BadSetting: the file is of another kind. MissingExtra: matplotlib is not installed.
        CannotWrite: the disk is full or the place is not writable.
    """
    target = Path(path)
    require_format(target)
    from matplotlib.figure import Figure

    known = {name: tau for name, tau in agreement.items() if tau is not None}
    width = max(len(row) for row in rank)
    across = 1.6 + 0.42 * width
    size = (across + (4.2 if known else 0.0), 1.3 + 0.34 * len(rank))
    figure = Figure(figsize=size, layout="constrained")
    if known:
        left, right = figure.subplots(1, 2, width_ratios=[across, 4.2])
        _draw_agreement(right, known)
    else:
        left = figure.subplots()
    _draw_ranks(left, rank, width)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=150)
    return target


def require_format(target: Path) -> None:
    """Refuse a file that cannot be drawn.

    Raises:
        BadSetting: it is of another kind. MissingExtra: matplotlib is not installed.
    """
    if target.suffix.lower() not in FORMATS:
        raise BadSetting(f"{target.name} cannot be drawn; possible: *{', *'.join(FORMATS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra(
            "A figure needs matplotlib, which is not installed. "
            'Install it with: pip install "peft-vision[report]"'
        )


def _draw_ranks(axes: Axes, rank: Map, width: int) -> None:
    cells = [[float("nan") if v is None else v for v in _filled(row, width)] for row in rank]
    axes.imshow(cells, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for block, row in enumerate(cells):
        for head, value in enumerate(row):
            if not math.isnan(value):
                color = "white" if value > 0.6 else "black"
                text = f"{100 * value:.0f}"
                axes.text(head, block, text, color=color, ha="center", va="center", fontsize=7)
    axes.set_xticks(range(width))
    axes.set_yticks(range(len(rank)))
    axes.set_xlabel("head")
    axes.set_ylabel("block")
    axes.set_title("mean rank, % (dark: keep)", fontsize=9)


def _filled(row: Sequence[float | None], width: int) -> list[float | None]:
    return [*row, *[None] * (width - len(row))]


def _draw_agreement(axes: Axes, agreement: Mapping[str, float]) -> None:
    order = sorted(agreement, key=lambda name: agreement[name])
    axes.barh(order, [agreement[name] for name in order], color="#3b6ea5")
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlim(-1.0, 1.0)
    axes.set_xticks([-1.0, -0.5, 0.0, 0.5, 1.0])
    axes.tick_params(labelsize=8)
    axes.set_title("Kendall's tau with leaving one out", fontsize=9)
