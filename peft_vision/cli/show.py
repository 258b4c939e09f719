"""``peft-vision show``: a model's sites, cost, steps, and what rounding did to its weights."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_vision.cli._importance import Asked, show_importance

if TYPE_CHECKING:
    from rich.table import Table

    from peft_vision.backbones.sites import Backbone
    from peft_vision.plan import Plan


def show(
    model: Annotated[str, typer.Argument(help="A model's name or a saved folder.")],
    image_size: Annotated[int | None, typer.Option(help="Height and width to count for.")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Show it as this quantizer would leave it, with the error of every layer; the "
            "weights are loaded, nothing is written."
        ),
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            help="Show how much each of its heads matters on images instead: heads. The weights "
            "are loaded."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder of images, for --importance; no labels are read.")
    ] = None,
    images: Annotated[int, typer.Option(help="At most so many are drawn from --data.")] = 64,
    scores: Annotated[
        str | None, typer.Option(help="Scores of heads, with commas between; default: all.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Draw the heads into this .png, .svg or .pdf file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where methods can act on a model, what it costs, and which of its heads matter."""
    from rich.console import Console

    from peft_vision.backbones import view
    from peft_vision.cost import measure, unwrap
    from peft_vision.history import History

    asked = Asked(importance, data, images, scores, output)
    asked.check()
    found = _opened(model, quantize, weights=importance is not None)
    if importance is not None:
        show_importance(found, asked, as_json=as_json)
        return
    plain = unwrap(found)
    backbone, cost, history = view(plain), measure(plain, image_size), History.of(found)
    kinds = {
        "blocks": len(backbone.blocks),
        "heads": sum(site.count for site in backbone.heads),
        "hidden units": sum(site.count for site in backbone.hidden),
        "linears": len(backbone.linears),
        "convolutions": len(backbone.convs),
    }
    errors = _errors(history.plan)
    if as_json:
        content = {
            "family": backbone.family,
            "sites": kinds,
            "cost": cost.to_json(),
            "steps": [step.method for step in history.plan.steps],
            "weight_errors": errors,
        }
        typer.echo(json.dumps(content))
        return
    Console().print(_overview(model, backbone, kinds, str(cost), history.plan))
    if errors:
        Console().print(_error_table(errors, backbone))


def _opened(model: str, quantize: str | None, *, weights: bool) -> Any:
    from peft_vision.errors import BadSetting
    from peft_vision.loading import open_model
    from peft_vision.lookup import stems
    from peft_vision.method import Stage, find
    from peft_vision.wrapping import wrap

    if quantize is None:
        return open_model(model, pretrained=weights)
    if find(quantize).stage is not Stage.QUANTIZE:
        raise BadSetting(f"{quantize} is no quantizer; possible: {', '.join(stems('quantizers'))}.")
    return wrap(open_model(model), quantize)


def _errors(plan: Plan) -> dict[str, float]:
    """Layer -> relative error of its weight, the largest first, as quantizing steps recorded it."""
    found = {
        key: float(decided["error"])  # type: ignore[arg-type]
        for step in plan.steps
        for key, decided in step.decisions.items()
        if isinstance(decided, dict) and "error" in decided
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _overview(
    model: str, backbone: Backbone, kinds: dict[str, int], cost: str, plan: Plan
) -> Table:
    from rich.table import Table

    kind = type(backbone.model).__name__
    table = Table("", "", title=f"{model} ({kind}, family {backbone.family})")
    for name, count in kinds.items():
        reason = backbone.missing.get(name.split()[0], "")
        table.add_row(name, f"{count:,}" if count else f"none {reason and f'({reason})'}")
    if backbone.tokens is not None:
        table.add_row("prefix tokens", str(backbone.tokens.prefix))
        table.add_row("pooling", backbone.tokens.pooling)
    table.add_row("cost", cost)
    table.add_row("steps", ", ".join(step.method for step in plan.steps) or "none")
    return table


def _error_table(errors: dict[str, float], backbone: Backbone) -> Table:
    """Every layer, the worst first, and the mean over the layers of each role."""
    from rich.table import Table

    # A layer that has been split since keeps the key it had, which ends in its role.
    split = {key: key.rpartition(".")[2] for key in errors if key.startswith("blocks.")}
    roles = {**split, **{site.key: site.role for site in backbone.linears}}
    table = Table("layer", "role", "error", title="Rounded weights: |rounded - full| / |full|")
    for key, error in errors.items():
        table.add_row(key, roles.get(key, ""), f"{error:.4f}")
    table.add_section()
    for role in sorted(set(roles.values())):
        of_role = [error for key, error in errors.items() if roles.get(key) == role]
        if of_role:
            table.add_row("mean", role, f"{statistics.mean(of_role):.4f}")
    table.add_row("mean", "all", f"{statistics.mean(errors.values()):.4f}")
    return table
