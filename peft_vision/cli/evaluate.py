"""`peft-vision evaluate`: the accuracy of a saved model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from peft_vision.evaluation import Evaluation


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that peft-vision saved.")],
    *,
    data: Annotated[str, typer.Option("--data", help="Image folder, data set or demo/<name>.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    split: Annotated[
        str | None, typer.Option(help="Another split than the validation split.")
    ] = None,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be read.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:1.")] = None,
) -> None:
    """Evaluate a saved model with the preprocessing and labels that are stored in it."""
    from peft_vision.evaluation import evaluate as run

    found = run(
        model,
        data,
        batch_size=batch_size,
        split=split,
        on_bad_image="skip" if skip_bad_images else "refuse",
        device=device,
        progress=sys.stderr.isatty(),
    )
    if as_json:
        import dataclasses
        import json

        print(json.dumps(dataclasses.asdict(found), indent=1))
        return
    _print_table(found)


def _print_table(found: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", title=found.data)
    table.add_row("top-1", f"{found.top1:.2%} ± {found.standard_error:.2%} (standard error)")
    if found.top5 is not None:
        table.add_row("top-5", f"{found.top5:.2%}")
    table.add_row("most frequent class alone", f"{found.majority:.2%}")
    table.add_row("cross entropy", f"{found.loss:.4f}")
    table.add_row("images", f"{found.n}")
    table.add_row("classes", f"{found.classes}")
    if found.skipped:
        shown = ", ".join(found.skipped[:5]) + (", ..." if len(found.skipped) > 5 else "")
        table.add_row("unreadable, left out", f"{len(found.skipped)}: {shown}")
    Console().print(table)
