"""A run on pairs of frames: a tracker learns to find its target again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from peft_vision.backbones import view
from peft_vision.cost import input_size, unwrap
from peft_vision.data import preprocessing
from peft_vision.errors import DataError, RecipeError
from peft_vision.finetuning.job import Job, Learning, plain_model, wrapped
from peft_vision.memory.rehearsal import Rehearsal
from peft_vision.recipe import Recipe
from peft_vision.tracking.geometry import NAME
from peft_vision.tracking.model import TrackingModel
from peft_vision.tracking.pairs import Pairs
from peft_vision.tracking.reading import SequenceSet, read_for_training, read_sequences
from peft_vision.tracking.settings import PairSettings, SourceSettings, TrackingSettings
from peft_vision.tracking.task import Tracking

Weighted = list[tuple[SequenceSet, float]]


class PairsJob(Job):
    """Tracking."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        if not isinstance(recipe.data, PairSettings) or not isinstance(
            recipe.task, TrackingSettings
        ):
            raise RecipeError(f"A recipe of the task {recipe.task.name} is not one on pairs.")
        self.settings, self.task = recipe.data, recipe.task
        self.train, self.validation = _opened(self.settings)
        self.notes = (
            f"Training on {_said(self.train)}; validating on {_said(self.validation)}.",
            *_notes([*self.train, *self.validation]),
        )

    def identity(self) -> dict[str, Any]:
        """Counts, and digests of names."""
        parts = {"train": self.train, "validation": self.validation}
        return {"sequences": {name: _digest(sources) for name, sources in parts.items()}}

    def build(self) -> Any:
        """With the sizes of its crops and its normalization."""
        plain = plain_model(self.recipe, 0)
        size = view(plain).input_size
        described = preprocessing.of_model(
            plain, self.recipe.model.name, size[-1] if size else None
        )
        model = wrapped(plain, self.recipe, None)
        model.history.task = self.task.geometry.to_json()
        side = TrackingModel(model).sides[1]
        model.history.preprocessing = {**described, "size": side}
        return model

    def rehearsal(self, model: Any, processes: int) -> Rehearsal:
        """One step on pairs."""
        size = input_size(unwrap(model))
        return Rehearsal(TrackingModel(model), size, Tracking(), processes=processes)

    def learning(self, model: Any) -> Learning:
        """Augmented pairs to train on, plain ones to validate on."""
        tracker, data = TrackingModel(model), self.settings
        shared: dict[str, Any] = {
            "sides": tracker.sides,
            "grid": tracker.grids[0],
            "geometry": tracker.geometry,
            "normalization": tracker.normalization,
            "gap": data.gap,
            "seed": self.recipe.seed,
        }
        train = Pairs(self.train, count=data.pairs, augmentation=data.augmentation, **shared)
        plain = Pairs(self.validation, count=data.validation_pairs, augmentation=None, **shared)
        return Learning(tracker, Tracking(), train, plain)

    def records(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Overlap of the best box with the true one, on pairs."""
        names = ", ".join(dict.fromkeys(data.kind for data, _ in self.validation))
        behind = {"n": self.settings.validation_pairs, "data": f"pairs of {names}"}
        kept = {k: v for k, v in metrics.items() if k in ("iou", "auc", "success50")}
        return {name: {"value": value, **behind} for name, value in kept.items()}


def is_tracking(recipe: Recipe) -> bool:
    """Whether a recipe trains a tracker."""
    return recipe.task.name == NAME


def _opened(settings: PairSettings) -> tuple[Weighted, Weighted]:
    train = [_read(source, read_for_training) for source in settings.sources]
    if settings.validation:
        return train, [_read(source, read_sequences) for source in settings.validation]
    parts = [_set_aside(data, weight, settings.validation_fraction) for data, weight in train]
    return [kept for kept, _ in parts], [aside for _, aside in parts]


def _read(source: SourceSettings, read: Callable[..., SequenceSet]) -> tuple[SequenceSet, float]:
    found = read(source.root, source.kind, source.split)
    if not len(found.sequences):
        raise DataError(f"{source.root} ({found.kind}, {found.split}) holds no sequence.")
    return found, source.weight


def _set_aside(
    data: SequenceSet, weight: float, share: float
) -> tuple[tuple[SequenceSet, float], tuple[SequenceSet, float]]:
    """Every so-many-th sequence is kept for validation."""
    count = len(data.sequences)
    if count < 2:
        raise DataError(
            f"{data.kind} has {count} sequence, so none can be set aside to validate on. Give more "
            "sequences, or data.validation."
        )
    step = max(2, round(1 / share))
    aside = set(range(step // 2, count, step)) or {count - 1}
    kept = [i for i in range(count) if i not in aside]
    return (data.only(kept), weight), (data.only(sorted(aside)), weight)


def _said(sources: Weighted) -> str:
    return ", ".join(f"{len(data.sequences)} of {data.kind}/{data.split}" for data, _ in sources)


def _notes(sources: Weighted) -> list[str]:
    said = []
    for data, _ in sources:
        if data.broken:
            first = next(iter(data.broken.items()))
            said.append(
                f"{data.kind}: left out {len(data.broken)} sequences; first {first[0]}: {first[1]}"
            )
    return list(dict.fromkeys(said))


def _digest(sources: Weighted) -> str:
    words = "".join(
        f"{data.kind}/{data.split}:{len(data.sequences)}*{weight};" for data, weight in sources
    )
    count = sum(len(data.sequences) for data, _ in sources)
    return f"{count} sequences ({hashlib.sha256(words.encode()).hexdigest()[:12]})"
