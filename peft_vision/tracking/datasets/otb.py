"""OTB-100 (Wu et al., TPAMI 2015): `<Sequence>/{img/0001.jpg, groundtruth_rect.txt}`.

Boxes are counted from 1; what is read counts from 0. Two targets in one folder (Jogging, Skating2)
have groundtruth_rect.1.txt and .2.txt and become the sequences Jogging.1 and Jogging.2; an empty
file (Human4) is no target. Some sequences are annotated in a part of their frames only.
"""

from __future__ import annotations

import re
from pathlib import Path

from peft_vision.errors import DataError
from peft_vision.tracking.datasets._files import (
    FolderFrames,
    boxes_of,
    folders_in,
    listed_frames,
    number_of,
    require_same,
    with_area,
)
from peft_vision.tracking.sequence_set import SequenceSet, opened_now
from peft_vision.tracking.sequences import TrackingSequence

NAME = "otb"
DIALECT = "otb"
SPLITS = ("test",)

ORIGIN = 1.0
"""What the groundtruth calls the first pixel."""

ANNOTATED = {
    "David": (300, 770),
    "Football1": (1, 74),
    "Freeman3": (1, 460),
    "Freeman4": (1, 283),
    "Diving": (1, 215),
}
"""First and last number of the files that the groundtruth is of, where it is not all of them."""

_GROUNDTRUTH = re.compile(r"groundtruth_rect(?:\.(\d+))?\.txt(?:\.(\d+))?")


def recognizes(root: Path) -> bool:
    """Whether a folder has img and a groundtruth_rect file."""
    return any(_targets(folder) and (folder / "img").is_dir() for folder in folders_in(root))


def read(root: Path, split: str | None) -> SequenceSet:
    """Read all sequences; the only split is test.

    Raises:
        DataError: no sequence can be used.
    """
    targets = {
        name: (folder, file)
        for folder in folders_in(root)
        if (folder / "img").is_dir()
        for name, file in _named(folder).items()
    }
    sequences, broken = opened_now(targets, lambda name: _opened(name, *targets[name]), str(root))
    return SequenceSet(NAME, split or "test", sequences, DIALECT, broken)


def _targets(folder: Path) -> dict[int, Path]:
    """Files of groundtruth by the number of the target, 0 where it has none."""
    matches = {file: _GROUNDTRUTH.fullmatch(file.name) for file in folder.glob("groundtruth_rect*")}
    found = {int(m[1] or m[2] or 0): file for file, m in matches.items() if m}
    return dict(sorted(found.items()))


def _named(folder: Path) -> dict[str, Path | None]:
    """Targets by the name of their sequence; None where a folder has no groundtruth at all."""
    files = _targets(folder)
    filled = {number: file for number, file in files.items() if file.read_bytes().strip()}
    if len(filled) > 1:
        return {f"{folder.name}.{number}": file for number, file in filled.items()}
    return {folder.name: next(iter((filled or files).values()), None)}


def _opened(name: str, folder: Path, file: Path | None) -> TrackingSequence:
    if file is None:
        raise DataError(f"{folder} has no groundtruth_rect.txt.")
    boxes = boxes_of(file, ORIGIN)
    frames = listed_frames(folder / "img")
    first, last = ANNOTATED.get(folder.name, (0, len(frames) + 1_000_000))
    names = [frame for frame in frames.names if first <= (number_of(frame) or 0) <= last]
    require_same(name, len(names), len(boxes))
    return TrackingSequence(name, FolderFrames(frames.folder, names), boxes, with_area(boxes))
