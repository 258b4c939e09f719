"""`estimate_memory`: what training a recipe, or a model, takes, before anything is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from peft_vision.backbones import view
from peft_vision.compressed import CompressedModel
from peft_vision.cost import input_size, unwrap
from peft_vision.data.settings import DataSettings
from peft_vision.errors import BadSetting
from peft_vision.history import History
from peft_vision.loading import load
from peft_vision.memory.figures import MemoryEstimate
from peft_vision.memory.rehearsal import Loss, Rehearsal
from peft_vision.recipe import (
    LoadedRecipe,
    MethodSettings,
    ModelSettings,
    Recipe,
    TaskSettings,
    load_recipe,
)
from peft_vision.sources import create_model
from peft_vision.tasks.classification import Classification, Distillation
from peft_vision.tracking.geometry import NAME as TRACKING
from peft_vision.tracking.model import TrackingModel
from peft_vision.tracking.task import Tracking
from peft_vision.training.settings import TrainSettings
from peft_vision.wrapping import wrap

NONE = "none"

CLASSES = 1000
"""Outputs of the classifier where nobody has counted the classes yet."""


def estimate_memory(
    recipe_or_model: Recipe | LoadedRecipe | str | Path | nn.Module,
    *,
    batch_size: int | None = None,
    settings: TrainSettings | None = None,
    image_size: tuple[int, int] | int | None = None,
    classes: int = CLASSES,
    loss: Loss | None = None,
    processes: int = 1,
) -> MemoryEstimate:
    """What a training step holds when it holds the most, counted without a GPU or weights.

    The model of a recipe is built without numbers and nothing is downloaded but, for transformers
    models that are not on disk, their configuration. One optimizer step is run on tensors that have
    shapes and no numbers, in bf16 (as `precision: auto` chooses on a GPU) unless the settings say
    fp32.

    Args:
        recipe_or_model: a recipe, a file or name of one, or a model, plain or wrapped; the latter
            is not changed.
        batch_size: images per pass, with no accumulation; in place of what the settings say.
        settings: how to train; by default the recipe's.
        image_size: in pixels, for models and recipes that do not say it.
        classes: outputs of a recipe's classifier.
        loss: (model, images per pass) -> loss, for models that take something else than a batch of
            images, as `Streams` do; what it makes are tensors without numbers.
        processes: how many share the batch.

    Raises:
        RecipeError, UnknownName, BadSetting, UnsupportedSite: the recipe or model does not fit.
        BadSetting: the model or a method needs numbers, so that it cannot be estimated.
        ArtifactError: the configuration of a transformers model cannot be had.
    """
    if isinstance(recipe_or_model, nn.Module):
        model = recipe_or_model
        size = input_size(unwrap(model), image_size)
        rehearsal = Rehearsal(model, size, processes=processes, loss=loss)
        wanted = settings or TrainSettings(batch_size=batch_size or 1)
    else:
        recipe = recipe_of(recipe_or_model)
        rehearsal = rehearsal_of(recipe, classes, image_size, processes, loss)
        wanted = settings or recipe.train
    if batch_size is not None:
        wanted = wanted.model_copy(
            update={"batch_size": batch_size * processes, "micro_batch": None}
        )
    return rehearsal.run(wanted)


def recipe_of(recipe: Recipe | LoadedRecipe | str | Path) -> Recipe:
    """The recipe itself, of whatever names one."""
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe)
    return recipe.recipe if isinstance(recipe, LoadedRecipe) else recipe


def rehearsal_of(
    recipe: Recipe,
    classes: int = CLASSES,
    image_size: tuple[int, int] | int | None = None,
    processes: int = 1,
    loss: Loss | None = None,
) -> Rehearsal:
    """A recipe's run, built without numbers and ready to be rehearsed under any settings.

    Raises:
        UnknownName, BadSetting, UnsupportedSite: the model or a method does not fit, or a method
            needs numbers.
        ArtifactError: the configuration of a transformers model cannot be had.
    """
    with torch.device("meta"):
        outputs = recipe.model.arguments(0 if recipe.task.name == TRACKING else classes)
        plain = create_model(recipe.model.name, pretrained=False, **outputs)
    size = input_size(plain, image_size or _side(recipe))
    # Where it came from, its weights and its cost, which take long to find out, are not asked for.
    model: nn.Module = CompressedModel(plain, History(fingerprint=NONE, before={}))
    for entry in recipe.methods:
        model = _wrapped(model, entry, recipe)
    if not isinstance(recipe.task, TaskSettings):
        size = input_size(unwrap(model))
        return Rehearsal(TrackingModel(model), size, Tracking(), None, processes, loss, classes)
    task, teacher = Classification(recipe.task.label_smoothing), None
    wanted = recipe.task.distillation
    if wanted is not None:
        how = Distillation(wanted.weight, wanted.temperature)
        task = Classification(recipe.task.label_smoothing, how)
        teacher = _teacher(wanted.teacher, classes)
    return Rehearsal(model, size, task, teacher, processes, loss, classes)


def _side(recipe: Recipe) -> int | None:
    """Pixels of the images, where the recipe says so."""
    return recipe.data.image_size if isinstance(recipe.data, DataSettings) else None


def _wrapped(model: nn.Module, entry: MethodSettings, recipe: Recipe) -> nn.Module:
    size = None if view(unwrap(model)).input_size else _side(recipe)
    try:
        with torch.device("meta"):
            wrapped: nn.Module = wrap(model, entry.name, image_size=size, **entry.settings)
    except (NotImplementedError, RuntimeError) as error:
        raise BadSetting(
            f"The memory of a run with {entry.name} cannot be estimated from the recipe: it "
            f"decides by the weights or by data ({str(error).splitlines()[0]}). Estimate the "
            "wrapped model instead: peft_vision.estimate_memory(model, settings=...)."
        ) from error
    return wrapped


def _teacher(name: str, classes: int) -> nn.Module:
    """The teacher without numbers; one in a saved folder is loaded as it is."""
    if Path(name).exists():
        teacher: nn.Module = load(name)
        return teacher
    with torch.device("meta"):
        return create_model(name, pretrained=False, **ModelSettings(name=name).arguments(classes))
