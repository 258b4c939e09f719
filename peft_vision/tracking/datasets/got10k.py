"""GOT-10k (Huang et al., TPAMI 2019): `<split>/list.txt` and `<split>/<sequence>/00000001.jpg`."""

from __future__ import annotations

import configparser
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from peft_vision.errors import DataError
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.datasets._files import (
    FolderFrames,
    Numbered,
    boxes_of,
    labels_of,
    listed_frames,
    require_same,
    text_of,
    with_area,
)
from peft_vision.tracking.sequence_set import LazySequences, SequenceSet, opened_now
from peft_vision.tracking.sequences import TrackingSequence

NAME = "got10k"
DIALECT = "got10k"
SPLITS = ("train", "val", "test")

LABELS = {"cover": "cover.label", "cut": "cut_by_image.label"}
"""Figures per frame. Cover: 0 to 8, from hidden to all to be seen; cut: 1 where the border cuts."""

Extra = dict[str, np.ndarray[Any, Any]]


def recognizes(root: Path) -> bool:
    """Whether a split, or the root itself, has a list.txt."""
    return any((folder / "list.txt").is_file() for folder in (root, *_splits(root).values()))


def read(root: Path, split: str | None) -> SequenceSet:
    """Read a split; the root may be the split's own folder.

    Without a split: test, else val, else train. The training split is opened lazily.

    Raises:
        DataError: there is no such split, or no sequence of it can be used.
    """
    found = _splits(root)
    if not found and (root / "list.txt").is_file():
        found = {split or (root.name if root.name in SPLITS else "test"): root}
    chosen = split or next((name for name in reversed(SPLITS) if name in found), None)
    if chosen is None or chosen not in found:
        raise DataError(
            f"{root} has no split {split or 'train, val or test'} of GOT-10k; found: "
            f"{', '.join(found) or 'none'}. A split is a folder with a list.txt of its sequences."
        )
    folder = found[chosen]
    names = text_of(folder / "list.txt").split()
    if chosen == "train":
        lazily = LazySequences(names, partial(_for_training, folder, names))
        return SequenceSet(NAME, chosen, lazily, DIALECT)
    sequences, broken = opened_now(names, lambda name: _listed(folder, name), str(folder))
    return SequenceSet(NAME, chosen, sequences, DIALECT, broken)


def _splits(root: Path) -> dict[str, Path]:
    return {name: root / name for name in SPLITS if (root / name / "list.txt").is_file()}


def _for_training(folder: Path, names: Sequence[str], index: int) -> TrackingSequence:
    """The folder is not listed: there is a frame per row, and reading a missing one says so."""
    name = names[index]
    boxes = boxes_of(folder / name / "groundtruth.txt")
    extra = _labels(folder / name, boxes)
    frames = FolderFrames(folder / name, Numbered("{:08d}.jpg", 1, len(boxes)))
    return TrackingSequence(name, frames, boxes, _visible(folder / name, boxes, extra), extra)


def _listed(folder: Path, name: str) -> TrackingSequence:
    frames = listed_frames(folder / name)
    boxes = boxes_of(folder / name / "groundtruth.txt")
    if len(boxes) > 1:
        require_same(name, len(frames), len(boxes))
    extra = _labels(folder / name, boxes)
    visible = _visible(folder / name, boxes, extra)
    about = folder / name / "meta_info.ini"
    if about.is_file():
        extra["object_class"] = np.full(len(boxes), _object_class(about))
    return TrackingSequence(name, frames, boxes, visible, extra)


def _labels(folder: Path, boxes: Array) -> Extra:
    files = {name: folder / file for name, file in LABELS.items()}
    return {name: labels_of(file, len(boxes)) for name, file in files.items() if file.is_file()}


def _visible(folder: Path, boxes: Array, extra: Extra) -> np.ndarray[Any, np.dtype[np.bool_]]:
    visible = with_area(boxes)
    absence = folder / "absence.label"
    if absence.is_file():
        visible &= labels_of(absence, len(boxes)) == 0
    if "cover" in extra:
        visible &= extra["cover"] > 0
    return visible


def _object_class(file: Path) -> str:
    """The class that meta_info.ini names.

    Raises:
        DataError: it cannot be read.
    """
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(text_of(file))
    except configparser.Error as error:
        raise DataError(f"{file} is not an INI file: {error}.") from error
    return parser.get("METAINFO", "object_class", fallback="")
