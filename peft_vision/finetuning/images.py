"""A run on labeled images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_vision.backbones import view
from peft_vision.data import preprocessing
from peft_vision.data.image_set import ImageSet, batches_of
from peft_vision.data.settings import DataSettings
from peft_vision.data.source import open_split
from peft_vision.errors import DataError, RecipeError
from peft_vision.finetuning.job import Job, Learning, plain_model, wrapped
from peft_vision.history import History
from peft_vision.loading import load
from peft_vision.memory.rehearsal import Rehearsal
from peft_vision.recipe import ModelSettings, Recipe, TaskSettings
from peft_vision.sources import create_model
from peft_vision.tasks.classification import Classification, Distillation, check_outputs
from peft_vision.training import identity

if TYPE_CHECKING:
    from peft_vision.data.images import LabeledImages
    from peft_vision.data.source import Split


class ImagesJob(Job):
    """Classification.

    Args:
        data: images, where they are open already.
    """

    def __init__(self, recipe: Recipe, data: Split | None = None) -> None:
        self.recipe = recipe
        self.settings, self.task = sections(recipe)
        self.data = data or open_split(self.settings, recipe.seed)
        self.notes = self.data.notes

    def identity(self) -> dict[str, Any]:
        """Counts and digests."""
        return identity.of_data(self.data)

    def build(self) -> Any:
        """With the classes of the data."""
        return build(self.recipe, self.data.names, self.data.train)

    def rehearsal(self, model: Any, processes: int) -> Rehearsal:
        """One step on images."""
        size = model.history.preprocessing["size"]
        task, teacher = _task(self.task, model.history.labels)
        return Rehearsal(model, (3, size, size), task, teacher, processes=processes)

    def learning(self, model: Any) -> Learning:
        """Augmented images to train on, plain ones to validate on."""
        described = model.history.preprocessing
        augmented = preprocessing.training_transform(described, self.settings.augmentation)
        plain = preprocessing.evaluation_transform(described)
        task, teacher = _task(self.task, self.data.names)
        train = ImageSet(self.data.train, augmented, self.recipe.seed)
        return Learning(model, task, train, ImageSet(self.data.validation, plain), teacher)

    def records(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Accuracies and loss."""
        behind = {"n": len(self.data.validation), "data": self.data.validation.origin}
        kept = {name: value for name, value in metrics.items() if name in ("top1", "top5", "loss")}
        return {name: {"value": value, **behind} for name, value in kept.items()}


def build(recipe: Recipe, labels: Sequence[str], data: LabeledImages | None = None) -> Any:
    """The recipe's model with its methods, its labels and its preprocessing, untrained.

    Args:
        recipe: a recipe on images.
        labels: class names; the head gets as many outputs.
        data: training images, for methods that decide by data.

    Raises:
        UnknownName, BadSetting, UnsupportedSite, GradientMissing: model or method does not fit.
    """
    plain, (settings, _) = plain_model(recipe, len(labels)), sections(recipe)
    size = view(plain).input_size
    described = preprocessing.of_model(plain, recipe.model.name, size[-1] if size else None)
    if settings.image_size is not None:
        described = {**described, "size": settings.image_size}
    batches = (
        None if data is None else batches_of(data, preprocessing.evaluation_transform(described))
    )
    model = wrapped(plain, recipe, batches)
    model.history.labels = list(labels)
    model.history.preprocessing = described
    check_outputs(model, described["size"], len(labels))
    return model


def sections(recipe: Recipe) -> tuple[DataSettings, TaskSettings]:
    """What a recipe on labeled images says of its data and its task.

    Raises:
        RecipeError: it is of another task.
    """
    if isinstance(recipe.data, DataSettings) and isinstance(recipe.task, TaskSettings):
        return recipe.data, recipe.task
    raise RecipeError(f"A recipe of the task {recipe.task.name} is not one on labeled images.")


def _task(wanted: TaskSettings, labels: Sequence[str]) -> tuple[Classification, nn.Module | None]:
    if wanted.distillation is None:
        return Classification(wanted.label_smoothing), None
    how = Distillation(wanted.distillation.weight, wanted.distillation.temperature)
    teacher = _teacher(wanted.distillation.teacher, labels)
    return Classification(wanted.label_smoothing, how), teacher


def _teacher(name: str, labels: Sequence[str]) -> nn.Module:
    """A saved folder with the same classes in the same order, or a model by name.

    Raises:
        DataError: the teacher knows other classes.
    """
    if not Path(name).exists():
        return create_model(name, **ModelSettings(name=name).arguments(len(labels)))
    loaded: nn.Module = load(name)
    known: list[str] | None = History.of(loaded).labels
    if known is not None and list(known) != list(labels):
        raise DataError(
            f"The teacher {name} knows the classes {', '.join(known[:10])}, the data have "
            f"{', '.join(list(labels)[:10])}. A teacher with the same classes in order works."
        )
    return loaded
