"""Predict a wave one step ahead: a dense network, and one made smaller *before* training.

python examples/04_wave_field.py - waves/      (data are made here; the first is not read)
"""

import argparse
import copy
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peft_vision as pv
from peft_vision.cost import time_on

LAPLACE = torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]])


def waves(count: int, side: int = 32) -> tuple[Tensor, Tensor]:
    """Fields before and now, and speed (N 3 S S); the field 3 steps of finite differences on."""
    speed = 0.3 + 0.3 * F.interpolate(torch.rand(count, 1, 4, 4), side)
    fields = 2 * [F.interpolate(torch.randn(count, 1, 6, 6), side, mode="bicubic")]
    for _ in range(36):
        change = speed**2 * F.conv2d(fields[-1], LAPLACE, padding=1)
        fields.append(2 * fields[-1] - fields[-2] + change)
    kept, seen = fields[1::3], [*pairwise(fields[1:-3:3])]
    return torch.cat([torch.cat([*two, speed], 1) for two in seen]), torch.cat(kept[2:])


def train(model: nn.Module, given: Tensor, wanted: Tensor, steps: int = 60) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        batch = torch.randint(len(given), (8,))
        optimizer.zero_grad()
        F.mse_loss(model(given[batch]), wanted[batch]).backward()
        optimizer.step()


parser = argparse.ArgumentParser(description="Dense and a priori compressed, trained alike")
parser.add_argument("folders", type=Path, nargs=2, help="the second gets a picture")
out = parser.parse_known_args()[0].folders[1]
torch.manual_seed(0)
(given, wanted), (x, y) = waves(32), waves(4)
layers = [nn.Conv2d(a, b, 5, padding=2) for a, b in ((3, 24), (24, 24), (24, 1))]
dense = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
small = pv.wrap(copy.deepcopy(dense), "one_way", ratio=0.7, init="fresh", image_size=32)
figure, axes = plt.subplots(1, 3)
axes[0].imshow(y[-1, 0].numpy(), vmin=-1, vmax=1)
for axis, (name, model) in zip(axes[1:], {"dense": dense, "one-way": small}.items(), strict=True):
    train(model, given, wanted)
    field, count = model(x).detach(), sum(p.numel() for p in model.parameters())
    axis.imshow(field[-1, 0].numpy(), vmin=-1, vmax=1)
    print(f"{name}: {count} parameters, error {(field - y).norm() / y.norm():.3f}")
times = time_on({"dense": dense, "one-way": small}, x)
print(", ".join(f"{name}: {timing.median:.1f} ms" for name, timing in times.items()))
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "truth-dense-one-way.png")
