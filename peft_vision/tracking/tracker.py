"""A tracking model on a video: the target from the first frame, its box in every later one.

LoRAT (Lin et al., "Tracking Meets LoRA: Faster Training, Larger Model, Stronger Performance",
ECCV 2024, arXiv 2403.05231).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from peft_vision.errors import BadSetting
from peft_vision.tracking._ready import device_named, input_dtype, ready
from peft_vision.tracking.boxes import Array, clipped, corners, covered, sizes
from peft_vision.tracking.crops import Crop, Frame, cut, mean_color
from peft_vision.tracking.geometry import Geometry
from peft_vision.tracking.inputs import checked_frame, checked_start

Precision = Literal["fp32", "bf16"]


@dataclass
class _Target:
    """What is known of one target.

    Attributes:
        template: its crop of the first frame, 3 h w, normalized. `foreground`: patches of it that
            show the target, rows columns.
        fill: what is outside of a frame looks like this.
        box: where it was seen last, x y w h.
    """

    template: Tensor
    foreground: Tensor
    fill: tuple[float, float, float]
    box: Array


class Tracker:
    """Follow targets through frames.

    The template is cut once, from the first frame, and stays. In every later frame, the search
    image is cut around the last box; of all places the one with the best mix of score and Hann
    window is taken, and its box is moved into the frame. A box without any area there is not
    believed: the last one stays.

    Attributes:
        model: the model that runs, with merged weights unless asked otherwise.
        geometry: what it looks at. `device`: where it runs.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        merged: bool = True,
        geometry: Geometry | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "fp32",
        compile: bool = False,
    ) -> None:
        """Prepare a model.

        Args:
            model: a folder or repository with a tracker, or such a model: wrapped, merged,
                compressed or a TrackingModel. One that has nothing to merge is used itself: it is
                put into evaluation mode and onto the device.
            merged: fold adapters into a copy of the weights. Adapters of a base in fewer bits stay
                beside it either way, for the base would have to be loaded in full.
            geometry: in place of the one that the model was trained with.
            device: such as `cpu`; None: a GPU where there is one.
            precision: `bf16` runs under autocast.
            compile: run through `torch.compile`; the first frames take long then.

        Raises:
            BadSetting: the model does not track, or its adapters cannot be merged, or a setting is
                out of range.
            ArtifactError: the folder cannot be loaded.
        """
        if precision not in ("fp32", "bf16"):
            raise BadSetting(f"precision is {precision!r}; possible: fp32, bf16.")
        self.device = device_named(device)
        self.model = ready(model, merged=merged).to(self.device).eval()
        self.geometry = geometry or self.model.geometry
        self._dtype = input_dtype(self.model)
        mean, std = self.model.normalization
        self._mean, self._std = (
            torch.tensor(values, device=self.device, dtype=torch.float32)[:, None, None] * 255
            for values in (mean, std)
        )
        rows, columns = self.model.grids[1]
        window = [torch.hann_window(n, periodic=False, device=self.device) for n in (rows, columns)]
        self._window = torch.outer(*window).flatten()
        self._autocast = precision == "bf16"
        self._run: Any = torch.compile(self.model) if compile else self.model
        self._targets: list[_Target] = []

    def start(self, frame: Frame, box: Sequence[float] | Array) -> None:
        """Take what is in the box as the target; what was followed before is forgotten.

        Args:
            frame: H W 3, uint8, RGB.
            box: x y w h in pixels, counted from 0; it may reach out of the frame.

        Raises:
            BadSetting: the frame is no such array; the box is not four finite numbers, has no
                area, or lies outside of the frame.
        """
        self.start_all([frame], [box])

    def step(self, frame: Frame) -> tuple[Array, float]:
        """Find the target in the next frame.

        Returns:
            Its box x y w h, inside of the frame, and the confidence in [0, 1].

        Raises:
            BadSetting: the frame cannot be used, or there was no start.
        """
        if len(self._targets) > 1:
            raise BadSetting(
                f"{len(self._targets)} sequences were started together; step_all goes on with them."
            )
        boxes, scores = self.step_all([frame])
        return boxes[0], float(scores[0])

    def start_all(
        self, frames: Sequence[Frame], boxes: Sequence[Sequence[float] | Array] | Array
    ) -> None:
        """Start several sequences that go through the model together.

        Args:
            frames: the first frame of each; their sizes may differ.
            boxes: the target's box in each.

        Raises:
            BadSetting: a frame or box cannot be used, or their numbers differ.
        """
        if len(frames) != len(boxes) or not len(frames):
            raise BadSetting(f"{len(frames)} frames and {len(boxes)} boxes were given to start.")
        pairs = zip(frames, boxes, strict=True)
        checked = [(checked_frame(frame), checked_start(frame, box)) for frame, box in pairs]
        self._targets = [self._target(frame, box) for frame, box in checked]

    def step_all(self, frames: Sequence[Frame | None]) -> tuple[Array, Array]:
        """The next frame of each sequence, in one pass through the model.

        Args:
            frames: as many as were started; None for a sequence that has ended.

        Returns:
            Boxes B 4 and confidences B; of a sequence that has ended, its last box and NaN.

        Raises:
            BadSetting: a frame cannot be used, or there are not as many as were started.
        """
        if len(frames) != len(self._targets):
            raise BadSetting(
                f"{len(frames)} frames for {len(self._targets)} targets. Begin with the first "
                "frame and the target's box: tracker.start(frame, box)."
            )
        scores = np.full(len(frames), np.nan)
        going = [
            (number, target, checked_frame(frame))
            for number, (target, frame) in enumerate(zip(self._targets, frames, strict=True))
            if frame is not None
        ]
        if going:
            numbers, targets, images = zip(*going, strict=True)
            scores[list(numbers)] = self._look(targets, images)
        return np.stack([target.box for target in self._targets]), scores

    @torch.inference_mode()
    def _look(self, targets: Sequence[_Target], frames: Sequence[Frame]) -> Array:
        """Move the boxes of targets to where they are in these frames; confidences B."""
        area, side, least = self.geometry.search_area, self.model.sides[1], self.geometry.least
        crops = [Crop.around(target.box, area, side, least) for target in targets]
        views = [
            cut(frame, crop, target.fill)
            for target, frame, crop in zip(targets, frames, crops, strict=True)
        ]
        template = torch.stack([target.template for target in targets])
        foreground = torch.stack([target.foreground for target in targets])
        with self._precision():
            found = self._run(template, self._normalized(torch.stack(views)), foreground)
        scores, boxes = found.scores.flatten(1).sigmoid(), found.boxes.flatten(1, 2)
        weight = self.geometry.window
        best = ((1 - weight) * scores + weight * self._window).argmax(1)
        rows = torch.arange(len(best), device=best.device)
        chosen = torch.cat([scores[rows, best, None], boxes[rows, best]], dim=1)
        answers: Array = chosen.double().cpu().numpy()
        for target, frame, crop, answer in zip(targets, frames, crops, answers, strict=True):
            height, width = frame.shape[:2]
            box = clipped(crop.back(answer[1:] * side), width, height)
            if box[0] < box[2] and box[1] < box[3]:
                target.box = sizes(box)
        return answers[:, 0]

    def _target(self, frame: Frame, box: Array) -> _Target:
        side, fill = self.model.sides[0], mean_color(frame)
        crop = Crop.around(box, self.geometry.template_area, side, self.geometry.least)
        image = self._normalized(cut(frame, crop, fill))
        inside = torch.from_numpy(crop.into(corners(box)) / side)[None]
        foreground = covered(inside, self.model.grids[0])[0].long()
        return _Target(image, foreground.to(self.device), fill, box)

    def _normalized(self, pixels: Tensor) -> Tensor:
        return ((pixels.to(self.device) - self._mean) / self._std).to(self._dtype)

    def _precision(self) -> AbstractContextManager[Any]:
        if self._autocast:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()
