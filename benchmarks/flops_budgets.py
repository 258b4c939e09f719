"""Compress real architectures to four budgets and count three times; writes flops_budgets.json.

Each result is counted when it is built, counted again on the model reloaded from its folder, and
derived a third time by the closed form of a transformer from the shapes that are left. Weights are
random: a count does not depend on them.

    python -m benchmarks.flops_budgets
"""

from __future__ import annotations

import json
import math
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import peft_vision as pv
from peft_vision.backbones.sites import Backbone
from peft_vision.cost import unwrap

RATIOS = (0.8, 0.6, 0.4, 0.25)
SEED = 0


def architectures() -> dict[str, nn.Module]:
    """Names and models, with random weights."""
    found: dict[str, nn.Module] = {
        name: timm.create_model(name, **kwargs)
        for name, kwargs in {
            "deit_small_patch16_224": {},
            "deit3_base_patch16_224": {},
            "vit_small_patch14_reg4_dinov2": {"img_size": 224, "num_classes": 1000},
            "vit_base_patch16_clip_224": {"num_classes": 1000},
            "vit_base_patch16_siglip_224": {"num_classes": 1000},
            "eva02_small_patch14_224": {"num_classes": 1000},
            "vit_small_patch16_dinov3": {"num_classes": 1000},
        }.items()
    }
    found["transformers ViTForImageClassification"] = ViTForImageClassification(
        ViTConfig(num_labels=1000)
    )
    return found


def closed_form(backbone: Backbone) -> int:
    """Multiply-accumulates of one image, from shapes alone."""
    tokens = backbone.tokens
    assert tokens is not None
    patch = backbone.convs[0].layer
    assert isinstance(patch, nn.Conv2d)
    _, height, width = backbone.input_size or (0, 0, 0)
    patches = (height // patch.kernel_size[0]) * (width // patch.kernel_size[1])
    d = patch.out_channels
    total = patches * d * patch.in_channels * patch.kernel_size[0] * patch.kernel_size[1]
    trunk = tokens.trunk_if_any()
    for heads, hidden in zip(backbone.heads, backbone.hidden, strict=True):
        n = patches + tokens.prefix
        a = heads.count * int(getattr(heads.attention, heads.parts.head_dim))
        rows = (trunk and trunk.rows_of(heads.block)) or n
        total += 2 * (n + rows) * d * a + 2 * rows * n * a
        reducer = dict(trunk.reducers.items()).get(str(heads.block)) if trunk else None
        if reducer is not None and rows == n:
            more, patches = reduced(reducer, patches, tokens.prefix, d)
            total += more
        gated = len(hidden.parts.up) * hidden.parts.packed
        rows = patches + tokens.prefix if rows == n else rows
        total += rows * d * hidden.count * (gated + 1)
    if trunk is not None and trunk.restore:
        patches = (height // patch.kernel_size[0]) * (width // patch.kernel_size[1])
    return total + pooling(backbone, patches, d)


def reduced(reducer: Any, before: int, prefix: int, d: int) -> tuple[int, int]:
    """What finding alike patches and merging them costs in a block, and how many are left."""
    merged = min(math.floor(reducer.share * before + 0.5), before // 2)
    left = before - merged
    alike = (before - before // 2) * (before // 2) * d
    return alike + (prefix + left) * merged * d, left


def pooling(backbone: Backbone, patches: int, d: int) -> int:
    """The attention pool (one query over all patches, an MLP behind it) and the classifier."""
    total = sum(int(site.layer.weight.numel()) for site in backbone.classifier)  # type: ignore[union-attr]
    if backbone.tokens is not None and backbone.tokens.pooling == "attention":
        total += 2 * d * d + patches * 2 * d * d + 2 * patches * d + 2 * d * 4 * d
    return total


def row(name: str, model: nn.Module, ratio: float, folder: Path) -> dict[str, Any]:
    """Asked, got, and the two further counts."""
    result = pv.compress(model, target_flops=ratio)
    result.save_pretrained(folder, overwrite=True)
    again = unwrap(pv.load(folder))
    dense = result.before.flops
    return {
        "model": name,
        "asked": ratio,
        "got": result.ratio,
        "reloaded": pv.measure(again).flops / dense,
        "closed_form": 2 * closed_form(pv.view(again)) / dense,
        "gmacs": result.cost.gmacs,
        "params": result.cost.params / result.before.params,
        "seconds": result.seconds,
        "candidates": result.tried,
        "notes": result.notes,
    }


def main() -> None:
    """Write the figures beside this file."""
    torch.manual_seed(SEED)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in architectures().items():
            for ratio in RATIOS:
                rows.append(row(name, model.eval(), ratio, Path(scratch) / "out"))
                print(rows[-1], file=sys.stderr)
    content = {
        "seed": SEED,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {p: version(p) for p in ("torch", "timm", "transformers")},
        "rows": rows,
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(target.name)


if __name__ == "__main__":
    main()
