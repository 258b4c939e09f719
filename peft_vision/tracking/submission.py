"""Files of results: one text per sequence, in the form that the data set's own toolkit reads.

GOT-10k: ``<sequence>/<sequence>_001.txt`` and ``<sequence>_time.txt`` beside it. All others:
``<sequence>.txt``, with times in ``times/<sequence>_time.txt``. A row is x, y, w, h in pixels with
three decimals, the first row is the box that was given; LaSOT and OTB count from 1, as their own
ground truth does.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from peft_vision.errors import DataError
from peft_vision.files import staged_folder, writing
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.following import Followed
from peft_vision.tracking.scoring import Scoring, TrackingEvaluation, opened
from peft_vision.tracking.sequence_set import SequenceSet
from peft_vision.tracking.sequences import TrackingSequence

FIRST_PIXEL = {"lasot": 1.0, "otb": 1.0}
"""What the toolkits of these sets call the first pixel; 0 for all others."""

ARCHIVED = ("got10k", "trackingnet")
"""Sets with a server that takes an archive."""

_ENTRY = (1980, 1, 1, 0, 0, 0)  # the same results are the same archive, byte for byte


def write_results(
    followed: Iterable[Followed], folder: Path, kind: str, *, overwrite: bool = False
) -> None:
    """Write the files of results; the folder is there once all of them are.

    Args:
        kind: of the data set, a stem of `datasets/`.
        overwrite: replace a folder that is there.

    Raises:
        DataError: a sequence's name cannot be the name of a file, or two have the same.
        OutputExists: the folder holds something. CannotWrite: the disk is full or closed.
    """
    with staged_folder(folder, overwrite=overwrite) as stage:
        for path, content in _files(followed, kind):
            (stage / path).parent.mkdir(parents=True, exist_ok=True)
            (stage / path).write_text(content, encoding="ascii")


def write_archive(followed: Iterable[Followed], path: Path, kind: str) -> None:
    """Write the zip that the server of a data set takes; an older one is replaced in one rename.

    Raises:
        DataError: a sequence's name cannot be the name of a file, or two have the same.
        CannotWrite: the disk is full or closed; an older archive is intact.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in _files(followed, kind):
                    if kind == "got10k" or name.parent == Path():
                        archive.writestr(zipfile.ZipInfo(name.as_posix(), _ENTRY), content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def check_names(names: Iterable[str]) -> None:
    """Say before anything is followed that results could not be written.

    Raises:
        DataError: a name is not one of a file, or two are the same.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"Two sequences are named {name}; files of results have one name each.")
        if not name or name != Path(name).name or name.startswith("."):
            raise DataError(
                f"{name!r} cannot be the name of a file of results. Names without / that do not "
                "begin with a dot work."
            )
        seen.add(name)


def read_result(folder: Path, name: str, kind: str) -> tuple[Array, Array | None]:
    """Boxes N 4, counted from 0, and seconds N of one sequence; no seconds where no file has them.

    Args:
        folder: with files of results, ours or another tracker's. `kind`: as it was written.

    Raises:
        DataError: the file is missing, or its rows are not four numbers.
    """
    boxes_at, times_at = _places(name, kind)
    boxes = _numbers(folder / boxes_at, "x, y, w, h")
    if boxes.shape[1] != 4:
        raise DataError(
            f"{folder / boxes_at} has {boxes.shape[1]} numbers per line; x, y, w, h are four."
        )
    boxes[:, :2] -= FIRST_PIXEL.get(kind, 0.0)
    if not (folder / times_at).is_file():
        return boxes, None
    return boxes, _numbers(folder / times_at, "seconds")[:, 0]


def figures_of(
    folder: str | Path, data: SequenceSet, dialect: str | None = None
) -> TrackingEvaluation:
    """Figures of results that are stored, without a tracker: ours or those that others publish.

    Args:
        folder: with files of results of `data`'s kind.
        data: the ground truth; frames are only looked at where GOT-10k needs their size.
        dialect: one of `metrics.DIALECTS`; None: the one that is usual for the data.

    Returns:
        The evaluation; sequences without a file, or with a broken one, are under `skipped`.

    Raises:
        UnknownName: there is no such dialect.
        DataError: no sequence could be scored.
    """
    path = Path(folder).expanduser()
    scoring = Scoring(data.kind, dialect or data.dialect)
    sequences, skipped = opened(data)
    for sequence in sequences:
        try:
            boxes, seconds = read_result(path, sequence.name, data.kind)
        except DataError as error:
            skipped[sequence.name] = str(error)
            continue
        scoring.add(sequence, _cut(boxes, sequence, data.kind), seconds)
    return scoring.result(str(folder), data.split, skipped)


def _cut(boxes: Array, sequence: TrackingSequence, kind: str) -> Array:
    """A sequence of LaSOT has more frames than rows, so results of others may be longer."""
    return boxes[: len(sequence.boxes)] if kind == "lasot" and sequence.labeled else boxes


def _files(followed: Iterable[Followed], kind: str) -> list[tuple[Path, str]]:
    done = list(followed)
    check_names(one.name for one in done)
    found: list[tuple[Path, str]] = []
    for one in done:
        boxes = np.array(one.boxes, dtype=np.float64)
        boxes[:, :2] += FIRST_PIXEL.get(kind, 0.0)
        boxes_at, times_at = _places(one.name, kind)
        found.append((boxes_at, _lines(boxes, "{:.3f}")))
        found.append((times_at, _lines(np.asarray(one.seconds)[:, None], "{:.8f}")))
    return found


def _places(name: str, kind: str) -> tuple[Path, Path]:
    """Where boxes and times of a sequence lie."""
    if kind == "got10k":
        return Path(name) / f"{name}_001.txt", Path(name) / f"{name}_time.txt"
    return Path(f"{name}.txt"), Path("times") / f"{name}_time.txt"


def _lines(rows: Array, form: str) -> str:
    return "".join(",".join(form.format(value) for value in row) + "\n" for row in rows)


def _numbers(file: Path, what: str) -> Array:
    """Rows of numbers between commas, tabs or spaces: N and as many as the lines hold."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"There are no results in {file} that can be read: {error}.") from error
    rows = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    try:
        found = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{file} does not hold {what} on each line: {error}.") from error
    if not len(found):
        raise DataError(f"{file} is empty.")
    return found
