"""`peft-vision export`: a saved model as one file that runs without peft_vision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(help="A folder that peft-vision saved, or user/repo.")],
    format: Annotated[str, typer.Option(help="onnx or torch.export.")] = "onnx",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; by default beside the folder.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels, where the model does not say it.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference, as a fraction of the largest output.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older file.")] = False,
) -> None:
    """Export a saved model, merged, and check the file against it before it is put in place."""
    from peft_vision.exporting import check_target
    from peft_vision.exporting import export as run
    from peft_vision.loading import load

    path = check_target(output or beside(model, format), format, overwrite=overwrite)
    report = run(
        load(model),
        path,
        format=format,
        image_size=image_size,
        overwrite=overwrite,
        tolerance=tolerance,
    )
    sizes = ", ".join(str(size) for size in report.batch_sizes_checked)
    opset = f", opset {report.opset}" if report.opset is not None else ""
    print(f"{report.path} ({report.bytes / 2**20:.1f} MiB, {report.format}{opset})")
    print(f"largest difference to the model: {report.max_difference:.3g} at batch sizes {sizes}")


def beside(model: str, format: str) -> Path:
    """`runs/vit-s` -> `runs/vit-s.onnx`; `user/repo@v1` -> `repo.onnx` in this folder."""
    from peft_vision.exporting import SUFFIXES

    folder, suffix = Path(model).expanduser(), SUFFIXES.get(format, "")
    if not folder.is_dir():
        return Path(folder.name.partition("@")[0] + suffix)
    named = folder if folder.name not in {"", ".."} else folder.resolve()
    return named.with_name(named.name + suffix)
