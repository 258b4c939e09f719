"""Imitation: a model learns to give what the model that it was made from gives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_vision.errors import UnsupportedBackbone
from peft_vision.tasks.classification import logits_of
from peft_vision.tasks.task import Batch, Task


@dataclass(frozen=True)
class Imitation(Task):
    """Give what the dense model gives: its softened logits, or its features where it has no head.

    Attributes:
        weight: of the teacher's term, in [0, 1]; the labels' term gets the rest.
        temperature: softens both distributions, above 0.
        classifies: outputs are logits.
        teacher: the dense model, frozen.
    """

    weight: float = 1.0
    temperature: float = 2.0
    classifies: bool = True
    teacher: nn.Module | None = None

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The divergence from the teacher and, with a weight below 1, cross entropy."""
        if self.teacher is None:
            raise AssertionError("fit() gives the teacher")
        given = self._read(model(batch["pixel_values"]))
        with torch.no_grad():
            taught = self._read(self.teacher(batch["pixel_values"]))
        if not self.classifies:
            spread = taught.var().clamp_min(1e-12)
            return {"teacher": functional.mse_loss(given, taught) / spread}
        heat = self.temperature
        divergence = functional.kl_div(
            functional.log_softmax(given / heat, dim=-1),
            functional.log_softmax(taught / heat, dim=-1),
            log_target=True,
            reduction="batchmean",
        )
        losses = {"teacher": self.weight * heat**2 * divergence}
        if self.weight < 1:
            labels = functional.cross_entropy(given, batch["labels"])
            losses["labels"] = (1 - self.weight) * labels
        return losses

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs in float32, and the labels."""
        return self._read(model(batch["pixel_values"])), batch["labels"]

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """How many there were."""
        return {"n": float(len(outputs))}

    def with_teacher(self, teacher: nn.Module) -> Imitation:
        """The same task with a frozen teacher in evaluation mode."""
        return replace(self, teacher=teacher.eval().requires_grad_(False))

    def _read(self, output: Any) -> Tensor:
        return (logits_of(output) if self.classifies else _features_of(output)).float()


def _features_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("pooler_output", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise UnsupportedBackbone(
        f"The model returned a {type(output).__name__} with neither logits nor features to imitate."
    )
