"""`peft-vision recipes`: the recipes that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def recipes(
    copy: Annotated[str | None, typer.Option("--copy", help="Copy this recipe to edit it.")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder or file for the copy.")] = None,
) -> None:
    """List the recipes that ship, or copy one."""
    from peft_vision.recipe import copy_recipe, headline, shipped

    if copy is not None:
        target = copy_recipe(copy, to)
        print(f"Copied to {target}. Run it with: peft-vision finetune {target}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "about")
    for name, path in shipped().items():
        table.add_row(name, headline(path))
    Console().print(table)
