"""`peft-vision finetune`: train as a recipe says."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from peft_vision.finetuning import Finetuned
    from peft_vision.recipe import LoadedRecipe

SHARES = {"top1": "top1", "top5": "top5", "iou": "IoU", "success50": "IoU above 0.5"}
"""Figures between 0 and 1 that are shown, where there are such."""


def finetune(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A YAML file, or the name of a recipe that ships (peft-vision recipes)."
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Change settings: train.epochs=2 method.r=8"),
    ] = None,
    *,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder for the result.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods or presets in place of the recipe's: a,b")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in the output folder.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start an unfinished run anew, do not resume it.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train even if the memory will not be enough.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show every setting and its origin, and stop.")
    ] = False,
) -> None:
    """Fine-tune a backbone as a recipe says; the same command again resumes a killed run."""
    from peft_vision.recipe import load_recipe

    flags: dict[str, Any] = {}
    if methods is not None:
        flags["methods"] = [name.strip() for name in methods.split(",") if name.strip()]
    if output is not None:
        flags["output"] = output
    loaded = load_recipe(recipe, changes or [], flags)
    if print_config:
        _print_settings(loaded)
        return
    from peft_vision.finetuning import finetune as run

    _print_result(run(loaded, overwrite=overwrite, resume=not restart, force=force, say=_say))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print_settings(loaded: LoadedRecipe) -> None:
    import json

    rows = [(key, json.dumps(value), origin) for key, value, origin in loaded.rows()]
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, origin in rows:
        print(f"{key:<{wide[0]}}  {value:<{min(wide[1], 40)}}  # {origin}")


def _print_result(result: Finetuned) -> None:
    from accelerate import PartialState
    from rich.console import Console
    from rich.table import Table

    if not PartialState().is_main_process:
        return
    table = Table("figure", "value")
    for name, said in SHARES.items():
        if name in result.metrics:
            table.add_row(f"validation {said}", f"{result.metrics[name]:.2%}")
    if "n" in result.metrics:
        counted = "pairs" if "iou" in result.metrics else "images"
        table.add_row(f"validation {counted}", f"{result.metrics['n']:.0f}")
    table.add_row("optimizer steps", f"{result.metrics['steps']:.0f}")
    table.add_row("seconds", f"{result.metrics['seconds']:.1f}")
    Console().print(table)
    print(
        f"Saved in {result.output}. Evaluate it with: "
        f"peft-vision evaluate {result.output} --data DIR"
    )
