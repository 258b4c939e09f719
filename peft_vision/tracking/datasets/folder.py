"""One's own data: frames, or one video, with groundtruth.txt; a single sequence or a root of many.

Frames lie beside groundtruth.txt, or in img, imgs or frames. Boxes are x y w h in pixels, counted
from 0; one row per frame, or only the first. A row of NaN: the object is not to be seen.
"""

from __future__ import annotations

from pathlib import Path

from peft_vision.errors import DataError
from peft_vision.tracking.datasets._files import (
    boxes_of,
    folders_in,
    require_same,
    with_area,
)
from peft_vision.tracking.frames import open_frames
from peft_vision.tracking.sequence_set import SequenceSet, opened_now
from peft_vision.tracking.sequences import Frames, TrackingSequence

NAME = "folder"
DIALECT = "otb"
SPLITS = ("train", "val", "test")

GROUNDTRUTH = "groundtruth.txt"
PLACES = ("img", "imgs", "frames")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


def recognizes(root: Path) -> bool:
    """Whether the root, a folder in it, or one in a split's folder has groundtruth.txt."""
    folders = (root, *_splits(root).values())
    return any(
        (below / GROUNDTRUTH).is_file()
        for folder in folders
        for below in (folder, *folders_in(folder))
    )


def read(root: Path, split: str | None) -> SequenceSet:
    """Read a root: one sequence, a folder of sequences, or folders train, val and test of them.

    Without a split: test, else val, else train; "all" where there are no such folders.

    Raises:
        DataError: there is no such split, or no sequence can be used.
    """
    if (root / GROUNDTRUTH).is_file():
        return SequenceSet(NAME, split or "all", [_opened(root)], DIALECT)
    found = _splits(root) or {split or "all": root}
    chosen = split or next(name for name in ("test", "val", "train", "all") if name in found)
    if chosen not in found:
        raise DataError(f"{root} has no folder {chosen}; found: {', '.join(found)}.")
    folders = {folder.name: folder for folder in folders_in(found[chosen])}
    sequences, broken = opened_now(folders, lambda name: _opened(folders[name]), str(found[chosen]))
    return SequenceSet(NAME, chosen, sequences, DIALECT, broken)


def _splits(root: Path) -> dict[str, Path]:
    """Folders named for a split that are no sequences themselves."""
    found = {name: root / name for name in SPLITS if (root / name).is_dir()}
    return {name: path for name, path in found.items() if not (path / GROUNDTRUTH).is_file()}


def _opened(folder: Path) -> TrackingSequence:
    boxes = boxes_of(folder / GROUNDTRUTH)
    frames = _frames(folder)
    if len(boxes) > 1:
        require_same(folder.name, len(frames), len(boxes))
    return TrackingSequence(folder.name, frames, boxes, with_area(boxes))


def _frames(folder: Path) -> Frames:
    inner = next((folder / name for name in PLACES if (folder / name).is_dir()), None)
    if inner is not None:
        return open_frames(inner)
    videos = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS)
    if len(videos) > 1:
        listed = ", ".join(video.name for video in videos)
        raise DataError(f"{folder} has {len(videos)} videos ({listed}); a sequence has one.")
    return open_frames(videos[0] if videos else folder)
