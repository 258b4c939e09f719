"""TrackingNet (Mueller et al., ECCV 2018): `TRAIN_0/{frames/<id>/0.jpg, anno/<id>.txt}`, TEST."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from peft_vision.errors import DataError
from peft_vision.tracking.datasets._files import (
    FolderFrames,
    Numbered,
    boxes_of,
    folders_in,
    listed_frames,
    require_same,
    with_area,
)
from peft_vision.tracking.sequence_set import LazySequences, SequenceSet, opened_now
from peft_vision.tracking.sequences import TrackingSequence

NAME = "trackingnet"
DIALECT = "trackingnet"
SPLITS = ("train", "test")

CHUNKS = {"train": tuple(f"TRAIN_{number}" for number in range(12)), "test": ("TEST",)}


def recognizes(root: Path) -> bool:
    """Whether one of the chunks is there, with its groundtruth."""
    return any(_chunks(root).values())


def read(root: Path, split: str | None) -> SequenceSet:
    """Read a split out of the chunks that are there; without a split: test, else train.

    The training split is opened lazily; its sequences without a folder of frames are left out.

    Raises:
        DataError: no chunk of the split is there, or no sequence can be used.
    """
    chunks = _chunks(root)
    chosen = split or ("test" if chunks["test"] else "train")
    if not chunks.get(chosen):
        found = [folder.name for folder in folders_in(root)]
        raise DataError(
            f"{root} has no anno folder in {', '.join(CHUNKS.get(chosen, (chosen,)))}; found: "
            f"{', '.join(found[:20]) or 'no folder'}."
        )
    places = {name: chunk for chunk in chunks[chosen] for name in _names(chunk)}
    if chosen == "test":
        sequences, broken = opened_now(places, lambda name: _listed(places[name], name), str(root))
        return SequenceSet(NAME, chosen, sequences, DIALECT, broken)
    there = {
        chunk: {path.name for path in folders_in(chunk / "frames")} for chunk in chunks[chosen]
    }
    names = [name for name, chunk in places.items() if name in there[chunk]]
    absent = {name: _no_frames(places[name], name) for name in places.keys() - set(names)}
    if not names:
        raise DataError(next(iter(absent.values()), f"{root} lists no sequence."))
    files = [places[name] / "anno" / f"{name}.txt" for name in names]
    lazily = LazySequences(names, partial(_for_training, files))
    return SequenceSet(NAME, chosen, lazily, DIALECT, dict(sorted(absent.items())))


def _chunks(root: Path) -> dict[str, list[Path]]:
    return {
        split: [root / name for name in names if (root / name / "anno").is_dir()]
        for split, names in CHUNKS.items()
    }


def _names(chunk: Path) -> list[str]:
    return sorted(path.stem for path in (chunk / "anno").iterdir() if path.suffix == ".txt")


def _no_frames(chunk: Path, name: str) -> str:
    message = f"There is no folder {chunk / 'frames' / name}."
    packed = chunk / "zips" / f"{name}.zip"
    return f"{message} Unpack {packed} into it." if packed.is_file() else message


def _listed(chunk: Path, name: str) -> TrackingSequence:
    if not (chunk / "frames" / name).is_dir():
        raise DataError(_no_frames(chunk, name))
    frames = listed_frames(chunk / "frames" / name)
    boxes = boxes_of(chunk / "anno" / f"{name}.txt")
    if len(boxes) > 1:
        require_same(name, len(frames), len(boxes))
    return TrackingSequence(name, frames, boxes, with_area(boxes))


def _for_training(files: Sequence[Path], index: int) -> TrackingSequence:
    """The folder is not listed: there is a frame per row, and reading a missing one says so."""
    file = files[index]
    boxes = boxes_of(file)
    folder = file.parent.parent / "frames" / file.stem
    frames = FolderFrames(folder, Numbered("{}.jpg", 0, len(boxes)))
    return TrackingSequence(file.stem, frames, boxes, with_area(boxes))
