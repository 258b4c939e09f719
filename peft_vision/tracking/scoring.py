"""From boxes of a data set to its figures, in the dialect that is usual for it or another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from peft_vision.errors import DataError
from peft_vision.lookup import unknown
from peft_vision.tracking import metrics
from peft_vision.tracking._measures import Curve
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.metrics import Scored
from peft_vision.tracking.sequence_set import LazySequences, SequenceSet
from peft_vision.tracking.sequences import TrackingSequence

WITH_FLAGS = {"lasot": "miss", "lasot_ext": "hit"}
"""Kinds of data whose flags of visibility count, and what a hidden frame is in P_norm."""

NO_LABELS = "No sequence has a box for every frame, so there are no figures."


@dataclass(frozen=True)
class TrackingEvaluation:
    """Figures of one tracker on one data set.

    Attributes:
        figures: of the data set, by name: SUC, P, P_norm, OP50, OP75 ("otb"), AO, SR50, SR75
            ("got10k"), SUC, P, P_norm, OP50 ("toolkit"), all fractions in [0, 1]; SUC, P, P_norm
            ("trackingnet") in [0, 100]. Empty where the labels are not public.
        per_sequence: the same of each sequence that was scored.
        curves: of the data set: "success", "precision", "normalized_precision".
        skipped: name -> message of the sequences that were left out.
        unlabeled: names of those that were followed and have no labels to score.
        sequences: how many were followed. `frames`: of them, the first of each included.
        scored: how many sequences are in the figures.
        fps: frames per second as one waits for them, 1 / mean(t) over all frames but the first of
            each sequence, without reading and decoding; None where no time is known.
        fps_mean_of_rates: mean(1 / t) over the same, as the GOT-10k toolkit has it.
        dialect: of the figures. `kind`, `split`: of the data. `data`: as it was asked for.
        batch: how many sequences went through the model together; None: not known.
        notes: what else is to be said.
    """

    figures: dict[str, float]
    per_sequence: dict[str, dict[str, float]]
    curves: dict[str, Curve]
    skipped: dict[str, str]
    unlabeled: tuple[str, ...]
    sequences: int
    scored: int
    frames: int
    fps: float | None
    fps_mean_of_rates: float | None
    dialect: str
    kind: str
    split: str
    data: str
    batch: int | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        curves = {
            name: {"thresholds": curve.thresholds.tolist(), "values": curve.values.tolist()}
            for name, curve in self.curves.items()
        }
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        lists = {"unlabeled": list(self.unlabeled), "notes": list(self.notes)}
        return {**plain, "curves": curves, **lists}


@dataclass
class Scoring:
    """Sequences one after another, and what they come to.

    Args:
        kind: of the data, a stem of `datasets/`; it decides whether flags of visibility count.
        dialect: one of `metrics.DIALECTS`.

    Raises:
        UnknownName: there is no such dialect.
    """

    kind: str
    dialect: str
    _scored: dict[str, Scored] = field(default_factory=dict)
    _pool: list[Array] = field(default_factory=list)
    _seconds: list[Array] = field(default_factory=list)
    _skipped: dict[str, str] = field(default_factory=dict)
    _unlabeled: list[str] = field(default_factory=list)
    _frames: int = 0

    def __post_init__(self) -> None:
        """Check the dialect."""
        if self.dialect not in metrics.DIALECTS:
            raise unknown("dialect of tracking metrics", self.dialect, metrics.DIALECTS)

    def add(self, sequence: TrackingSequence, boxes: Array, seconds: Array | None) -> None:
        """One more sequence; where it cannot be scored it is listed with the reason.

        Args:
            boxes: N 4, x y w h, counted from 0.
            seconds: N, or None where they are not known; the first is not used.
        """
        if not sequence.labeled:
            self._unlabeled.append(sequence.name)
        else:
            try:
                self._scored[sequence.name] = self._score(sequence, boxes)
            except DataError as error:
                self._skipped[sequence.name] = str(error)
                return
        self._frames += len(boxes)
        if seconds is not None:
            self._seconds.append(np.asarray(seconds, dtype=np.float64)[1:])

    def result(
        self, data: str, split: str, skipped: Mapping[str, str] | None = None
    ) -> TrackingEvaluation:
        """The figures of all that was added.

        Args:
            skipped: further sequences that were left out.

        Raises:
            DataError: nothing is left.
        """
        left_out = {**(skipped or {}), **self._skipped}
        if not self._scored and not self._unlabeled:
            first = next((f"{name}: {why}" for name, why in left_out.items()), "there is none")
            raise DataError(f"No sequence of {data} could be evaluated. The first: {first}")
        seconds = np.concatenate([np.zeros(0), *self._seconds])
        whole = self._whole()
        return TrackingEvaluation(
            figures=whole.figures,
            per_sequence={name: one.figures for name, one in self._scored.items()},
            curves=whole.curves,
            skipped=left_out,
            unlabeled=tuple(self._unlabeled),
            sequences=len(self._scored) + len(self._unlabeled),
            scored=len(self._scored),
            frames=self._frames,
            fps=metrics.rate_of_mean(seconds),
            fps_mean_of_rates=metrics.mean_of_rates(seconds),
            dialect=self.dialect,
            kind=self.kind,
            split=split,
            data=data,
            notes=() if self._scored else (NO_LABELS,),
        )

    def _whole(self) -> Scored:
        if not self._scored:
            return Scored({}, {})
        if self.dialect == "got10k":
            return metrics.got10k(self._pool)
        return metrics.mean(list(self._scored.values()))

    def _score(self, sequence: TrackingSequence, boxes: Array) -> Scored:
        truth = sequence.boxes
        if self.dialect == "got10k":
            height, width = sequence.frames.read(0).shape[:2]
            cover = sequence.extra.get("cover", sequence.visible)
            found = metrics.got10k_overlaps(boxes, truth, (width, height), cover)
            scored = metrics.got10k([found])
            self._pool.append(found)
            return scored
        if self.dialect == "toolkit":
            return metrics.toolkit(boxes, truth)
        if self.dialect == "trackingnet":
            return metrics.trackingnet(boxes, truth)
        hidden = WITH_FLAGS.get(self.kind)
        if hidden is None:
            return metrics.otb(boxes, truth)
        return metrics.otb(boxes, truth, sequence.visible, hidden=hidden)


def opened(data: SequenceSet) -> tuple[list[TrackingSequence], dict[str, str]]:
    """All sequences of a set that can be opened, and the others: name -> message."""
    found: list[TrackingSequence] = []
    left_out = dict(data.broken)
    for index in range(len(data)):
        try:
            sequence = data.sequences[index]
        except DataError as error:
            left_out[_name(data.sequences, index)] = str(error)
            continue
        found.append(sequence)
    return found, left_out


def _name(sequences: Sequence[TrackingSequence], index: int) -> str:
    if isinstance(sequences, LazySequences):
        return sequences.names[index]
    return f"sequence {index}"
