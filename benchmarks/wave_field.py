"""A network that predicts a 2-D wave one step ahead: dense, and made smaller before training.

The field is solved by finite differences (leapfrog, three steps between two frames, fixed at the
border) in media whose speed varies. All networks get the same images, steps and seeds.

    python -m benchmarks.wave_field
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peft_vision as pv
from peft_vision.cost import measure, time_on, unwrap

TARGET = Path(__file__).with_suffix(".json")
SIDE, WIDTH, INNER, FRAMES, BATCH = 32, 24, 3, 14, 8
SEEDS = (0, 1, 2)
LAPLACE = torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]])

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "`one_way`, 0.5 of what can go": ("one_way", {"ratio": 0.5}),
    "`one_way`, 0.8 of what can go": ("one_way", {"ratio": 0.8}),
    "`tucker`, 0.8 of what can go": ("tucker", {"ratio": 0.8}),
    "`tensor_train`, 0.8 of what can go": ("tensor_train", {"ratio": 0.8}),
    "`cp`, 0.8 of what can go": ("cp", {"ratio": 0.8}),
}


def waves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two fields and the speed of the medium, N 3 S S; and the next field, N 1 S S."""
    drawn = torch.Generator().manual_seed(seed)
    speed = 0.3 + 0.3 * F.interpolate(torch.rand(count, 1, 4, 4, generator=drawn), SIDE)
    start = F.interpolate(torch.randn(count, 1, 6, 6, generator=drawn), SIDE, mode="bicubic")
    fields = [start, start]
    for _ in range(FRAMES * INNER):
        change = speed**2 * F.conv2d(fields[-1], LAPLACE, padding=1)
        fields.append(2 * fields[-1] - fields[-2] + change)
    kept = fields[1::INNER]
    given = [torch.cat([*two, speed], 1) for two in pairwise(kept[:-1])]
    return torch.cat(given), torch.cat(kept[2:])


class Step(nn.Module):
    """A field that goes on as it went, and four convolutions of 5 x 5: N 3 S S -> N 1 S S."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)]
        layers = [m for a, b in sizes for m in (nn.Conv2d(a, b, 5, padding=2), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """The next field."""
        change: Tensor = self.net(x)
        return 2 * x[:, 1:2] - x[:, :1] + change


def train(model: nn.Module, data: tuple[Tensor, Tensor], steps: int, seed: int) -> None:
    """Adam, with a learning rate that falls to zero along a cosine."""
    drawn = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(data[0]), (BATCH,), generator=drawn)
        optimizer.zero_grad()
        F.mse_loss(model(data[0][batch]), data[1][batch]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def error(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Norm of what is wrong with the prediction, relative to the field's."""
    found = torch.cat([model.eval()(x) for x in data[0].split(64)])
    return float((found - data[1]).norm() / data[1].norm())


def models(seed: int) -> dict[str, nn.Module]:
    """The dense network and those made smaller before training, from one seed."""
    torch.manual_seed(seed)
    found: dict[str, nn.Module] = {"dense": Step()}
    for label, (method, settings) in SMALL.items():
        fresh = copy.deepcopy(found["dense"])
        small = pv.wrap(fresh, method, init="fresh", image_size=SIDE, **settings)
        found[label] = unwrap(small)
    return found


def main() -> None:
    """Train all of them with every seed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    given, held_out = waves(96, 100), waves(24, 200)
    errors: dict[str, list[float]] = {}
    for seed in SEEDS:
        found = models(seed)
        for label, model in found.items():
            train(model, given, steps, seed)
            errors.setdefault(label, []).append(error(model, held_out))
            print(seed, label, round(errors[label][-1], 4), flush=True)
    times = time_on(found, held_out[0][:BATCH], rounds=15)
    dense, rows = times["dense"].milliseconds, []
    for label, model in found.items():
        cost = measure(model, SIDE)
        ratios = [b / a for a, b in zip(dense, times[label].milliseconds, strict=True)]
        figures = [
            f"{cost.params:,}",
            f"{cost.gmacs * 1e3:.1f}",
            f"{100 * statistics.mean(errors[label]):.1f}",
            f"{100 * statistics.stdev(errors[label]):.1f}",
            f"{statistics.median(ratios):.2f}",
        ]
        rows.append([label, *figures])
    last = float((held_out[0][:, 1:2] - held_out[1]).norm() / held_out[1].norm())
    columns = ["", "parameters", "MMACs", "error, %", "deviation, %", "time of dense"]
    note = (
        f"Relative error of the field of {SIDE} x {SIDE} points one frame ahead, on "
        f"{len(held_out[0])} frames of media that were not trained on, mean and standard "
        f"deviation of {len(SEEDS)} seeds; {steps} steps of {BATCH} frames. The frame before, "
        f"taken for the next, is wrong by {100 * last:.0f} %. Time of a batch of {BATCH}, in "
        "turns, one thread, float32"
    )
    content = {
        "columns": columns,
        "rows": rows,
        "note": note,
        "tables": [{"method": "one_way", "columns": columns, "rows": rows, "note": note}],
        "errors": errors,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch",)},
        "seed": list(SEEDS),
    }
    TARGET.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
