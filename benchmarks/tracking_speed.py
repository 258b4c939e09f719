"""Frames per second of a tracker: merged weights, adapters beside them, a convolutional head.

Weights are random: time does not depend on them. What is timed is `Tracker.step` on one frame of
640 x 480, cropping included, decoding not; the trackers take turns, and each is compared with the
merged one of its own round. The convolutional head is the one that LoRAT was compared with: per
branch four 3x3 convolutions with batch norm and ReLU (to 256, 128, 64 and 32 channels) and a 1x1.

    python -m benchmarks.tracking_speed
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peft_vision as pv
from peft_vision.layers.readout import Boxes, DenseReadout, around_centers
from peft_vision.tracking import Tracker, TrackingModel
from peft_vision.tracking.crops import Frame

TARGET = Path(__file__).with_suffix(".json")
SIZES = {"S-224": "vit_small_patch14_dinov2", "B-224": "vit_base_patch14_dinov2"}
STEPS = {"S-224": 3, "B-224": 1}
MERGED, BESIDE, CONVOLUTIONAL = "merged", "LoRA beside the weights", "merged, convolutional head"
BOX = [250.0, 180.0, 140.0, 120.0]
COLUMNS = [
    *("", "multiply-adds", "of them in the head", "parameters of the head"),
    *("frames/s of merged", "quartiles", "frames/s"),
]
NOTE = (
    "DINOv2-shaped ViTs of timm with random weights and LoRA r = 64, template 112 px, search "
    "image 224 px, one sequence, float32, one thread of a shared CPU"
)


class ConvolutionalBoxes(DenseReadout):
    """LoRAT's ablated head, on the same tokens and with the same answer as the MLP one."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs, 5)
        self.score, self.box = _branch(inputs, 1), _branch(inputs, 4)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Boxes:
        """Scores and boxes of a square of patches."""
        patches, (rows, columns) = self.patches(tokens, grid)
        image = patches.transpose(1, 2).reshape(len(patches), -1, rows, columns)
        sides = self.box(image).sigmoid().permute(0, 2, 3, 1)
        return Boxes(self.score(image)[:, 0], around_centers(sides))


def _branch(inputs: int, outputs: int) -> nn.Sequential:
    widths, parts = [inputs, 256, 128, 64, 32], []
    for before, after in pairwise(widths):
        parts += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        parts.append(nn.ReLU())
    return nn.Sequential(*parts, nn.Conv2d(32, outputs, 1))


def trackers(name: str) -> dict[str, Tracker]:
    """The same weights three times."""
    torch.manual_seed(0)
    base = timm.create_model(name, img_size=518, num_classes=0)
    adapted = pv.wrap(
        base, "lorat", streams=(112, 224), kinds=(2, 1), readout="boxes", image_size=518
    )
    merged = Tracker(adapted, device="cpu")
    other = copy.deepcopy(merged.model)
    other.readout = ConvolutionalBoxes(base.num_features)
    convolutional = Tracker(merged.model, device="cpu")
    convolutional.model = other.eval()
    convolutional._run = convolutional.model  # noqa: SLF001
    beside = Tracker(adapted, merged=False, device="cpu")
    return {MERGED: merged, BESIDE: beside, CONVOLUTIONAL: convolutional}


def counted(model: TrackingModel) -> tuple[int, int]:
    """Multiply-adds of a frame, and those of the head."""
    meta = copy.deepcopy(model).to("meta")
    template, search = (torch.zeros(1, 3, side, side, device="meta") for side in meta.sides)
    kinds = torch.zeros(1, *meta.grids[0], dtype=torch.long, device="meta")
    tokens = torch.zeros(1, meta.grids[1][0] ** 2, meta.readout.inputs, device="meta")
    found = []
    for run in (
        lambda: meta(template, search, kinds),
        lambda: meta.readout(tokens, meta.grids[1]),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        found.append(counter.get_total_flops() // 2)
    return found[0], found[1]


def timed(models: dict[str, Tracker], frames: list[Frame], rounds: int) -> dict[str, list[float]]:
    """Seconds a frame, one figure per round."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for tracker in models.values():
        tracker.start(frames[0], BOX)
        tracker.step(frames[0])
    for _ in range(rounds):
        for name, tracker in models.items():
            tracker.start(frames[0], BOX)
            before = time.perf_counter()
            for frame in frames:
                tracker.step(frame)
            seconds[name].append((time.perf_counter() - before) / len(frames))
    return seconds


def rows_of(size: str, rounds: int) -> list[list[str]]:
    """One row per tracker."""
    models = trackers(SIZES[size])
    noise = np.random.default_rng(0)
    frames = [noise.integers(0, 256, (480, 640, 3), dtype=np.uint8) for _ in range(STEPS[size])]
    seconds, rows = timed(models, frames, rounds), []
    for name, tracker in models.items():
        every, head = counted(tracker.model)
        size_of_head = sum(p.numel() for p in tracker.model.readout.parameters())
        pairs = zip(seconds[MERGED], seconds[name], strict=True)
        low, middle, high = statistics.quantiles([merged / own for merged, own in pairs], n=4)
        speed = 1 / statistics.median(seconds[name])
        rows.append(
            [
                *(f"{size}: {name}", f"{every / 1e9:.2f} G", f"{head / 1e9:.3f} G"),
                *(f"{size_of_head / 1e6:.2f} M", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"),
                f"{speed:.2f}",
            ]
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Time and count, and write the table beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [row for size in SIZES for row in rows_of(size, rounds)]
    note = f"{NOTE}; {rounds} rounds in turns. Compare ratios: absolute times drift"
    content = {
        "tables": [{"method": "tracking-speed", "columns": COLUMNS, "rows": rows, "note": note}],
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "timm")},
        "seed": 0,
    }
    TARGET.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
