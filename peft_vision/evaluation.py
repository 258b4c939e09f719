"""How good a saved model is on a folder of labeled images."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vision.data import preprocessing
from peft_vision.data.source import open_for_evaluation
from peft_vision.errors import BadSetting, DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peft_vision.data.images import LabeledImages


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one set of images; accuracies are fractions in [0, 1].

    Attributes:
        n: images evaluated.
        top1: fraction whose most likely class is right.
        standard_error: of `top1`, from the count alone.
        top5: with more than five classes.
        loss: mean cross entropy, in nats.
        majority: what always answering the most frequent class of these images would reach.
        classes: how many classes the model tells apart.
        skipped: unreadable images that were left out.
    """

    n: int
    top1: float
    standard_error: float
    top5: float | None
    loss: float
    majority: float
    classes: int
    data: str
    skipped: tuple[str, ...] = ()


def evaluate(
    model: str | Path | nn.Module,
    data: str | Path | LabeledImages,
    *,
    batch_size: int = 64,
    split: str | None = None,
    on_bad_image: str = "refuse",
    device: str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a model with the preprocessing that is stored with it.

    Args:
        model: a folder written by `save_pretrained`, or such a model in memory.
        data: a source as in a recipe (image folder, `datasets` folder or id, demo/<name>). The
            validation split is used where there is one, else all images.
        batch_size: images at a time.
        split: name of another split.
        on_bad_image: `refuse` or `skip`.
        device: such as `cpu`; None: a GPU where there is one.
        progress: show a bar on standard error.

    Raises:
        DataError: the data cannot be read, or have classes that the model was not trained on.
        BadSetting: the batch size is not positive, or the model has no preprocessing stored.
        ArtifactError: the folder cannot be loaded.
    """
    import torch

    if batch_size < 1:
        raise BadSetting(f"The batch size is {batch_size}; 1 or more works.")
    images = _images(data, split, on_bad_image)
    loaded = _model(model)
    images = _relabeled(images, loaded.history.labels)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    logits = _logits(loaded, images, batch_size, where, progress=progress)
    return _figures(logits, images)


def _images(
    data: str | Path | LabeledImages, split: str | None, on_bad_image: str
) -> LabeledImages:
    from pydantic import ValidationError

    from peft_vision.data.settings import DataSettings

    if not isinstance(data, (str, Path)):
        return data
    given = {"train": str(data), "validation_split": split, "on_bad_image": on_bad_image}
    try:
        settings = DataSettings.model_validate(given)
    except ValidationError as error:
        raise BadSetting(f"on_bad_image is {on_bad_image!r}; refuse or skip works.") from error
    return open_for_evaluation(settings)


def _model(model: str | Path | nn.Module) -> Any:
    from peft_vision.history import History

    if isinstance(model, (str, Path)):
        from peft_vision.loading import load

        model = load(str(model))
    if not isinstance(getattr(model, "history", None), History):
        raise BadSetting(
            f"A {type(model).__name__} has no record of its labels and preprocessing. A model from "
            "peft_vision.wrap, compress or load works."
        )
    return model


def _relabeled(images: LabeledImages, labels: list[str] | None) -> LabeledImages:
    return images if labels is None else images.relabeled(labels)


def _logits(
    model: Any, images: LabeledImages, batch_size: int, device: Any, *, progress: bool
) -> Tensor:
    """Logits `N C` in float32 on the CPU."""
    import torch
    from rich.console import Console
    from rich.progress import track
    from torch.utils.data import DataLoader

    from peft_vision.data.image_set import ImageSet
    from peft_vision.tasks.classification import logits_of

    if model.history.preprocessing is None:
        raise BadSetting(
            "The model has no preprocessing stored, so images cannot be prepared as in training. "
            "Fine-tune it with peft-vision, or set model.history.preprocessing."
        )
    samples = ImageSet(images, preprocessing.evaluation_transform(model.history.preprocessing))
    model.eval().to(device)
    with torch.inference_mode():
        batches = track(
            DataLoader(samples, batch_size),
            "evaluating",
            console=Console(stderr=True),
            disable=not progress,
        )
        outputs = (model(batch["pixel_values"].to(device)) for batch in batches)
        return torch.cat([logits_of(output).float().cpu() for output in outputs])


def _figures(logits: Tensor, images: LabeledImages) -> Evaluation:
    import torch

    from peft_vision.tasks.classification import accuracy

    targets = torch.tensor(images.targets)
    classes = logits.shape[1]
    if int(targets.max()) >= classes:
        raise DataError(
            f"{images.origin} has {len(images.names)} classes and the model {classes} outputs. "
            "Data with the classes that the model was trained on works."
        )
    figures = accuracy(logits, targets)
    count, top1 = len(images), figures["top1"]
    return Evaluation(
        n=count,
        top1=top1,
        standard_error=math.sqrt(top1 * (1 - top1) / count),
        top5=figures.get("top5"),
        loss=figures["loss"],
        majority=Counter(images.targets).most_common(1)[0][1] / count,
        classes=classes,
        data=images.origin,
        skipped=images.skipped,
    )
