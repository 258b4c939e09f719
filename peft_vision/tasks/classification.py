"""One label per image: cross entropy, and optionally the softened logits of a teacher.

Distillation: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_vision.errors import BadSetting, UnsupportedBackbone
from peft_vision.tasks.task import Batch, Task


@dataclass(frozen=True)
class Distillation:
    """Learn from a teacher's logits.

    Attributes:
        weight: of the teacher's term, in [0, 1]; the labels' term gets the rest.
        temperature: > 0, softens both distributions; the term is scaled by its square.
    """

    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.weight <= 1:
            raise BadSetting(f"Distillation weight={self.weight}; it lies in [0, 1].")
        if self.temperature <= 0:
            raise BadSetting(f"Distillation temperature={self.temperature}; it is larger than 0.")


@dataclass(frozen=True)
class Classification(Task):
    """Single-label classification.

    Attributes:
        label_smoothing: in [0, 1).
        teacher: a frozen model with the same classes, or None.
        distillation: how to learn from the teacher.
    """

    label_smoothing: float = 0.0
    distillation: Distillation = field(default_factory=Distillation)
    teacher: nn.Module | None = None

    headline = "top1"

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.label_smoothing < 1:
            raise BadSetting(f"label_smoothing={self.label_smoothing}; it lies in [0, 1).")

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy and, with a teacher, the divergence from its softened logits."""
        logits = logits_of(model(batch["pixel_values"])).float()
        labels = functional.cross_entropy(
            logits, batch["labels"], label_smoothing=self.label_smoothing
        )
        if self.teacher is None:
            return {"labels": labels}
        weight, heat = self.distillation.weight, self.distillation.temperature
        with torch.no_grad():
            taught = logits_of(self.teacher(batch["pixel_values"])).float()
        divergence = functional.kl_div(
            functional.log_softmax(logits / heat, dim=-1),
            functional.log_softmax(taught / heat, dim=-1),
            log_target=True,
            reduction="batchmean",
        )
        return {"labels": (1 - weight) * labels, "teacher": weight * heat**2 * divergence}

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits `B C` in float32 and labels `B`."""
        return logits_of(model(batch["pixel_values"])).float(), batch["labels"]

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Top-1, top-5 (with more than 5 classes), the mean cross entropy and the count."""
        return accuracy(outputs, targets)

    def with_teacher(self, teacher: nn.Module) -> Classification:
        """The same task with a frozen teacher in evaluation mode."""
        return replace(self, teacher=teacher.eval().requires_grad_(False))


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Figures of logits `N C` against labels `N`; accuracies are fractions in [0, 1]."""
    count, classes = logits.shape
    figures = {"loss": functional.cross_entropy(logits.float(), labels).item()}
    best = logits.topk(min(5, classes), dim=-1).indices == labels[:, None]
    figures["top1"] = best[:, 0].double().mean().item()
    if classes > 5:
        figures["top5"] = best.any(dim=-1).double().mean().item()
    figures["n"] = float(count)
    return figures


def logits_of(output: object) -> Tensor:
    """The logits `B C` in whatever a vision model returns.

    A tensor is itself; a transformers output has them under `logits`; of a tuple, as from a
    distilled model in training mode, the mean is taken.

    Raises:
        UnsupportedBackbone: there are no logits, for instance because the model has no head.
    """
    if isinstance(output, Tensor):
        if output.ndim != 2:
            shape = " x ".join(str(size) for size in output.shape)
            raise UnsupportedBackbone(
                f"The model returned a tensor of {shape}, where logits (batch x classes) "
                "are needed. "
                "A model with a classification head works."
            )
        return output
    if isinstance(output, Mapping):
        return _from_mapping(output)
    if isinstance(output, (tuple, list)) and output:
        tensors = [part for part in output if isinstance(part, Tensor) and part.ndim == 2]
        if tensors and len({part.shape for part in tensors}) == 1:
            return torch.stack(tensors).mean(dim=0)
    raise UnsupportedBackbone(
        f"The model returned a {type(output).__name__} without logits. "
        "A tensor of batch x classes, or an output with `logits`, works."
    )


def check_outputs(model: nn.Module, size: int, classes: int) -> None:
    """Refuse an image size or a class count that does not fit, before an epoch is spent on it.

    Raises:
        BadSetting: the model does not take such images or has other outputs.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = logits_of(model(torch.zeros(1, 3, size, size))).shape[-1]
    except (RuntimeError, AssertionError, ValueError) as error:
        raise BadSetting(
            f"The model does not take images of {size} x {size}: {str(error).splitlines()[0]} "
            "Set model.kwargs.img_size (timm) to the same as data.image_size, or leave both out."
        ) from error
    finally:
        model.train(training)
    if found != classes:
        raise BadSetting(
            f"The model has {found} outputs and the data {classes} classes. Leave "
            "model.kwargs.num_classes out: the head is made to fit the data."
        )


def _from_mapping(output: Mapping[Any, Any]) -> Tensor:
    if "logits" in output:
        return logits_of(output["logits"])
    raise UnsupportedBackbone(
        f"The model returned {', '.join(map(str, output))} but no logits: it has no classification "
        "head. The architecture's ForImageClassification class has one."
    )
