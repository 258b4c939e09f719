"""Random changes of training pairs, as LoRAT makes them (Lin et al., ECCV 2024).

Where the crop of the search image lies is jittered when it is cut; the rest happens to the crops.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from peft_vision.tracking.settings import PairAugmentation

_LARGEST_BLUR = 2.0
_SOLARIZE = 128 / 255


def changed(
    template: tuple[Tensor, Tensor], search: tuple[Tensor, Tensor], settings: PairAugmentation
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Change a pair by draws from torch's CPU generator.

    Args:
        template: crop 3 h w with values in [0, 1], and the target's corners in it as shares, 4.
        search: the same, 3 H W.
        settings: how much.

    Returns:
        Template and search image with their corners.
    """
    pair = []
    for image, box in (template, search):
        turned, mirrored = flipped(image, box) if _happens(settings.flip) else (image, box)
        pair.append((jittered(turned, settings.color), mirrored))
    if settings.three_augment:
        kind = int(torch.randint(3, ()))
        radius = 0.1 + (_LARGEST_BLUR - 0.1) * float(torch.rand(()))
        pair = [(one_of_three(image, kind, radius), box) for image, box in pair]
    return pair[0], pair[1]


def flipped(image: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """The mirror image, left and right exchanged, with the corners (shares) in it."""
    x1, y1, x2, y2 = box.unbind()
    return functional.horizontal_flip(image), torch.stack([1 - x2, y1, 1 - x1, y2])


def jittered(image: Tensor, amount: float) -> Tensor:
    """Change brightness, contrast and saturation by random factors, in random order.

    Args:
        image: 3 H W in [0, 1].
        amount: factors lie between 1 - amount and 1 + amount.
    """
    if amount == 0:
        return image
    changes = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
    )
    factors = (1 + amount * (2 * torch.rand(3) - 1)).tolist()
    for which in torch.randperm(3).tolist():
        image = changes[which](image, factors[which])
    return image


def one_of_three(image: Tensor, kind: int, radius: float) -> Tensor:
    """Gray (0), solarized at 128 of 255 (1), or blurred (2) with a standard deviation in pixels."""
    if kind == 0:
        gray: Tensor = functional.rgb_to_grayscale(image, num_output_channels=3)
        return gray
    if kind == 1:
        solarized: Tensor = functional.solarize(image, _SOLARIZE)
        return solarized
    size = 2 * int(3 * radius + 0.5) + 1
    # One way and then the other: the same image, of a sixth of the work.
    across: Tensor = functional.gaussian_blur(image, [size, 1], [radius, radius])
    blurred: Tensor = functional.gaussian_blur(across, [1, size], [radius, radius])
    return blurred


def _happens(probability: float) -> bool:
    return float(torch.rand(())) < probability
