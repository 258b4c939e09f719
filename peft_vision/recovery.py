"""Recovery: what compression cost is learned back, from the labels and from the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from peft_vision.compressed import CompressedModel
from peft_vision.cost import input_size, unwrap
from peft_vision.data import preprocessing
from peft_vision.data.image_set import ImageSet
from peft_vision.data.settings import Augmentation, DataSettings
from peft_vision.data.source import Split, open_split
from peft_vision.errors import BadSetting
from peft_vision.history import History
from peft_vision.tasks.classification import Classification, Distillation
from peft_vision.training.fit import fit
from peft_vision.training.settings import TrainSettings


def recover(
    model: CompressedModel,
    teacher: nn.Module,
    data: str | Path | Split,
    *,
    epochs: int = 3,
    batch_size: int = 32,
    learning_rate: float = 3e-5,
    weight: float = 0.7,
    temperature: float = 2.0,
    seed: int = 0,
    settings: TrainSettings | None = None,
    augmentation: Augmentation | None = None,
    keep_better: bool = True,
) -> dict[str, float]:
    """Fine-tune a compressed model in place with the dense one's logits (Hinton et al., 2015).

    Args:
        model: all its parameters are trained.
        teacher: the model that went into `compress`, with the same classes.
        data: an image folder, a data set's name, or images that are open already.
        epochs, batch_size, learning_rate: of the training; or give `settings` whole.
        weight: of the teacher's term in the loss, in [0, 1]; the labels' term gets the rest.
        temperature: softens both distributions, above 0.
        keep_better: where training has not lowered the loss on the validation images, the weights
            stay as they were: a model that was fitted well has little to recover.

    Returns:
        The validation figures, also written to ``model.history.metrics``; `kept` says whether what
        was trained was kept (1.0) or not (0.0).

    Raises:
        DataError: the images cannot be used. BadSetting: the teacher has other outputs, or the
            model does something else than to tell classes apart.
    """
    inner = unwrap(model)
    size = input_size(inner)[1]
    history, taught = History.of(model), History.of(teacher)
    require_classes(history)
    split = data if isinstance(data, Split) else open_split(DataSettings(train=str(data)), seed)
    _same_classes(taught, split)
    described = history.preprocessing or taught.preprocessing
    described = described or dict(preprocessing.of_model(inner, "", size))
    # All of a compressed model is trained: what its adapters had frozen is free again.
    inner.requires_grad_(True)
    figures = fit(
        model,
        Classification(distillation=Distillation(weight, temperature)),
        ImageSet(
            split.train,
            preprocessing.training_transform(described, augmentation or Augmentation()),
            seed,
        ),
        ImageSet(split.validation, preprocessing.evaluation_transform(described)),
        settings
        or TrainSettings(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            warmup=0.1,
            weight_decay=0.0,
        ),
        teacher=teacher,
        seed=seed,
        keep_better=keep_better,
    )
    _record(model, described, split, figures)
    return figures


def require_classes(history: History) -> None:
    """Refuse a model that recovery has nothing to teach.

    Raises:
        BadSetting: it was made for another task.
    """
    if history.task is not None:
        raise BadSetting(
            f"The model is made for {history.task['name']}, and recovery teaches classes. Compress "
            "without it (--recover-epochs 0), with images to fit what stays on (--data)."
        )


def _same_classes(taught: History, split: Split) -> None:
    if taught.labels is not None and list(taught.labels) != split.names:
        raise BadSetting(
            f"The dense model knows the classes {', '.join(taught.labels[:10])}; the images have "
            f"{', '.join(split.names[:10])}. Recover on images of the same classes."
        )


def _record(
    model: CompressedModel, described: Any, split: Split, figures: dict[str, float]
) -> None:
    history = model.history
    history.preprocessing = dict(described)
    history.labels = split.names
    behind = {"n": len(split.validation), "data": split.validation.origin}
    for name in ("top1", "top5", "loss"):
        if name in figures:
            history.metrics[name] = {"value": figures[name], **behind}
