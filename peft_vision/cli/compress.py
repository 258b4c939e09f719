"""``peft-vision compress``: a smaller model that meets a stated budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def compress(
    model: Annotated[str, typer.Argument(help="A model's name or a saved folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    target_flops: Annotated[
        str | None, typer.Option(help="A ratio (0.4), FLOPs (1.8G) or multiply-adds (0.9GMACs).")
    ] = None,
    target_params: Annotated[
        str | None, typer.Option(help="A ratio (0.4) or a count (9M).")
    ] = None,
    target_latency: Annotated[
        str | None, typer.Option(help="Milliseconds a batch, timed on --device.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated methods or presets; see `methods`.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to decide by and to fit what stays on (512 are drawn, labels are not "
            "needed), and to recover with: a folder or a data set's name."
        ),
    ] = None,
    compensate: Annotated[
        str, typer.Option(help="With --data, how what stays takes over: ridge, mean or none.")
    ] = "ridge",
    trials: Annotated[
        int, typer.Option(help="With --data, how many divisions of the budget to try.")
    ] = 6,
    recover_epochs: Annotated[
        int, typer.Option(help="Epochs of fine-tuning with distillation from the dense model.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Device to time and recover on.")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="Images a batch when timing.")] = 1,
    image_size: Annotated[
        int | None, typer.Option(help="For models that do not say theirs.")
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Load the source's pretrained weights.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a model physically smaller and faster, to a budget."""
    from peft_vision.budget import parse_one
    from peft_vision.files import refuse_existing

    parse_one(target_flops, target_params, target_latency)
    refuse_existing(output, overwrite=overwrite)
    _refuse_recovery_without_data(recover_epochs, data)

    from peft_vision.compression import compress as run
    from peft_vision.history import History
    from peft_vision.loading import open_model

    dense = open_model(model, pretrained=pretrained).to(device)
    if recover_epochs > 0:
        from peft_vision.recovery import require_classes

        require_classes(History.of(dense))
    result = run(
        dense,
        target_flops=target_flops,
        target_params=target_params,
        target_latency_ms=target_latency,
        methods=[name.strip() for name in methods.split(",")] if methods else None,
        data=data,
        compensate=compensate,
        trials=trials,
        image_size=image_size,
        batch_size=batch_size,
    )
    if recover_epochs > 0 and data is not None:
        from peft_vision.recovery import recover

        if not recover(result.model, dense, data, epochs=recover_epochs)["kept"]:
            result.notes.append(
                "Training did not lower the loss on the validation images: the weights are what "
                "they were before it."
            )
    result.save_pretrained(output, overwrite=overwrite)
    if as_json:
        metrics = History.of(result.model).metrics
        typer.echo(json.dumps({**result.summary(), "metrics": metrics, "output": str(output)}))
        return
    _print(result.summary(), result.table(), result.notes, output)


def _refuse_recovery_without_data(epochs: int, data: str | None) -> None:
    from peft_vision.errors import BadSetting

    if epochs > 0 and data is None:
        raise BadSetting("--recover-epochs needs images: add --data FOLDER.")
    if data is not None and not data.startswith("demo/") and not Path(data).expanduser().exists():
        raise BadSetting(f"--data {data}: there is no such folder.")


def _print(
    summary: dict[str, object], rows: list[tuple[str, str, str]], notes: list[str], output: Path
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "before", "after", title=f"{output}")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(
        f"asked {summary['quantity']} {summary['asked']}: limit {summary['limit']:,.6g}, "
        f"got {summary['got']:,.6g} ({summary['share_of_limit']:.4f} of it), "
        f"{summary['seconds']:.1f} s, {summary['tried']} candidates counted."
    )
    for note in notes:
        console.print(f"Note: {note}")
