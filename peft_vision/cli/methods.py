"""``peft-vision methods``: what there is."""

from __future__ import annotations


def methods() -> None:
    """List methods and presets."""
    from rich.console import Console
    from rich.table import Table

    from peft_vision import presets
    from peft_vision.method import find, names

    table = Table("name", "kind", "what it does")
    for name in names():
        cls = find(name)
        summary = (sys_doc(cls.__module__) or "").strip().splitlines()[0]
        table.add_row(name, cls.__module__.split(".")[-2], summary)
    for name in presets.names():
        table.add_row(name, "preset", presets.read(name)["about"])
    Console().print(table)


def sys_doc(module: str) -> str | None:
    """The docstring of an imported module."""
    import sys

    return sys.modules[module].__doc__
