"""Pairs of a template and a search image, cut out of sequences for training.

LoRAT (Lin et al., ECCV 2024): sources are drawn by weight, two frames up to some distance apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_vision.data.epoch_dataset import EpochDataset
from peft_vision.data.image_set import drawing_from
from peft_vision.errors import BadSetting, DataError
from peft_vision.tracking._pair_order import PairOrder
from peft_vision.tracking.augmentation import changed
from peft_vision.tracking.boxes import Array, clipped, corners, covered, sizes
from peft_vision.tracking.crops import Crop, Frame, cut, mean_color
from peft_vision.tracking.geometry import Geometry
from peft_vision.tracking.sequence_set import SequenceSet
from peft_vision.tracking.sequences import TrackingSequence
from peft_vision.tracking.settings import PairAugmentation

LEAST = 10.0
"""A target has to reach this many pixels across and down into the search image; in search images of
less than 224 pixels, as much less."""

_USUAL_SIDE = 224

DRAWS = 50
"""So many pairs in a row may fail before the data are refused."""

TRIES = 10
"""So many places of the search crop are tried for a pair."""

VALIDATION_SHIFT = 1.0
"""Validation crops are moved by up to this many sides of the target."""

Seen = tuple[Frame, Array]
"""A frame and the target's corners in it, in pixels, inside of the frame."""


class Pairs(EpochDataset):
    """Pairs of crops with the target in them.

    Samples: `template` 3 h w and `search` 3 H W, normalized; `foreground` rows columns of the
    template's patches, int64, 1 where the target reaches into a patch; `box` 4, the target's
    corners in the search image as shares of its side, inside of [0, 1].

    A sample is a function of (seed, epoch, index), the same for every process, worker and resumed
    run. Within an epoch, a source gives each of its sequences once before it gives one again. A
    pair that cannot be made (a broken sequence, a target that is not to be seen, a box of no size)
    is drawn again, from another sequence of the same source.

    Without augmentation these are validation pairs: the same in every epoch, colors and scale as
    they are. Their search crops are still moved, by up to one side of the target across and down,
    as a function of the seed: were the target always in the middle, a model that answers "in the
    middle" would look perfect.
    """

    def __init__(
        self,
        sources: Sequence[tuple[SequenceSet, float]],
        *,
        sides: tuple[int, int],
        grid: tuple[int, int],
        geometry: Geometry,
        normalization: tuple[Sequence[float], Sequence[float]],
        count: int,
        seed: int,
        gap: int = 100,
        augmentation: PairAugmentation | None,
    ) -> None:
        """Prepare the order; no sequence is opened.

        Args:
            sources: sets with how often they are drawn, in relation to each other.
            sides: of template and search image, in pixels.
            grid: rows and columns of the template's patches.
            geometry: how large the crops are.
            normalization: mean and standard deviation of the channels of images in [0, 1].
            count: pairs in an epoch.
            seed: of everything that is drawn.
            gap: most frames between template and search image, either way.
            augmentation: of training pairs; None: validation pairs.

        Raises:
            BadSetting: a weight, the count or the gap is out of its range.
            DataError: there is no sequence.
        """
        _check(sources, count, gap)
        self.sources = [found for found, _ in sources]
        self.sides, self.grid, self.geometry = sides, grid, geometry
        self.count, self.seed, self.gap = count, seed, gap
        self.augmentation = augmentation
        mean, std = (torch.tensor(list(values), dtype=torch.float32) for values in normalization)
        self._mean, self._std = mean[:, None, None], std[:, None, None]
        weights = [weight for _, weight in sources]
        self._order = PairOrder(weights, [len(found) for found in self.sources], count, seed)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sample as in epoch number `epoch`; validation pairs stay as they are."""
        self.epoch = 0 if self.augmentation is None else epoch

    def __len__(self) -> int:
        """Pairs in an epoch."""
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample number `index`.

        Raises:
            DataError: many pairs in a row could not be made; the message says why one could not.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"There are {self.count} pairs; number {index} was asked for.")
        source, first = self._order.place(self.epoch, index)
        sequences, reason = self.sources[source].sequences, ""
        with drawing_from(self.seed, self.epoch, index):
            for draw in range(DRAWS):
                chosen = first if draw == 0 else int(torch.randint(len(sequences), ()))
                try:
                    found = self._sample(sequences[chosen])
                except DataError as error:
                    found, reason = None, str(error)
                if found is not None:
                    return found
        raise DataError(
            f"{DRAWS} pairs in a row from {self.sources[source].kind} "
            f"({self.sources[source].split}) could not be made. "
            f"For example: {reason or 'the target hardly reached into the search image.'}"
        )

    def _sample(self, sequence: TrackingSequence) -> dict[str, Any] | None:
        """A pair out of a sequence; None where the target is hardly in the search image."""
        first, second = chosen_frames(sequence, self.gap)
        template = _seen(sequence, first)
        search = template if second == first else _seen(sequence, second)
        around = Crop.around(
            sizes(template[1]), self.geometry.template_area, self.sides[0], self.geometry.least
        )
        placed = self._search_crop(search[1])
        if placed is None:
            return None
        pair = (_part(template, around), _part(search, placed))
        if self.augmentation is not None:
            pair = changed(*pair, self.augmentation)
        (small, inner), (large, box) = pair
        return {
            "template": (small - self._mean) / self._std,
            "search": (large - self._mean) / self._std,
            "foreground": covered(inner[None], self.grid)[0].long(),
            "box": box.float(),
        }

    def _search_crop(self, box: Array) -> Crop | None:
        """A crop near a target (corners in the frame) with enough of it; None after some tries."""
        side, area = self.sides[1], self.geometry.search_area
        middle = Crop.around(sizes(box), area, side, self.geometry.least)
        enough = LEAST * min(1.0, side / _USUAL_SIDE)
        for _ in range(TRIES):
            crop = self._moved(middle, box)
            inside = clipped(crop.into(box), side, side)
            if (inside[2:] - inside[:2] >= enough).all():
                return crop
        return None

    def _moved(self, crop: Crop, box: Array) -> Crop:
        """Another scale, and the target not in the middle."""
        spread, reach = 0.0, VALIDATION_SHIFT
        if self.augmentation is not None:
            spread, reach = self.augmentation.scale_jitter, self.augmentation.shift_jitter
        wide, high = crop.scale / np.exp(spread * torch.randn(2, dtype=torch.float64).numpy())
        centered = Crop.centered(_middle(box), (float(wide), float(high)), crop.side)
        width, height = box[2:] - box[:2]
        most = reach * float(wide * width + high * height) / 2
        across, down = ((2 * torch.rand(2, dtype=torch.float64) - 1) * most).tolist()
        shift = (centered.shift[0] + across, centered.shift[1] + down)
        return Crop(centered.scale, shift, crop.side)


def chosen_frames(sequence: TrackingSequence, gap: int) -> tuple[int, int]:
    """A template frame and another one up to `gap` frames away, both with a visible target.

    The template frame is any, the search frame any near it, before or after; the template frame
    again where there is no other. Drawn from torch's CPU generator.

    Raises:
        DataError: the target is visible in no frame.
    """
    rows = min(len(sequence.boxes), len(sequence.frames))
    boxes = sequence.boxes[:rows]
    fine = np.isfinite(boxes).all(axis=1) & (np.nan_to_num(boxes[:, 2:]) > 0).all(axis=1)
    usable = np.flatnonzero(fine & sequence.visible[:rows])
    if not len(usable):
        raise DataError(f"{sequence.name}: the target is visible in none of {rows} frames.")
    template = int(usable[torch.randint(len(usable), ())])
    near = usable[(np.abs(usable - template) <= gap) & (usable != template)]
    if not len(near):
        return template, template
    return template, int(near[torch.randint(len(near), ())])


def _seen(sequence: TrackingSequence, index: int) -> Seen:
    """A frame with the target's box, cut off at the border.

    Raises:
        DataError: the frame cannot be read, or the box is outside of it.
    """
    frame = sequence.frames.read(index)
    height, width = frame.shape[:2]
    box = clipped(corners(sequence.boxes[index]), width, height)
    if (box[2:] <= box[:2]).any():
        raise DataError(
            f"{sequence.name}: the box {sequence.boxes[index].tolist()} of frame {index} is "
            f"outside of the frame, {width} x {height}."
        )
    return frame, box


def _part(seen: Seen, crop: Crop) -> tuple[Tensor, Tensor]:
    """The crop of a frame in [0, 1], and the target's corners in it as shares."""
    frame, box = seen
    inside = clipped(crop.into(box), crop.side, crop.side) / crop.side
    return cut(frame, crop, mean_color(frame)) / 255, torch.from_numpy(inside)


def _middle(box: Array) -> tuple[float, float]:
    return float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2


def _check(sources: Sequence[tuple[SequenceSet, float]], count: int, gap: int) -> None:
    if count < 1 or gap < 0:
        raise BadSetting(f"count is {count} and gap {gap}; count is at least 1, gap at least 0.")
    weights = [weight for _, weight in sources]
    if not all(np.isfinite(weight) and weight >= 0 for weight in weights):
        raise BadSetting(f"The weights of the sources are {weights}; they are numbers from 0 on.")
    if not any(weight > 0 for weight in weights):
        raise BadSetting(f"The weights of the sources are {weights}; one has to be above 0.")
    for found, weight in sources:
        if weight > 0 and not len(found):
            raise DataError(f"{found.kind} ({found.split}) has no sequence to train on.")
