"""Learning to find a target again: pairs of a template and a search image with a box in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.layers.readout import Boxes
from peft_vision.tasks.task import Batch, Task
from peft_vision.tracking.boxes import iou
from peft_vision.tracking.loss import tracking_losses
from peft_vision.tracking.model import TrackingModel

THRESHOLDS = torch.linspace(0, 1, 21)


@dataclass(frozen=True)
class Tracking(Task):
    """One box per pair, without any memory of frames between the two.

    A batch holds ``template`` B 3 h w, ``search`` B 3 H W, ``foreground`` (the template's patches
    that show the target: B rows columns, whole numbers) and ``box`` (corners in the search image as
    shares of its size, B 4). The model is a `TrackingModel`.

    The number of places by which losses are divided is counted over what one process holds at a
    time; the original counts over a whole batch and takes the mean over processes.
    """

    headline = "iou"

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy of the scores and generalized IoU of the boxes."""
        return tracking_losses(_called(model, batch), batch["box"])

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The box of the place with the highest score, B 4, and the true one."""
        return best(_called(model, batch)), batch["box"].float()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Means over pairs: overlap, area under the curve of successes, successes at 0.5."""
        found = iou(outputs.float(), targets.float())
        over = found[:, None] > THRESHOLDS.to(found.device)
        return {
            "iou": found.mean().item(),
            "auc": over.float().mean().item(),
            "success50": (found > 0.5).float().mean().item(),
            "n": float(len(found)),
        }

    def example(self, model: nn.Module, count: int, image_size: Any) -> dict[str, Tensor]:
        """A batch of the right shapes; the sizes are the model's own."""
        if not isinstance(model, TrackingModel):
            raise TypeError(f"{type(model).__name__} is no TrackingModel")
        (template, search), ((rows, columns), _) = model.sides, model.grids
        return {
            "template": torch.empty(count, 3, template, template),
            "search": torch.empty(count, 3, search, search),
            "foreground": torch.empty(count, rows, columns, dtype=torch.int64),
            "box": torch.empty(count, 4),
        }


def best(found: Boxes) -> Tensor:
    """The box of the place with the highest score: B 4, float32."""
    flat = found.scores.flatten(1).argmax(1)
    boxes = found.boxes.flatten(1, 2)
    return boxes[torch.arange(len(boxes), device=boxes.device), flat].float()


def _called(model: nn.Module, batch: Batch) -> Boxes:
    found: Boxes = model(batch["template"], batch["search"], batch["foreground"])
    return found
