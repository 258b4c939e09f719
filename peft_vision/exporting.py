"""A model as one file that runs without peft_vision: ONNX, or PyTorch's own exported program.

What is exported is a copy: merged, in eval mode, on the CPU, in float32 (float64 stays). The model
that was passed in is run for comparison and is otherwise left alone. A file is moved into place
only after it computed what the live model computes, for several batch sizes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peft_vision.artifact import versions
from peft_vision.errors import BadSetting, ExportMismatch, JobFailed, MissingExtra
from peft_vision.files import refuse_existing, writing
from peft_vision.history import History
from peft_vision.tracing import (
    FAILURES,
    dtype_of,
    first_line,
    image_shape,
    plain_copy,
    precision,
    quiet,
    random_images,
    tensor_of,
    times,
    trace,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Run = Callable[[Tensor], Tensor]
"""From images `B C H W` on the CPU to what the model computes, on the CPU."""

BATCH_SIZES = (1, 2, 5)

EXTERNAL_ABOVE = int(1.5 * 2**30)
"""Bytes of weights from which ONNX keeps them in a second file: a protobuf ends at 2 GiB."""

TOLERANCES = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest difference as a fraction of the largest output, by the precision of the live model."""

SUFFIXES = {"onnx": ".onnx", "torch.export": ".pt2"}
METADATA = "peft_vision.json"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked.

    Attributes:
        path: the file; ONNX weights above 1.5 GiB lie beside it in `<name>.data`.
        format: "onnx" or "torch.export".
        bytes: size on disk, external data included.
        max_difference: largest absolute difference to the live model, over all batch sizes.
        opset: ONNX opset, None for torch.export.
        batch_sizes_checked: the batch sizes that were compared.
    """

    path: Path
    format: str
    bytes: int
    max_difference: float
    opset: int | None
    batch_sizes_checked: tuple[int, ...]


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "onnx",
    image_size: int | tuple[int, int] | None = None,
    overwrite: bool = False,
    tolerance: float | None = None,
) -> ExportReport:
    """Write `model` as one file, check it against the live model, then move it into place.

    The batch dimension is dynamic, the image size is fixed. Adapters are merged in a copy; `model`
    keeps its weights, mode, hooks, device and gradients.

    `format="torch.export"` writes nothing that is pickled (no sample inputs are stored), but
    `torch.export.load` itself *can* unpickle: it falls back to an unrestricted `torch.load` for
    what an archive declares as pickled. Load .pt2 files only from people you trust. An ONNX file
    holds a graph and numbers, no code.

    Args:
        model: any image model, adapted or compressed or plain.
        path: the file to write, `.onnx` or `.pt2`.
        format: "onnx" or "torch.export".
        image_size: side, or (height, width), in pixels; by default what the model says.
        overwrite: replace a file that is there.
        tolerance: largest allowed difference as a fraction of the largest output; by default 1e-4,
            1e-2 for a float16 and 5e-2 for a bfloat16 model (the file is float32).

    Raises:
        BadSetting: unknown format, wrong suffix, or an image size that is neither given nor known.
        OutputExists: `path` is there and `overwrite` is off.
        MissingExtra: ONNX is asked for and its packages are not installed.
        JobFailed: the model cannot be traced.
        ExportMismatch: the file computes something else; nothing was written.
        CannotWrite: the disk is full or the folder is not writable.
    """
    path = check_target(path, format, overwrite=overwrite)
    plain = plain_copy(model)
    shape = image_shape(plain.model, image_size)
    program = trace(plain, shape)
    allowed = TOLERANCES[precision(model)] if tolerance is None else tolerance
    with writing(path), _staging(path) as stage:
        file = stage / path.name
        facts = _metadata(model)
        opset: int | None
        if format == "onnx":
            opset, run = _write_onnx(program, file, facts, _weight_bytes(plain))
        else:
            opset, run = _write_program(program, file, facts)
        images = [random_images(batch, shape, dtype_of(plain)) for batch in BATCH_SIZES]
        difference = _compare(model, run, images, allowed)
        size = sum(part.stat().st_size for part in stage.iterdir())
        _move(stage, path)
    return ExportReport(path, format, size, difference, opset, BATCH_SIZES)


def _write_onnx(
    program: ExportedProgram, file: Path, facts: Mapping[str, str], weight_bytes: int
) -> tuple[int, Run]:
    with quiet(), torch.no_grad():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                dynamic_shapes=({0: "batch"},),
                input_names=["pixel_values"],
                output_names=["output"],
            )
        except FAILURES as error:
            raise JobFailed(
                f"The ONNX exporter has no translation for this model: {first_line(error)}. "
                "Nothing was written; format='torch.export' may work."
            ) from error
    if exported is None:
        raise JobFailed("The ONNX exporter returned nothing. Nothing was written.")
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with paths of the machine that exported
    exported.model.metadata_props.update(facts)
    exported.save(str(file), external_data=weight_bytes > EXTERNAL_ABOVE)
    return int(exported.model.opset_imports[""]), _onnx_runner(file)


def _onnx_runner(file: Path) -> Run:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    refusals = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.RuntimeException)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
    except (*refusals, state.NotImplemented) as error:
        raise JobFailed(
            f"ONNX Runtime cannot load the exported file: {first_line(error)}. Nothing was written."
        ) from error

    def run(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])
        except refusals as error:
            raise RuntimeError(first_line(error)) from error

    return run


def _write_program(
    program: ExportedProgram, file: Path, facts: Mapping[str, str]
) -> tuple[None, Run]:
    # Sample inputs are the one thing that would be pickled; stack traces name this machine's paths.
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    with quiet():
        try:
            torch.export.save(program, file, extra_files={METADATA: json.dumps(dict(facts))})
            loaded = torch.export.load(file).module()
        except RuntimeError as error:
            raise OSError(first_line(error)) from error

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = loaded(images)
        return output

    return None, run


def _compare(model: nn.Module, run: Run, batches: list[Tensor], allowed: float) -> float:
    """Largest absolute difference between the file and the live model.

    Raises:
        ExportMismatch: it is more than `allowed` times the largest output, or a batch size fails.
    """
    largest = 0.0
    for images in batches:
        expected = _live(model, images)
        try:
            got = run(images).double()
        except FAILURES as error:
            raise ExportMismatch(
                f"The exported file fails on a batch of {len(images)}: {first_line(error)}. "
                "Nothing was written; the model is as it was."
            ) from error
        if got.shape != expected.shape:
            raise ExportMismatch(
                f"The exported file returns {times(got.shape)} for a batch of {len(images)}, the "
                f"live model {times(expected.shape)}. Nothing was written."
            )
        difference = float((got - expected).abs().max())
        limit = allowed * float(expected.abs().max())
        if not difference <= limit:  # not `>`: a NaN is a mismatch
            raise ExportMismatch(
                f"The exported file differs from the live model by {difference:.3g} on a batch of "
                f"{len(images)}; {limit:.3g} is allowed ({allowed:g} of the largest output). "
                "Nothing was written. If the model rounds or selects tokens near a tie, pass a "
                "larger tolerance."
            )
        largest = max(largest, difference)
    return largest


def _live(model: nn.Module, images: Tensor) -> Tensor:
    """What the live model computes in eval mode, in float64 on the CPU; its modes are put back."""
    first = next((p for p in model.parameters() if p.is_floating_point()), images)
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            return tensor_of(model(images.to(first.device, first.dtype)))[1].double().cpu()
    finally:
        for module, training in modes:
            module.training = training


def check_target(path: str | Path, format: str, *, overwrite: bool = False) -> Path:
    """Say early, before a model is loaded, that it could not be exported to `path`.

    Raises:
        BadSetting: unknown format, wrong suffix, or a folder.
        OutputExists: `path` is there and `overwrite` is off.
        MissingExtra: ONNX is asked for and its packages are not installed.
    """
    path = Path(path)
    if format not in SUFFIXES:
        raise BadSetting(f"format={format!r}; it is one of {', '.join(SUFFIXES)}.")
    wanted = SUFFIXES[format]
    if path.is_dir():
        raise BadSetting(
            f"{path} is a folder; give a file, for example {path / ('model' + wanted)}."
        )
    if path.suffix != wanted:
        raise BadSetting(f"A {format} file ends in {wanted}; {path} does not. Try {path}{wanted}.")
    refuse_existing(path, overwrite=overwrite)
    if format == "onnx":
        _require_onnx()
    return path


def _require_onnx() -> None:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"ONNX export needs {', '.join(missing)}, not installed here. "
            'Run: pip install "peft-vision[export]". format="torch.export" needs nothing more.'
        )


def _metadata(model: nn.Module) -> dict[str, str]:
    """Labels, preprocessing and versions as strings, for a file that travels alone."""
    facts = {"versions": json.dumps(versions())}
    history = getattr(model, "history", None)
    if isinstance(history, History):
        for name, value in (("labels", history.labels), ("preprocessing", history.preprocessing)):
            if value:
                facts[name] = json.dumps(value)
    return facts


def _weight_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@contextlib.contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A folder beside `path` that is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=path.parent))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _move(stage: Path, path: Path) -> None:
    """Weights first, so that a file in place always finds them; weights of an older file go."""
    beside = f"{path.name}.data"
    if (stage / beside).exists():
        (stage / beside).replace(path.with_name(beside))
        (stage / path.name).replace(path)
    else:
        (stage / path.name).replace(path)
        path.with_name(beside).unlink(missing_ok=True)
