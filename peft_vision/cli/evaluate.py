"""`peft-vision evaluate`: how good a saved model is, on images or, for a tracker, on videos."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from peft_vision.evaluation import Evaluation
    from peft_vision.tracking.scoring import TrackingEvaluation

IMAGES_AT_A_TIME = 64
SHOWN = 20
"""Of sequences that were left out, so many are listed on the terminal."""


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that peft-vision saved.")],
    *,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Image folder, data set or demo/<name>; for a tracker, the folder of a tracking "
            "data set, your own videos, or demo/tracking.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Images at a time [default: {IMAGES_AT_A_TIME}]; for a tracker, sequences at "
            "once [default: 1].",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Another split than the one that is evaluated on.")
    ] = None,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be read.")
    ] = False,
    kind: Annotated[
        str | None,
        typer.Option(help="Tracker: the layout of the data, such as lasot; else recognized."),
    ] = None,
    dialect: Annotated[
        str | None,
        typer.Option(help="Tracker: otb, got10k, trackingnet or toolkit; else the data's own."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Tracker: folder for result files, figures, plots and what a server takes.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Tracker: replace the output folder.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:1.")] = None,
) -> None:
    """Evaluate a saved model with the preprocessing and settings that are stored in it."""
    of_trackers = {"kind": kind, "dialect": dialect, "output": output, "overwrite": overwrite}
    tracks = _tracks(model)
    if tracks:
        _refuse({"skip_bad_images": skip_bad_images}, "classifies images", "a tracker")
        _evaluate_tracker(
            model, data, of_trackers, as_json, split=split, batch=batch_size or 1, device=device
        )
        return
    if tracks is False:
        _refuse(of_trackers, "tracks", "not a tracker")
    from peft_vision.evaluation import evaluate as run

    found = run(
        model,
        data,
        batch_size=batch_size or IMAGES_AT_A_TIME,
        split=split,
        on_bad_image="skip" if skip_bad_images else "refuse",
        device=device,
        progress=sys.stderr.isatty(),
    )
    if as_json:
        import dataclasses

        print(json.dumps(dataclasses.asdict(found), indent=1))
        return
    _print_table(found)


def _tracks(model: str) -> bool | None:
    """Whether the record says so; None where it cannot be read, which loading will explain."""
    from peft_vision.artifact import RECORD
    from peft_vision.errors import PeftVisionError
    from peft_vision.hub import download, is_repo_id
    from peft_vision.tracking.geometry import NAME

    folder = Path(model).expanduser()
    try:
        if not folder.is_dir() and is_repo_id(model):
            folder = download(model)
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (PeftVisionError, OSError, ValueError):
        return None
    task = record.get("task") if isinstance(record, dict) else None
    return isinstance(task, dict) and task.get("name") == NAME


def _refuse(options: dict[str, Any], meant: str, found: str) -> None:
    from peft_vision.errors import BadSetting

    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        verb = "is" if len(given) == 1 else "are"
        raise BadSetting(
            f"{', '.join(given)} {verb} for a model that {meant}, and this one is {found}. Leave "
            f"{'it' if len(given) == 1 else 'them'} out."
        )


def _evaluate_tracker(
    model: str, data: str, options: dict[str, Any], as_json: bool, **settings: Any
) -> None:
    from peft_vision.tracking.evaluation import evaluate as run

    found = run(model, data, **options, **settings, progress=sys.stderr.isatty())
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
        return
    _print_tracking(found, options["output"])


def _print_tracking(found: TrackingEvaluation, output: Path | None) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(_tracking_table(found))
    for note in found.notes:
        console.print(escape(note), soft_wrap=True)
    if output is not None:
        console.print(f"Written: {escape(str(output))}", soft_wrap=True)
    if found.skipped:
        console.print(f"Left out: {len(found.skipped)} sequences")
        for name, message in list(found.skipped.items())[:SHOWN]:
            console.print(f"  {escape(name)}: {escape(message)}", soft_wrap=True)
        if len(found.skipped) > SHOWN:
            console.print(f"  and {len(found.skipped) - SHOWN} more: --json lists all of them")


def _tracking_table(found: TrackingEvaluation) -> Table:
    from rich.table import Table

    table = Table("figure", "value", title=f"{found.data}, {found.kind} {found.split}")
    percent = 1 if found.dialect == "trackingnet" else 100
    for name, value in found.figures.items():
        table.add_row(name, f"{percent * value:.2f} %")
    table.add_row("in the dialect", found.dialect)
    table.add_row("sequences", f"{found.sequences}")
    table.add_row("frames", f"{found.frames:,}")
    together = "" if found.batch == 1 else f", {found.batch} sequences at once"
    for name, speed in (("1 / mean(t)", found.fps), ("mean(1 / t)", found.fps_mean_of_rates)):
        if speed is not None:
            table.add_row(f"frames per second, {name}", f"{speed:.1f}{together}")
    return table


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
