"""Pictures of the patches that a model kept: what was dropped is dimmed."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt

from peft_vision.report.content import Overlay

_PATCH = 26  # pixels on the page
_DIMMED_TO = np.array([15, 23, 42], dtype=np.float32)
_DIMMED_BY = 0.8
_BORDER = np.array([96, 165, 250], dtype=np.uint8)
_QUALITY = 88


def pictures(overlay: Overlay) -> list[tuple[str, str, str]]:
    """Return (caption, alternative text, data URI) for the input and then for each stage."""
    rows, columns = overlay.grid
    scaled = _scale(overlay.image, (columns * _PATCH, rows * _PATCH))
    total = rows * columns
    shown = [
        (f"input, {total} patches", f"{overlay.title}, as the model saw it", _data_uri(scaled))
    ]
    for stage in overlay.stages:
        kept = np.zeros(total, dtype=bool)
        kept[list(stage.kept)] = True
        count = int(kept.sum())
        alt = f"{overlay.title}, {stage.label}: {count} of {total} patches kept, the others dimmed"
        picture = _data_uri(_dim(scaled, kept.reshape(rows, columns)))
        shown.append((f"{stage.label}: {count} kept", alt, picture))
    return shown


def _scale(image: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _dim(image: npt.NDArray[np.uint8], kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Blend dropped patches into a dark tone and draw a line where kept and dropped ones meet."""
    mask = kept.repeat(_PATCH, axis=0).repeat(_PATCH, axis=1)
    dark = image * (1 - _DIMMED_BY) + _DIMMED_TO * _DIMMED_BY
    picture = np.where(mask[..., None], image, dark.astype(np.uint8))
    # A kept pixel is on the border if a neighbor in the four directions is dropped.
    around = np.pad(mask, 1, mode="edge")
    inside = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    picture[mask & ~inside] = _BORDER
    return picture


def _data_uri(image: npt.NDArray[np.uint8]) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
