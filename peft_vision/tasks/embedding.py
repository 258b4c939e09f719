"""Metric learning: images of one class close together, others apart.

The loss is the supervised contrastive one (Khosla et al., NeurIPS 2020) over the images of a
batch, one view each. Under several processes every process contrasts the images of its own share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_vision.errors import BadSetting
from peft_vision.tasks.classification import logits_of
from peft_vision.tasks.task import Batch, Task

CHUNK = 1024
"""Images compared at a time in an evaluation."""


@dataclass(frozen=True)
class Embedding(Task):
    """Learn an embedding from one label per image; directions count, lengths do not.

    Attributes:
        temperature: > 0, divides the cosine similarities in the loss.
    """

    temperature: float = 0.1

    headline = "recall1"

    def __post_init__(self) -> None:
        """Check the range."""
        if self.temperature <= 0:
            raise BadSetting(f"temperature={self.temperature}; it is larger than 0.")

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The supervised contrastive loss of the batch."""
        outputs, labels = self.predict(model, batch)
        return {"contrast": supervised_contrast(outputs, labels, self.temperature)}

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings of length 1, B D in float32, and labels B."""
        outputs = logits_of(model(batch["pixel_values"])).float()
        return functional.normalize(outputs, dim=1), batch["labels"]

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Recall at 1 and 5 among the other images, the loss of the first 1,024, the count."""
        loss = supervised_contrast(outputs[:CHUNK], targets[:CHUNK], self.temperature)
        return {"loss": loss.item(), **recalls(outputs, targets), "n": float(len(outputs))}


def supervised_contrast(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over images of minus the mean log probability of the others of its class.

    An image's probabilities are a softmax over the cosines to all other images. Images without
    another of their class do not count; the loss is zero where none has one.

    Args:
        embeddings: N D, of length 1. labels: N.
    """
    count = len(embeddings)
    itself = torch.eye(count, dtype=torch.bool, device=embeddings.device)
    cosines = embeddings @ embeddings.T / temperature
    log = functional.log_softmax(cosines.masked_fill(itself, float("-inf")), dim=1)
    same = (labels[:, None] == labels) & ~itself
    fellows = same.sum(1)
    sums = log.masked_fill(~same, 0.0).sum(1)
    counted = fellows > 0
    if not bool(counted.any()):
        return embeddings.sum() * 0.0
    return -(sums[counted] / fellows[counted]).mean()


def recalls(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares of images with one of their class among the 1 and the 5 nearest others."""
    count = len(embeddings)
    nearest = min(5, count - 1)
    if nearest < 1:
        return {"recall1": 0.0}
    hits = []
    for start in range(0, count, CHUNK):
        part = embeddings[start : start + CHUNK]
        cosines = part @ embeddings.T
        rows = torch.arange(len(part), device=part.device)
        cosines[rows, rows + start] = float("-inf")
        others = cosines.topk(nearest, dim=1).indices
        hits.append(labels[others] == labels[start : start + CHUNK, None])
    found = torch.cat(hits)
    figures = {"recall1": found[:, 0].double().mean().item()}
    if nearest == 5:
        figures["recall5"] = found.any(dim=1).double().mean().item()
    return figures
