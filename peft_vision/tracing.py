"""A model as a graph: a merged copy, one tensor in and one out, traced by torch.export."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.cost import input_size, unwrap
from peft_vision.errors import BadSetting, JobFailed
from peft_vision.layers.quantized import dequantize

if TYPE_CHECKING:
    from torch.export import ExportedProgram

TRACED_BATCH = 2
"""Not 1: the tracer takes a dimension of 1 for a constant."""

OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")
"""What is taken from an output object, in this order."""

FAILURES = (
    RuntimeError,  # torch.export's, dynamo's and the ONNX exporter's own errors derive from it
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
)
"""What a tracer, an exporter or a traced graph raises."""

_NOISY = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export", "torch.fx")


class ImageToTensor(nn.Module):
    """A model with one image tensor in and one tensor out, whatever the library's output type."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images `B C H W` -> logits `B K`, pooled features `B D` or hidden states `B N D`."""
        return tensor_of(self.model(pixel_values))[1]


def tensor_of(output: Any) -> tuple[str, Tensor]:
    """The tensor to export, and its name.

    Raises:
        JobFailed: the output holds none of `OUTPUTS`.
    """
    if isinstance(output, Tensor):
        return "output", output
    if isinstance(output, Mapping):
        maps = output.get("feature_maps")
        if maps and isinstance(maps[-1], Tensor):  # a backbone's; the last is the deepest
            return "feature_maps", maps[-1]
        for name in OUTPUTS:
            if isinstance(value := output.get(name), Tensor):
                return name, value
        found = ", ".join(output)
        raise JobFailed(f"The model returns {found}; export needs one of {', '.join(OUTPUTS)}.")
    raise JobFailed(
        f"The model returns {type(output).__name__}; export needs a tensor or an object with one "
        f"of {', '.join(OUTPUTS)}."
    )


def plain_copy(model: nn.Module) -> ImageToTensor:
    """A merged copy that can be traced: eval mode, CPU, float32 or float64, nothing to train.

    Raises:
        JobFailed: the model cannot be copied.
    """
    # A layer that remembers an activation (a routing loss, say) cannot be deep-copied as it is.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    try:
        copied = _merged(copy.deepcopy(model, memo))
    except (RuntimeError, TypeError) as error:
        raise JobFailed(
            f"{type(model).__name__} cannot be copied and merged for export: {first_line(error)}. "
            "Nothing was written; the model is as it was."
        ) from error
    wide = torch.float64 if precision(model) is torch.float64 else torch.float32
    return ImageToTensor(copied).to("cpu", wide).eval().requires_grad_(False)


def _merged(model: nn.Module) -> nn.Module:
    peft = sys.modules.get("peft")  # a PEFT model cannot exist without it; importing it takes long
    if peft is not None and isinstance(model, peft.PeftModel):
        model = model.merge_and_unload()
    return dequantize(unwrap(model))


def trace(plain: ImageToTensor, shape: tuple[int, int, int]) -> ExportedProgram:
    """The graph for images of `shape` (C, H, W) and any batch size.

    Raises:
        JobFailed: the model's code cannot be traced, or fixes the batch size.
    """
    images = random_images(TRACED_BATCH, shape, dtype_of(plain))
    # no_grad also picks the attention kernel whose output can be viewed: BEiT needs it.
    with quiet(), torch.no_grad():
        try:
            return torch.export.export(
                plain, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
            )
        except FAILURES as error:
            raise JobFailed(
                f"torch.export cannot trace {type(plain.model).__name__} on images of "
                f"{times(shape)} with a free batch size: {first_line(error)}. Nothing was "
                "written; the model is as it was. --debug shows the whole message."
            ) from error


def image_shape(model: nn.Module, image_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    """Channels, height and width of the images.

    Args:
        model: a plain model.
        image_size: side or (height, width) in pixels; None takes what the model says.

    Raises:
        BadSetting: it is neither given nor known, or below one pixel.
    """
    if image_size is None:
        known = view(model).input_size
        if known is None:
            raise BadSetting(
                f"{type(model).__name__} does not say which image size it takes; pass image_size, "
                "for example image_size=224."
            )
        return known
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1:
        raise BadSetting(f"image_size={image_size}; both sides are at least 1 pixel.")
    return input_size(model, (height, width))


def precision(model: nn.Module) -> torch.dtype:
    """The lowest precision among the floating-point parameters."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    lowest_first = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return next((dtype for dtype in lowest_first if dtype in found), torch.float32)


def dtype_of(plain: nn.Module) -> torch.dtype:
    """What images have to be cast to before the model takes them."""
    return next((p.dtype for p in plain.parameters() if p.is_floating_point()), torch.float32)


def random_images(batch: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Standard normal images `B C H W` on the CPU, the same ones for the same batch size."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch), dtype=dtype)


def times(shape: Sequence[int]) -> str:
    """A shape for a message: 3x224x224."""
    return "x".join(str(size) for size in shape)


def first_line(error: BaseException) -> str:
    """What went wrong at the bottom, in one line and without terminal colors."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporters say about themselves; their errors still come through."""
    loggers = [(log := logging.getLogger(name), log.level) for name in _NOISY]
    for log, _ in loggers:
        log.setLevel(max(logging.ERROR, log.level))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", module=r"(torch|onnxscript|onnx_ir|onnx|copyreg)(\.|$)"
            )
            yield
    finally:
        for log, level in loggers:
            log.setLevel(level)
