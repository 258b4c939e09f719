"""Labeled images that ship inside a Python package, so that a first run needs no download.

`elpv` is 2,624 electroluminescence images of solar cells, cut from 44 modules (Deitsch et al.,
Solar Energy 185, 2019). Only the cells that the experts were sure about are used: defect
probability 0 or 1.
"""

from __future__ import annotations

import functools
import importlib.util
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_vision.errors import DataError, MissingExtra, UnknownName

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

CLASSES = ("functional", "defective")

_INSTALL = 'Install it with: pip install "peft-vision[demo]"'
_CELLS_PER_MODULE = 60
_LONGEST_SINGLE_MODULE = 72
_RAW_SIDE = 24
_RAW_PENALTY = 0.01

_ABOUT_ELPV = (
    "ELPV: electroluminescence images of solar cells, 300 x 300 gray, functional or defective "
    "(cells labeled 0 or 1; the uncertain ones are left out). The images are licensed "
    "CC BY-NC-SA 4.0 (no commercial use), come with the package elpv-dataset and are not part of "
    "peft_vision. Split by module: the package names no modules, so they are inferred from the "
    "order of the files, in which the cells of a module follow one another (runs of one cell type, "
    "cut every 60 cells where the run is a multiple of 60). Every second one is validation; the "
    "two long runs that cannot be cut safely are training. Modules differ much from each other, so "
    "the accuracy depends on which ones are held out; a random split by cell puts cells of one "
    "module on both sides and reads higher."
)


class _Cell(NamedTuple):
    file: Path
    probability: float
    kind: str


def names() -> list[str]:
    """Return the names that follow `demo/`."""
    return ["elpv"]


def describe(name: str) -> str:
    """Return what the data are, their license, and how they are split.

    Raises:
        UnknownName: there is no such data set.
    """
    _check(name)
    return _ABOUT_ELPV


def load(name: str) -> dict[str, Dataset]:
    """Load the splits `train` and `validation`; columns `image` (RGB) and `label` (ClassLabel).

    Images stay files on the disk and are decoded when they are read.

    Raises:
        UnknownName: there is no such data set.
        MissingExtra: the package that holds the images is not installed.
        DataError: the package holds other files than the ones known.
    """
    _check(name)
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(mode="RGB"), "label": ClassLabel(names=list(CLASSES))})
    loaded: dict[str, Dataset] = {}
    for split, cells in _split(_read_cells()).items():
        columns = {
            "image": [str(cell.file) for cell in cells],
            "label": [int(cell.probability) for cell in cells],
        }
        loaded[split] = Dataset.from_dict(columns, features=features)
    return loaded


@functools.cache
def baselines(name: str) -> dict[str, float]:
    """Return the validation accuracy of two readings that see no features.

    `majority` always answers the more frequent class of the training split; `raw pixels` is a
    logistic regression on 24 x 24 gray pixels. Computed once in a process (some 5 s).

    Raises:
        UnknownName: there is no such data set.
        MissingExtra: scikit-learn or the package that holds the images is not installed.
    """
    _check(name)
    if importlib.util.find_spec("sklearn") is None:
        raise MissingExtra(
            f"The raw-pixel baseline needs scikit-learn, which is not installed. {_INSTALL}"
        )
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    splits = {split: _raw_pixels(cells) for split, cells in _split(_read_cells()).items()}
    (pixels, labels), (held_out, truth) = splits["train"], splits["validation"]
    reader = make_pipeline(StandardScaler(), LogisticRegression(C=_RAW_PENALTY, max_iter=2000))
    reader.fit(pixels, labels)
    most_frequent = np.bincount(labels).argmax()
    return {
        "majority": float((truth == most_frequent).mean()),
        "raw pixels": float((reader.predict(held_out) == truth).mean()),
    }


def _check(name: str) -> None:
    if name not in names():
        raise UnknownName(f"There is no demo data set {name!r}; there is: {', '.join(names())}.")


def _read_cells() -> list[_Cell]:
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or not found.submodule_search_locations:
        raise MissingExtra(
            f"demo/elpv needs the package elpv-dataset, which is not installed. {_INSTALL}"
        )
    folder = Path(found.submodule_search_locations[0]) / "data"
    table = folder / "labels.csv"
    if not table.is_file():
        raise DataError(
            f"{table} is missing; reinstall the package: pip install --force-reinstall elpv-dataset"
        )
    rows = [line.split() for line in table.read_text().splitlines() if line.strip()]
    return [_Cell(folder / file, float(probability), kind) for file, probability, kind in rows]


def _split(cells: list[_Cell]) -> dict[str, list[_Cell]]:
    """Hold out every second module; keep the cells of a sure label.

    The package names 44 modules and orders its files by module: the runs of one cell type are
    60, 300, 180, 360, 714, 530, 72, 180, 48 and 180 cells long, which is 18 monocrystalline and 26
    polycrystalline modules of about 60 cells. In 714 and 530 some cells are missing at unknown
    places, so no border is known inside: such a run is never cut and is always training.
    """
    parts: dict[str, list[_Cell]] = {"train": [], "validation": []}
    held_out = True
    for _, run in groupby(cells, key=lambda cell: cell.kind):
        for module in _cut(list(run)):
            single = len(module) <= _LONGEST_SINGLE_MODULE
            parts["validation" if single and held_out else "train"].extend(module)
            held_out = held_out != single
    return {
        split: [cell for cell in part if cell.probability in {0.0, 1.0}]
        for split, part in parts.items()
    }


def _cut(run: list[_Cell]) -> list[list[_Cell]]:
    step = _CELLS_PER_MODULE if len(run) % _CELLS_PER_MODULE == 0 else len(run)
    return [run[start : start + step] for start in range(0, len(run), step)]


def _raw_pixels(cells: list[_Cell]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return gray pixels `N 576` in [0, 1] and labels `N`."""
    import numpy as np
    from PIL import Image

    rows: list[np.ndarray[Any, Any]] = []
    for cell in cells:
        with Image.open(cell.file) as image:
            small = image.convert("L").resize((_RAW_SIDE, _RAW_SIDE), Image.Resampling.BILINEAR)
        rows.append(np.asarray(small, dtype=np.float32).ravel() / 255)
    return np.stack(rows), np.array([int(cell.probability) for cell in cells])
