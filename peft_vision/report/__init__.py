"""One HTML file that says what a run did: it needs no network, no scripts and no other file."""

from __future__ import annotations

import importlib.util
from importlib import resources
from pathlib import Path
from typing import Any

from peft_vision.errors import MissingExtra
from peft_vision.files import writing
from peft_vision.report import figures, overlays
from peft_vision.report.content import (
    Block,
    Command,
    Kept,
    Overlay,
    Ranking,
    Reading,
    ReportContent,
    Speed,
    Stage,
)

__all__ = [
    "Block",
    "Command",
    "Kept",
    "Overlay",
    "Ranking",
    "Reading",
    "ReportContent",
    "Speed",
    "Stage",
    "write_report",
]


def write_report(path: Path | str, content: ReportContent) -> Path:
    """Write the report and return its path; a report that is there already is replaced.

    Raises:
        MissingExtra: jinja2 or matplotlib is not installed.
        CannotWrite: the disk is full or the place is not writable.
    """
    target = Path(path)
    page = render(content)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.new")
        try:
            beside.write_text(page, encoding="utf-8")
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    return target


def render(content: ReportContent) -> str:
    """Return the report as HTML.

    Raises:
        MissingExtra: jinja2 or matplotlib is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(
                f"A report needs {package}, which is not installed. "
                'Install it with: pip install "peft-vision[report]"'
            )
    import jinja2
    from markupsafe import Markup

    folder = resources.files("peft_vision.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=_percent, millions=_millions, size=_size)
    template = environment.from_string(folder.joinpath("page.html.j2").read_text("utf-8"))
    # Charts are SVG of our own making; every other text of the content is escaped.
    charts = {name: Markup(svg) for name, svg in _charts(content).items()}
    style = Markup(folder.joinpath("style.css").read_text("utf-8"))
    page: str = template.render(
        content=content,
        charts=charts,
        style=style,
        pictures=_pictures(content),
        first=content.readings[0],
        last=content.readings[-1],
    )
    return page


def _charts(content: ReportContent) -> dict[str, str]:
    blocks = content.blocks
    charts = {"cost": figures.accuracy_against_cost(content)}
    if any(block.heads for block in blocks):
        charts["heads"] = figures.heads_per_block(blocks)
    if any(block.hidden for block in blocks):
        charts["hidden"] = figures.hidden_per_block(blocks)
    if content.patches and any(block.tokens is not None for block in blocks):
        charts["tokens"] = figures.tokens_per_block(blocks, content.patches)
    if content.ranking:
        charts["rank"] = figures.rank_of_heads(content.ranking.rank)
    return charts


def _pictures(content: ReportContent) -> list[dict[str, Any]]:
    return [
        {"title": overlay.title, "pictures": overlays.pictures(overlay)}
        for overlay in content.overlays
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
