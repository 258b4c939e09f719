"""`peft-vision quickstart`: everything once, on a model and images that ship in packages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from peft_vision.quickstart import Outcome


def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for models and report.")
    ] = Path("runs/quickstart"),
    fast: Annotated[
        bool, typer.Option("--fast", help="A trial of seconds: the accuracies mean nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in the output folder.")
    ] = False,
) -> None:
    """Fine-tune, compress, recover, save, reload, export and report: minutes on two CPU cores."""
    from peft_vision.quickstart import quickstart as run

    _print(run(output, fast=fast, overwrite=overwrite, say=_say))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(outcome: Outcome) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{outcome.images} validation images", box=box.SIMPLE_HEAD)
    for position, name in enumerate(("model", "top-1, %", "GMACs", "M params", "images/s", "MB")):
        table.add_column(name, justify="right" if position else "left", no_wrap=True)
    for reading in outcome.readings:
        speed, size = reading.speed, reading.file_bytes
        table.add_row(
            reading.label,
            f"{100 * reading.accuracy:.1f} ± {100 * reading.standard_error:.1f}",
            f"{reading.gmacs:.3f}",
            f"{reading.params / 1e6:.2f}",
            f"{speed.median:.1f} ({speed.low:.1f}-{speed.high:.1f})" if speed else "",
            f"{size / 1e6:.1f}" if size else "",
        )
    for name, accuracy in outcome.measured.baselines.items():
        table.add_row(name, f"{100 * accuracy:.1f}", "", "", "", "")
    console = Console(soft_wrap=True)
    console.print(table)
    if outcome.measured.fast:
        console.print("This was a trial of a few steps: the accuracies mean nothing.")
    console.print(f"Report: {outcome.report}", highlight=False)
    console.print("Next, on your own images:", highlight=False)
    for command in outcome.commands:
        console.print(f"  {command.line}", highlight=False, markup=False)
