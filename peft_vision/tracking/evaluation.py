"""How good a tracker is on a data set, and the files that a server asks for."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from peft_vision.errors import BadSetting, DataError
from peft_vision.files import refuse_existing, staged_folder, write_json_atomic
from peft_vision.tracking import submission
from peft_vision.tracking.following import Followed, Follower, follow_all
from peft_vision.tracking.plots import draw
from peft_vision.tracking.reading import read_sequences
from peft_vision.tracking.scoring import Scoring, TrackingEvaluation, opened
from peft_vision.tracking.sequence_set import SequenceSet
from peft_vision.tracking.sequences import TrackingSequence
from peft_vision.tracking.tracker import Tracker

if TYPE_CHECKING:
    import torch

__all__ = ["TrackingEvaluation", "evaluate"]

RESULTS, FIGURES, ARCHIVE = "results", "figures.json", "submission.zip"


def evaluate(
    model: str | Path | nn.Module | Follower,
    data: str | Path | SequenceSet,
    *,
    kind: str | None = None,
    split: str | None = None,
    dialect: str | None = None,
    batch: int = 1,
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> TrackingEvaluation:
    """Follow every sequence from its first box, and score what was found.

    Each sequence is followed once, without being started again. One that is broken is left out, and
    the others go on; it is listed at the end, under `skipped`.

    Args:
        model: a folder or repository with a tracker, such a model, or anything with start and step.
        data: a folder, "demo/tracking", or what `read_sequences` gave.
        kind: layout of the folder, a stem of `tracking/datasets/`; None: recognized.
        split: of the folder; None: the one that is evaluated on.
        dialect: of the figures, one of `metrics.DIALECTS`; None: what is usual for the data.
        batch: how many sequences go through the model together; speed is one's own at 1 alone.
        output: folder for results/, figures.json, the archive for a server (GOT-10k, TrackingNet)
            and, where matplotlib is installed, plots. Written at the end, as a whole.
        overwrite: replace an output that is there.
        device: such as `cpu`; None: a GPU where there is one.
        progress: show a bar on standard error.

    Raises:
        BadSetting: the model is no tracker, the batch is below 1, the data have no motion (images),
            or have no labels and there is no output to write results into.
        DataError: the data cannot be read, or no sequence could be evaluated.
        UnknownName: there is no such kind or dialect.
        OutputExists: the output holds something. CannotWrite: the disk is full or closed.
    """
    target = None if output is None else Path(output).expanduser()
    if target is not None:
        refuse_existing(target, overwrite=overwrite)
    if batch < 1:
        raise BadSetting(f"batch is {batch}; 1 or more sequences go through the model together.")
    chosen = _chosen(data, kind, split)
    scoring = Scoring(chosen.kind, dialect or chosen.dialect)
    sequences, skipped = opened(chosen)
    origin = chosen.kind if isinstance(data, SequenceSet) else str(data)
    _require_use(sequences, origin, target)
    tracker = _follower(model, device)
    followed, broken = follow_all(tracker, sequences, batch=batch, progress=progress)
    by_name = {sequence.name: sequence for sequence in sequences}
    for one in followed:
        scoring.add(by_name[one.name], one.boxes, one.seconds)
    found = replace(scoring.result(origin, chosen.split, {**skipped, **broken}), batch=batch)
    if target is None:
        return found
    found = _with_notes(found, target)
    _save(found, followed, target, _called(model), overwrite=overwrite)
    return found


def _chosen(data: str | Path | SequenceSet, kind: str | None, split: str | None) -> SequenceSet:
    if not isinstance(data, SequenceSet):
        return read_sequences(data, kind, split)
    if kind is not None or split is not None:
        raise BadSetting(
            f"kind is {kind} and split is {split}; they choose what of a folder is read, and the "
            "sequences are given. Leave them out, or give the folder."
        )
    return data


def _require_use(sequences: Sequence[TrackingSequence], origin: str, target: Path | None) -> None:
    """Say before hours are spent that nothing would come of it."""
    if not sequences:
        raise DataError(f"{origin} has no sequence that can be opened.")
    submission.check_names(sequence.name for sequence in sequences)
    if all(len(sequence.frames) == 1 for sequence in sequences):
        raise BadSetting(
            f"{origin} has images, not videos: every sequence is one frame long, and its box is "
            "given to the tracker. Possible: GOT-10k, LaSOT, TrackingNet, TNL2K, OTB, your own "
            "videos, demo/tracking."
        )
    if target is None and not any(sequence.labeled for sequence in sequences):
        raise BadSetting(
            f"{origin} has labels of first frames alone, so there is nothing to score. Say where "
            "results shall be written: output=... (--output FOLDER)."
        )


def _follower(
    model: str | Path | nn.Module | Follower, device: str | torch.device | None
) -> Follower:
    if isinstance(model, str | Path | nn.Module):
        return Tracker(model, device=device)
    return model


def _called(model: str | Path | nn.Module | Follower) -> str:
    """What to call the tracker in a legend."""
    return Path(model).name if isinstance(model, str | Path) else type(model).__name__


def _with_notes(found: TrackingEvaluation, target: Path) -> TrackingEvaluation:
    if found.kind not in submission.ARCHIVED:
        return found
    note = f"{target / ARCHIVE} holds {found.sequences} sequences in the form the server takes."
    if found.skipped:
        note += f" It lacks {len(found.skipped)} that were left out: the server may refuse it."
    return replace(found, notes=(*found.notes, note))


def _save(
    found: TrackingEvaluation,
    followed: Sequence[Followed],
    target: Path,
    name: str,
    *,
    overwrite: bool,
) -> None:
    with staged_folder(target, overwrite=overwrite) as stage:
        submission.write_results(followed, stage / RESULTS, found.kind)
        if found.kind in submission.ARCHIVED:
            submission.write_archive(followed, stage / ARCHIVE, found.kind)
        write_json_atomic(stage / FIGURES, found.to_json())
        if importlib.util.find_spec("matplotlib") is not None and found.curves:
            draw({name: found}, stage)
