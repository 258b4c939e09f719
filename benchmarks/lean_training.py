"""What lean training saves, and what it costs; writes JSON.

Bytes: one training step of the preset `lorat` (r = 64 on every linear, boxes) at batch 16 in bf16,
for ViT-g/14 at LoRAT's two sizes, counted on fake tensors: no GPU, no weights. Time: a real step on
the CPU of a model as wide as ViT-S with a gated MLP, all variants taking turns in one process; a
ratio is taken within each round. Random weights, random images.

    python -m benchmarks.lean_training
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import timm
import torch
from peft.tuners.lora import Linear as StockLinear
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.adapters._lean import LeanLinear
from peft_vision.backbones import view
from peft_vision.cost import unwrap
from peft_vision.layers.recomputed import unwatch
from peft_vision.memory.rehearsal import Rehearsal
from peft_vision.streams import Streams
from peft_vision.training.lean import leaned
from peft_vision.training.settings import TrainSettings

TARGET = Path(__file__).with_suffix(".json")
NAME, BATCH, SEED = "vit_giant_patch14_dinov2", 16, 0
SIZES = {"g-224": (112, 224), "g-378": (196, 378)}
"""Sides of template and search image in pixels: 320 and 925 tokens in one sequence."""
STOCK = "PEFT's own layers"
LOW: dict[str, Any] = {"frozen": "bf16", "norms": "low"}
LADDER: dict[str, tuple[dict[str, Any], str]] = {
    STOCK: ({"recompute": "nothing"}, ""),
    "`lora`'s own step, `recompute: nothing`": ({"recompute": "nothing"}, "sums in another order"),
    "`recompute: activations` (default)": ({}, "exact"),
    "and `frozen: bf16`": ({"frozen": "bf16"}, "exact"),
    "and `norms: low`": (LOW, "rounding"),
    "and `drop_path: 0.4`": ({**LOW, "drop_path": 0.4}, "the paper's recipe"),
    "without it, 20 of 40 blocks recomputed": ({**LOW, "gradient_checkpointing": 20}, "rounding"),
    "all blocks recomputed, `norms: full`": (
        {"frozen": "bf16", "gradient_checkpointing": True},
        "exact",
    ),
}
"""Step -> settings, and what it does to gradients."""
NOTE = (
    f"Preset `lorat` on `{NAME}`, batch 16, r = 64, bf16, AdamW; GiB at the peak of a step on fake "
    "tensors, no GPU. Time: median and quartiles of the ratio to PEFT's own layers, a real step on "
    "a CPU of a gated ViT 384 wide"
)


def lorat(template: int, search: int) -> nn.Module:
    """The preset, without numbers."""
    with torch.device("meta"):
        model = timm.create_model(NAME, pretrained=False, img_size=518, num_classes=0)
        settings: dict[str, Any] = {"streams": (template, search), "kinds": (2, 1)}
        return pv.wrap(model, "lorat", readout="boxes", init="trunc_normal", **settings)


def loss_on(sides: tuple[int, ...]) -> Callable[[nn.Module, int], Tensor]:
    """A stand-in for the tracker's loss: the squares of all that the head says."""

    def loss(model: nn.Module, count: int) -> Tensor:
        images = [torch.empty(count, 3, side, side) for side in sides]
        tokens = Streams(model)(images)[-1]
        said = view(unwrap(model)).readouts[0].layer(tokens)
        return torch.stack([t.float().square().sum() for t in said]).sum()

    return loss


def as_peft_has_it(model: nn.Module) -> nn.Module:
    """The same model, computed by PEFT's own layers."""
    unwatch(model)
    for module in model.modules():
        if type(module) is LeanLinear:
            module.__class__ = StockLinear
    return model


def counted(sides: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Step -> GiB at the peak, and what they are."""
    found = {}
    for name, (settings, _) in LADDER.items():
        model = lorat(*sides)
        model = as_peft_has_it(model) if name == STOCK else model
        rehearsal = Rehearsal(model, (3, sides[-1], sides[-1]), loss=loss_on(sides))
        parts = rehearsal.run(TrainSettings(precision="bf16", batch_size=BATCH, **settings)).parts
        gib = {part: round(size / 2**30, 3) for part, size in parts.items()}
        found[name] = {"gib": round(sum(parts.values()) / 2**30, 2), "parts": gib}
    return found


def small(depth: int) -> nn.Module:
    """What is timed: 384 wide, SwiGLU, adapters as in the preset."""
    torch.manual_seed(SEED)
    model = timm.create_model(
        NAME, img_size=224, embed_dim=384, num_heads=6, depth=depth, num_classes=10
    )
    return pv.wrap(model, "lora", r=64, alpha=64.0, split_qkv=True).train()


def timed(rounds: int, depth: int, batch: int) -> dict[str, dict[str, float]]:
    """Step -> quartiles of the ratio to PEFT's own layers, within a round."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(batch, 3, 224, 224, generator=generator)
    models = {name: small(depth) for name in LADDER}
    as_peft_has_it(models[STOCK])
    taken: dict[str, list[float]] = {name: [] for name in LADDER}
    for turn in range(rounds + 1):
        order = list(LADDER) if turn % 2 else list(LADDER)[::-1]
        for name in order:
            seconds = _step(models[name], _of_small(LADDER[name][0], depth), images, name)
            taken[name] += [seconds] if turn else []  # the first round warms up
    return {
        name: _spread([a / b for a, b in zip(times, taken[STOCK], strict=True)])
        for name, times in taken.items()
    }


def _of_small(settings: dict[str, Any], depth: int) -> TrainSettings:
    blocks = settings.get("gradient_checkpointing", False)
    if not isinstance(blocks, bool):
        blocks = depth // 2
    return TrainSettings(precision="bf16", **{**settings, "gradient_checkpointing": blocks})


def _step(model: nn.Module, settings: TrainSettings, images: Tensor, name: str) -> float:
    model.zero_grad()
    with leaned(model, settings):
        if name == STOCK:
            unwatch(model)
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).float().square().sum()
        loss.backward()
        return time.process_time() - start


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = quantiles(values, n=4)
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def table(content: dict[str, Any]) -> dict[str, Any]:
    """For the page."""
    rows = []
    for name, (_, what) in LADDER.items():
        ratio = content["time"].get(name)
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        sizes = [f"{content['bytes'][size][name]['gib']:.1f}" for size in SIZES]
        rows.append([name, *sizes, what, spread])
    columns = ["step", *(f"{size}, GiB" for size in SIZES), "gradients", "time of a step"]
    return {"method": "lean-training", "columns": columns, "rows": rows, "note": NOTE}


def main() -> None:
    """Count, time, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="2 or more")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    content: dict[str, Any] = {
        "bytes": {size: counted(sides) for size, sides in SIZES.items()},
        "time": timed(args.rounds, args.depth, args.batch),
        "timed": {"width": 384, "depth": args.depth, "batch": args.batch, "rounds": args.rounds},
        "seed": SEED,
        "device": f"fake tensors, no GPU; times: CPU seconds of one thread, {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
        "versions": {p: version(p) for p in ("torch", "timm", "transformers", "peft")},
    }
    content["tables"] = [table(content)]
    TARGET.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(*(" | ".join(row) for row in content["tables"][0]["rows"]), sep="\n")


if __name__ == "__main__":
    main()
