"""A bright rectangle on a dark ground, and a model that sees nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.layers.readout import Boxes
from peft_vision.tracking._opencv import opencv, silent
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame
from peft_vision.tracking.sequences import Frames, TrackingSequence
from peft_vision.tracking.tracker import Tracker

WIDTH, HEIGHT = 160, 120
DARK, BRIGHT = 40, 230


def tiny_tracker(**settings: Any) -> nn.Module:
    """An adapted model of template 32 px and search image 64 px, with random weights."""
    base = pv.create_model("timm/test_vit", pretrained=False, num_classes=0, img_size=64)
    wanted = {"streams": (32, 64), "kinds": (2, 1), "readout": "boxes", "std": 0.02}
    return pv.wrap(base, "lorat", init="trunc_normal", **{**wanted, **settings})


def painted(box: Array, width: int = WIDTH, height: int = HEIGHT) -> Frame:
    """A frame with a bright box; pixels that it covers in part are in between."""
    x, y, w, h = box
    across = np.clip(
        np.minimum(np.arange(width) + 1, x + w) - np.maximum(np.arange(width), x), 0, 1
    )
    down = np.clip(
        np.minimum(np.arange(height) + 1, y + h) - np.maximum(np.arange(height), y), 0, 1
    )
    gray = DARK + (BRIGHT - DARK) * np.outer(down, across)
    return np.repeat(np.round(gray)[..., None], 3, axis=2).astype(np.uint8)


def path(steps: int = 30) -> Array:
    """Boxes x y w h of a target that goes around, grows and shrinks."""
    t = np.linspace(0, 2 * np.pi, steps)
    w, h = 18 + 6 * np.sin(t), 14 + 4 * np.cos(t)
    return np.stack([80 + 40 * np.cos(t) - w / 2, 60 + 30 * np.sin(t) - h / 2, w, h], axis=1)


def noise(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Frame:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


class Seeing(nn.Module):
    """Finds the bright rectangle of a search image: its middle by weight, its sides by their sums.

    Attributes:
        mean, std: of the normalization that it undoes.
    """

    def __init__(self, mean: Tensor, std: Tensor, grid: tuple[int, int]) -> None:
        super().__init__()
        self.mean, self.std, self.grid = mean, std, grid

    def forward(self, template: Tensor, search: Tensor, foreground: Tensor) -> Boxes:
        light = (search * self.std + self.mean).mean(1)
        bright = ((light - DARK - 20) / (BRIGHT - DARK - 20)).clamp(0, 1)
        rows, columns = self.grid
        scores = torch.full((len(bright), rows, columns), -6.0)
        boxes = torch.zeros(len(bright), rows, columns, 4)
        for number, image in enumerate(bright):
            side = image.shape[0]
            (x1, x2), (y1, y2) = extent(image.amax(0)), extent(image.amax(1))
            place = [
                min(int((a + b) / 2 / side * n), n - 1)
                for a, b, n in ((y1, y2, rows), (x1, x2, columns))
            ]
            scores[number, place[0], place[1]] = 6.0
            boxes[number, place[0], place[1]] = torch.tensor([x1, y1, x2, y2]) / side
        return Boxes(scores, boxes)


def extent(profile: Tensor) -> tuple[float, float]:
    """Where a bump of height 1 begins and ends."""
    total = float(profile.sum())
    places = torch.arange(len(profile)) + 0.5
    middle = float((profile * places).sum()) / total if total else len(profile) / 2
    return middle - total / 2, middle + total / 2


def seeing(tracker: Tracker) -> Tracker:
    """The tracker with a model that sees the rectangle."""
    tracker._run = Seeing(tracker._mean, tracker._std, tracker.model.grids[1])
    return tracker


class InMemory(Frames):
    """Frames from a list; None is one that cannot be read."""

    def __init__(self, frames: list[Frame | None]) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def name(self, index: int) -> str:
        return f"frame {index}"

    def read(self, index: int) -> Frame:
        frame = self.frames[index]
        if frame is None:
            raise pv.errors.DataError(f"frame {index} is broken")
        return frame


def sequence(name: str, boxes: Array, frames: list[Frame | None] | None = None) -> TrackingSequence:
    images = InMemory([painted(box) for box in boxes] if frames is None else frames)
    return TrackingSequence(name, images, boxes, np.ones(len(boxes), dtype=bool))


def write_folder(folder: Path, boxes: Array) -> Path:
    """Frames as 0001.png and so on, with groundtruth.txt."""
    folder.mkdir(parents=True)
    for number, box in enumerate(boxes, start=1):
        Image.fromarray(painted(box)).save(folder / f"{number:04d}.png")
    np.savetxt(folder / "groundtruth.txt", boxes, delimiter=",", fmt="%.3f")
    return folder


def write_video(file: Path, frames: list[Frame], rate: float = 25) -> Path:
    cv2 = opencv()
    height, width = frames[0].shape[:2]
    with silent(cv2):
        code = cv2.VideoWriter_fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(file), code, rate, (width, height))
        for frame in frames:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()
    return file
