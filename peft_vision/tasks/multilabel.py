"""Several labels per image: binary cross entropy, mean average precision and F1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_vision.errors import BadSetting, DataError
from peft_vision.tasks.classification import logits_of
from peft_vision.tasks.task import Batch, Task


@dataclass(frozen=True)
class MultiLabel(Task):
    """Multi-label classification; ``labels`` of a batch are 0 or 1, B C.

    Attributes:
        positive_weight: > 0; what the loss of a label that is present weighs.
        threshold: probability, in (0, 1), above which a label counts as found in F1.
    """

    positive_weight: float = 1.0
    threshold: float = 0.5

    headline = "map"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.positive_weight <= 0:
            raise BadSetting(f"positive_weight={self.positive_weight}; it is larger than 0.")
        if not 0 < self.threshold < 1:
            raise BadSetting(f"threshold={self.threshold}; it lies in (0, 1).")

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Mean binary cross entropy over images and labels."""
        logits, labels = self.predict(model, batch)
        weight = torch.full_like(logits[0], self.positive_weight)
        loss = functional.binary_cross_entropy_with_logits(
            logits, labels.to(logits), pos_weight=weight
        )
        return {"labels": loss}

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and labels, both B C; logits in float32."""
        logits, labels = logits_of(model(batch["pixel_values"])).float(), batch["labels"]
        if labels.shape != logits.shape:
            raise DataError(
                f"The labels of a batch are {tuple(labels.shape)} and the model's logits "
                f"{tuple(logits.shape)}. One 0 or 1 per image and label works."
            )
        return logits, labels

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Mean average precision over labels that occur, micro F1, the loss and the count."""
        present = targets > 0
        found = outputs.sigmoid() > self.threshold
        hits = (found & present).sum().double()
        either = (found.sum() + present.sum()).double().clamp_min(1)
        loss = functional.binary_cross_entropy_with_logits(outputs.float(), present.float())
        return {
            "loss": loss.item(),
            "map": mean_average_precision(outputs, targets),
            "f1": (2 * hits / either).item(),
            "n": float(len(outputs)),
        }


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Mean over labels of the average precision: N C scores against 0 or 1; in [0, 1].

    Precision is averaged over the ranks of the images that have the label. Labels that no image
    has do not count; 0 where none has any. Of equal scores, an image without the label ranks first.
    """
    figures = []
    for column, truth in zip(scores.double().unbind(1), (targets > 0).unbind(1), strict=True):
        if not bool(truth.any()):
            continue
        worst = torch.argsort(truth.long(), stable=True)
        order = worst[torch.argsort(column[worst], descending=True, stable=True)]
        hits = truth[order].double()
        ranks = torch.arange(1, len(hits) + 1, device=hits.device)
        figures.append(((hits.cumsum(0) / ranks) * hits).sum() / hits.sum())
    return torch.stack(figures).mean().item() if figures else 0.0
