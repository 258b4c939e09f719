"""``peft-vision show``: a model's sites, cost and trainable parameters."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def show(
    model: Annotated[str, typer.Argument(help="A model's name or a saved folder.")],
    image_size: Annotated[int | None, typer.Option(help="Height and width to count for.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where methods can act on a model, and what it costs."""
    from rich.console import Console
    from rich.table import Table

    from peft_vision.backbones import view
    from peft_vision.cost import measure, unwrap
    from peft_vision.history import History
    from peft_vision.loading import open_model

    found = open_model(model, pretrained=False)
    plain = unwrap(found)
    backbone, cost, history = view(plain), measure(plain, image_size), History.of(found)
    kinds = {
        "blocks": len(backbone.blocks),
        "heads": sum(site.count for site in backbone.heads),
        "hidden units": sum(site.count for site in backbone.hidden),
        "linears": len(backbone.linears),
        "convolutions": len(backbone.convs),
    }
    steps = [step.method for step in history.plan.steps]
    if as_json:
        content = {
            "family": backbone.family,
            "sites": kinds,
            "cost": cost.to_json(),
            "steps": steps,
        }
        typer.echo(json.dumps(content))
        return
    table = Table("", "", title=f"{model} ({type(plain).__name__}, family {backbone.family})")
    for kind, count in kinds.items():
        reason = backbone.missing.get(kind.split()[0], "")
        table.add_row(kind, f"{count:,}" if count else f"none {reason and f'({reason})'}")
    if backbone.tokens is not None:
        table.add_row("prefix tokens", str(backbone.tokens.prefix))
        table.add_row("pooling", backbone.tokens.pooling)
    table.add_row("cost", str(cost))
    table.add_row("steps", ", ".join(steps) or "none")
    Console().print(table)
