"""`peft-vision memory`: what a run would take on a GPU, and what would make it fit."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from peft_vision.memory.advice import Advice
    from peft_vision.memory.figures import MemoryEstimate


def memory(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A YAML file, or the name of a recipe that ships (peft-vision recipes)."
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Change settings: train.norms=low method.r=8"
        ),
    ] = None,
    *,
    gpu: Annotated[
        str | None,
        typer.Option(help="Memory of the GPU, such as 24GB: whether it fits, and what would help."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images per pass, in place of the recipe's.")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Outputs of the classifier.")] = 1000,
    json: Annotated[
        bool, typer.Option("--json", help="One line of JSON instead of tables.")
    ] = False,
) -> None:
    """Predict the memory of training a recipe: no GPU, no weights and no data are needed."""
    from peft_vision.memory.advice import advise
    from peft_vision.memory.estimate import rehearsal_of
    from peft_vision.memory.fitting import fit_to
    from peft_vision.memory.gpu import bytes_of
    from peft_vision.recipe import load_recipe

    loaded = load_recipe(recipe, changes or [], {} if gpu is None else {"memory": gpu}).recipe
    size = None if loaded.memory is None else bytes_of(loaded.memory)
    if batch is not None:
        sizes = {"batch_size": batch, "micro_batch": None}
        loaded = loaded.model_copy(update={"train": loaded.train.model_copy(update=sizes)})
    rehearsal = rehearsal_of(loaded, classes)
    if "auto" in {loaded.train.batch_size, loaded.train.micro_batch} and size is not None:
        fitted = fit_to(loaded, rehearsal)
        print(fitted.words(str(loaded.memory)), file=sys.stderr)
        train = loaded.train.model_copy(update=fitted.changes)
        loaded = loaded.model_copy(update={"train": train})
    if size is None:
        estimate = rehearsal.run(loaded.train)
        _print_json(estimate.to_json()) if json else _print(estimate)
        return
    advice = advise(loaded, rehearsal, size)
    if json:
        _print_json(advice.to_json())
        return
    _print(advice.estimate)
    _print_advice(advice, str(loaded.memory))


def _print_json(content: dict[str, Any]) -> None:
    from json import dumps

    print(dumps(content))


def _print(estimate: MemoryEstimate) -> None:
    from rich.console import Console

    console = Console()
    console.print(estimate.table())
    for line in estimate.unverified:
        console.print(f"Unverified: {line}.", highlight=False)


def _print_advice(advice: Advice, memory: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from peft_vision.memory.gpu import said

    console, short = Console(), advice.estimate.peak - advice.size
    verdict = f"It fits into {memory} ({said(advice.size)}), with {said(-short)} to spare."
    if short > 0:
        verdict = f"It does not fit into {memory} ({said(advice.size)}): {said(short)} too much."
    console.print(verdict, highlight=False)
    if advice.largest:
        console.print(f"Largest pass that fits: {advice.largest} images.", highlight=False)
    if not advice.changes:
        return
    table = Table("change, each on its own", "peak", "fits", "what it changes")
    for change in advice.changes:
        fits = "yes" if change.estimate.fits(advice.size) else "no"
        table.add_row(escape(change.words), said(change.estimate.peak), fits, change.kind)
    console.print(table)
    console.print(f"With memory: {memory} in the recipe, finetune chooses.", highlight=False)
