"""Photographs that ship inside Python packages, one half for each split of the drawn sequences."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np

from peft_vision.data.images import decode
from peft_vision.errors import DataError, MissingExtra
from peft_vision.tracking.crops import Frame

PICTURES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "sklearn": ("flower.jpg",),
        "skimage": (
            *("astronaut.png", "coffee.png", "motorcycle_left.png", "ihc.png", "brick.png"),
            *("hubble_deep_field.jpg", "grass.png", "coins.png", "camera.png", "page.png"),
        ),
        "elpv_dataset": tuple(f"cell{number:04d}.png" for number in range(1, 1440, 240)),
    },
    "test": {
        "sklearn": ("china.jpg",),
        "skimage": (
            *("chelsea.png", "rocket.jpg", "retina.jpg", "gravel.png", "moon.png"),
            *("clock_motion.png", "text.png"),
        ),
        "elpv_dataset": tuple(f"cell{number:04d}.png" for number in range(2160, 2620, 120)),
    },
}
"""Package -> files, per split. The cells of a split are of other solar modules than the other's."""

_FOLDERS = {
    "sklearn": ("datasets", "images"),
    "skimage": ("data",),
    "elpv_dataset": ("data", "images"),
}
_NAMES = {
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "elpv_dataset": "elpv-dataset",
}
_LONGEST = 720
"""Larger photographs are halved until they are below this, in pixels."""


@functools.cache
def photographs(split: str) -> tuple[Frame, ...]:
    """The photographs of a split, decoded once in a process (about 15 MB).

    Raises:
        MissingExtra: a package that holds them is not installed.
        DataError: a package lacks its file.
    """
    found = [
        _read(_folder(package) / file, package)
        for package, files in PICTURES[split].items()
        for file in files
    ]
    return tuple(found)


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingExtra(
            f"demo/tracking is drawn from photographs in the package {_NAMES[package]}, which is "
            'not installed. Install it with: pip install "peft-vision[demo,track]"'
        )
    return Path(found.submodule_search_locations[0]).joinpath(*_FOLDERS[package])


def _read(file: Path, package: str) -> Frame:
    if not file.is_file():
        raise DataError(
            f"{file} is missing; reinstall the package: pip install --force-reinstall "
            f"{_NAMES[package]}"
        )
    image = decode(file.read_bytes())
    while max(image.size) > _LONGEST:
        image = image.reduce(2)
    return np.array(image)
