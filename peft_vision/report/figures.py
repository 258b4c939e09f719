"""The report's charts, as SVG that takes its colors from the page: light and dark both work."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from peft_vision.errors import MissingExtra
from peft_vision.report.content import Block, Kept, ReportContent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib writes literal colors; these stand for the page's variables and are replaced by them.
_INK, _MUTED, _LINE, _ACCENT, _SECOND, _FAINT, _CARD = (f"#00000{digit}" for digit in range(1, 8))
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _LINE: "--line",
    _ACCENT: "--accent",
    _SECOND: "--second",
    _FAINT: "--faint",
    _CARD: "--card",
}
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
_WIDTH = 8.6  # inches, 72 points each


def accuracy_against_cost(content: ReportContent) -> str:
    """Draw top-1 accuracy over GMACs, with standard errors, the baselines and the budget."""

    def draw(axes: Axes) -> None:
        readings = content.readings
        across = [reading.gmacs for reading in readings]
        up = [100 * reading.accuracy for reading in readings]
        axes.plot(across, up, color=_MUTED, linewidth=1.2, linestyle=(0, (2, 2)), zorder=2)
        for position, reading in enumerate(readings):
            color = _SECOND if position == 0 else _ACCENT
            axes.errorbar(
                reading.gmacs,
                100 * reading.accuracy,
                yerr=100 * reading.standard_error,
                fmt="o",
                markersize=9,
                color=color,
                elinewidth=1.6,
                capsize=4,
                zorder=3,
            )
        right = max(across) * 1.3
        axes.set_xlim(0, right)
        _limit_accuracies(axes, content)
        _label_points(axes, content)
        _draw_references(axes, content, right)
        axes.set_xlabel("GMACs for one image")
        axes.set_ylabel("top-1 accuracy, %")

    return _svg("cost", (_WIDTH, 4.1), draw)


def heads_per_block(blocks: Sequence[Block]) -> str:
    """Draw one cell for each attention head: filled if it is left, an outline if it went."""
    most = max((block.heads.of for block in blocks if block.heads), default=1)

    def draw(axes: Axes) -> None:
        for number, block in enumerate(blocks, start=1):
            kept = block.heads or Kept(0, ())
            for head in range(kept.of):
                _draw_head(axes, number, head, 1.0 if head in kept.indices else None)
        _label_heads(axes, len(blocks), most)

    return _svg("heads", _size_of(most), draw)


def rank_of_heads(rank: Sequence[Sequence[float | None]]) -> str:
    """Draw one cell for each attention head: the fuller, the sooner it is to be kept."""
    most = max(len(row) for row in rank)

    def draw(axes: Axes) -> None:
        for number, row in enumerate(rank, start=1):
            for head, value in enumerate(row):
                if value is not None:
                    _draw_head(axes, number, head, value)
        _label_heads(axes, len(rank), most)

    return _svg("rank", _size_of(most), draw)


def hidden_per_block(blocks: Sequence[Block]) -> str:
    """Draw the hidden units that are left in each block's MLP, over the number there were."""

    def draw(axes: Axes) -> None:
        numbers = range(1, len(blocks) + 1)
        of = [block.hidden.of if block.hidden else 0 for block in blocks]
        left = [len(block.hidden.indices) if block.hidden else 0 for block in blocks]
        axes.bar(numbers, of, width=0.76, color=_FAINT)
        bars = axes.bar(numbers, left, width=0.76, color=_ACCENT)
        axes.bar_label(bars, [f"{count:,}" for count in left], padding=2, fontsize=9, color=_INK)
        axes.set_ylim(0, max(1, *of) * 1.1)
        axes.set_ylabel("hidden units")
        _label_blocks(axes, len(blocks))

    return _svg("hidden", (_WIDTH, 2.5), draw)


def tokens_per_block(blocks: Sequence[Block], patches: int) -> str:
    """Draw the number of patch tokens that leave each block."""

    def draw(axes: Axes) -> None:
        left: list[int] = []
        for block in blocks:
            before = left[-1] if left else patches
            left.append(before if block.tokens is None else block.tokens)
        numbers = range(1, len(blocks) + 1)
        axes.bar(numbers, [patches] * len(blocks), width=0.76, color=_FAINT)
        bars = axes.bar(numbers, left, width=0.76, color=_SECOND)
        axes.bar_label(bars, [f"{count:,}" for count in left], padding=2, fontsize=9, color=_INK)
        axes.set_ylim(0, patches * 1.14)
        axes.set_ylabel("patch tokens")
        _label_blocks(axes, len(blocks))

    return _svg("tokens", (_WIDTH, 2.5), draw)


def _draw_head(axes: Axes, block: int, head: int, filled: float | None) -> None:
    """Fill one cell by a share in [0, 1]; None: a dashed outline."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import FancyBboxPatch

    cell = FancyBboxPatch(
        (block - 0.38, head + 0.64),
        0.76,
        0.72,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor="none" if filled is None else to_rgba(_ACCENT, filled),
        edgecolor=_MUTED if filled is None else _ACCENT,
        linewidth=0.8,
        linestyle=(0, (2, 2)) if filled is None else "-",
    )
    axes.add_patch(cell)


def _label_heads(axes: Axes, blocks: int, heads: int) -> None:
    axes.grid(visible=False)
    axes.set_ylim(heads + 0.6, 0.4)
    axes.set_yticks(_few(heads))
    axes.set_ylabel("head")
    _label_blocks(axes, blocks)


def _size_of(heads: int) -> tuple[float, float]:
    return _WIDTH, min(0.9 + 0.24 * heads, 5.5)


def _limit_accuracies(axes: Axes, content: ReportContent) -> None:
    tops = [reading.accuracy + reading.standard_error for reading in content.readings]
    bottoms = [reading.accuracy - reading.standard_error for reading in content.readings]
    low = 100 * min([*bottoms, *content.baselines.values()])
    high = 100 * max([*tops, *content.baselines.values()])
    room = max(high - low, 2.0)
    axes.set_ylim(max(low - 0.12 * room, -2), high + 0.14 * room)


def _label_points(axes: Axes, content: ReportContent) -> None:
    """Write each model's name beside its point, moved apart where two would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.085
    widest = max(reading.gmacs for reading in content.readings)
    placed: list[tuple[float, float]] = []
    for reading in sorted(content.readings, key=lambda reading: reading.accuracy):
        height = 100 * reading.accuracy
        for across, below in placed:
            if abs(across - reading.gmacs) < widest / 2:
                height = max(height, below + gap)
        placed.append((reading.gmacs, height))
        axes.annotate(
            f"{reading.label}: {100 * reading.accuracy:.1f} ± {100 * reading.standard_error:.1f}",
            (reading.gmacs, height),
            xytext=(11, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=_INK,
            bbox={"facecolor": _CARD, "edgecolor": "none", "pad": 1.5},
            zorder=4,
        )


def _draw_references(axes: Axes, content: ReportContent, right: float) -> None:
    for name, accuracy in content.baselines.items():
        axes.axhline(100 * accuracy, color=_MUTED, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        axes.annotate(
            f"{name}: {100 * accuracy:.1f}",
            (right, 100 * accuracy),
            xytext=(0, 4),
            textcoords="offset points",
            horizontalalignment="right",
            color=_MUTED,
        )
    if content.budget is not None:
        asked = content.budget * content.readings[0].gmacs
        axes.axvline(asked, color=_LINE, linewidth=1.2, zorder=1)
        axes.annotate(
            f"asked: {content.budget:g} of the FLOPs",
            (asked, 1),
            xycoords=("data", "axes fraction"),
            xytext=(5, -2),
            textcoords="offset points",
            verticalalignment="top",
            color=_MUTED,
            fontsize=9.5,
        )


def _label_blocks(axes: Axes, count: int) -> None:
    axes.set_xlim(0.4, count + 0.6)
    axes.set_xticks(_few(count))
    axes.set_xlabel("block")


def _few(count: int) -> list[int]:
    """Return at most some sixteen of the numbers 1 to `count`, evenly spaced."""
    return list(range(1, count + 1, 1 + (count - 1) // 16))


def _svg(name: str, inches: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    """Draw into a figure of its own (no global state) and return SVG for a page."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra(
            "A report needs matplotlib, which is not installed. "
            'Install it with: pip install "peft-vision[report]"'
        )
    import matplotlib as mpl
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with mpl.rc_context({**_RC, "svg.hashsalt": name}):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(stream.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    """Strip the XML head, make ids unique on the page, and take fonts and colors from the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
