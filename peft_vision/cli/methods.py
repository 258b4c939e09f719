"""``peft-vision methods``: what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

MANY = "From PEFT, by its names (methods that cannot work on images say so when asked for)"


def methods(
    name: str = typer.Argument("", help="One method or preset: its settings and their defaults."),
) -> None:
    """List methods and presets, or the settings of one."""
    if name:
        _one(name)
    else:
        _all()


def _all() -> None:
    import ast

    from rich.console import Console
    from rich.table import Table

    from peft_vision import presets
    from peft_vision.lookup import PACKAGE, stems
    from peft_vision.method import FOLDERS, filed, find, names, offered

    table = Table("name", "kind", "what it does")
    for stem, folder in stems(*FOLDERS).items():
        text = (PACKAGE / folder / f"{stem}.py").read_text(encoding="utf-8")
        summary = (ast.get_docstring(ast.parse(text)) or "").strip().splitlines()[0]
        table.add_row(stem, folder, summary)
    for other in names():
        if other not in {*filed(), *offered()}:
            about = (find(other).__doc__ or "").strip().splitlines() or [""]
            table.add_row(other, "installed", about[0])
    for preset in presets.names():
        table.add_row(preset, "preset", presets.read(preset)["about"])
    console = Console()
    console.print(table)
    console.print(f"{MANY}:\n{', '.join(sorted(set(offered()) - set(filed())))}")


def _one(name: str) -> None:
    from rich.console import Console

    from peft_vision import presets
    from peft_vision.method import find

    console = Console()
    parts = presets.expand(name)
    if name in presets.names():
        console.print(f"{name}: {presets.read(name)['about']}")
    for part, preset in parts:
        console.print(f"{part}: {(find(part).__doc__ or '').strip().partition(chr(10))[0]}")
        console.print(_settings(part, preset))


def _settings(name: str, preset: dict[str, Any]) -> Table:
    """The settings of a method with their defaults, or those of a preset made of it."""
    import dataclasses

    from rich.table import Table

    from peft_vision.method import find

    cls = find(name)
    table = Table("setting", "default")
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else "-"
        default = preset.get(field.name, default)
        fitted = field.metadata.get("fitted")
        named = repr(default) if default is not None or fitted is None else f"{fitted!r}, or less"
        table.add_row(field.name, named)
    return table
