"""Which places of the search image are right, and what a wrong answer costs (LoRAT, ECCV 2024).

Every place that the true box covers is right, and is asked for the whole box. Scores learn the
overlap of their own box with the true one, as in VarifocalNet's quality targets (Zhang et al.,
CVPR 2021) but with plain cross entropy; boxes learn by generalized IoU (Rezatofighi et al., 2019).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from peft_vision.layers.readout import Boxes
from peft_vision.tracking.boxes import covered, giou, iou


def tracking_losses(found: Boxes, truth: Tensor) -> dict[str, Tensor]:
    """The losses of a batch: sums over all places, divided by how many places are right.

    Args:
        found: scores B H W (logits) and boxes B H W 4 (corners as shares of the search image).
        truth: the true boxes, B 4.

    Returns:
        ``score`` and ``box``, float32, to be added.
    """
    scores, boxes = found.scores.float(), found.boxes.float()
    truth = truth.float()
    right = covered(truth, (scores.shape[1], scores.shape[2]))
    wanted = truth[:, None, None].expand_as(boxes)
    overlap = iou(boxes.detach(), wanted) * right
    count = right.sum().clamp(min=1)
    score = functional.binary_cross_entropy_with_logits(scores, overlap, reduction="sum")
    # Multiplied and not indexed: the shapes then do not depend on numbers.
    box = ((1 - giou(boxes, wanted)) * right).sum()
    return {"score": score / count, "box": box / count}
