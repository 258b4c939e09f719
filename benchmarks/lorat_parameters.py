"""Count what the preset `lorat` trains, and a merged tracker's MACs, beside published figures.

Structures without weights, so the figures are the same on every machine.

    python -m benchmarks.lorat_parameters
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import timm
import torch
from torch import nn

import peft_vision as pv

PUBLISHED = {
    "vit_base_patch14_dinov2": ("10.6", "13.0", {224: "30"}),
    "vit_large_patch14_dinov2": ("28.3", "32.5", {224: "103", 378: "325"}),
    "vit_giant_patch14_dinov2": ("70.8", "80.2", {378: "1161"}),
}
"""Millions: the low-rank updates, and all that is trained; then GMACs by side."""
TEMPLATES = {224: 112, 378: 196}
COLUMNS = ["backbone", "updates", "head", "type rows", "all trained", "published (updates, all)"]
COSTS = ["tracker", "template, search (px)", "GMACs of a pair", "published"]
NOTE = (
    "Trained parameters of the preset `lorat` (r = 64, template 112 px, search image 224 px, box "
    "head), counted"
)
COST_NOTE = "One template and one search image through a merged tracker, counted"


def adapted(name: str, side: int) -> nn.Module:
    """A tracker without weights."""
    with torch.device("meta"):
        model = timm.create_model(name, img_size=518, num_classes=0)
        streams = (TEMPLATES[side], side)
        return pv.wrap(model, "lorat", streams=streams, kinds=(2, 1), readout="boxes")


def counted(name: str) -> Counter[str]:
    """Trained parameters by part."""
    found: Counter[str] = Counter()
    for path, parameter in adapted(name, 224).named_parameters():
        if parameter.requires_grad:
            rest = "type rows" if "type_embed" in path else "head"
            found["updates" if "lora_" in path else rest] += parameter.numel()
    return found


def costs() -> list[list[str]]:
    """MACs of every tracker."""
    rows = []
    for name, (*_, published) in PUBLISHED.items():
        for side, template in TEMPLATES.items():
            with torch.device("meta"):
                found = pv.measure(pv.merge(adapted(name, side))).gmacs
            rows.append(
                [f"`{name}`", f"{template}, {side}", f"{found:.1f}", published.get(side, "-")]
            )
    return rows


def main() -> None:
    """Write the figures beside this file."""
    rows = []
    for name, (updates, everything, _) in PUBLISHED.items():
        found = counted(name)
        parts = [f"{found[part]:,}" for part in ("updates", "head", "type rows")]
        rows.append([f"`{name}`", *parts, f"{found.total():,}", f"{updates} M, {everything} M"])
    tables = [
        {"method": "lora", "columns": COLUMNS, "rows": rows, "note": NOTE},
        {"method": "decoupled_position", "columns": COSTS, "rows": costs(), "note": COST_NOTE},
    ]
    target = Path(__file__).with_name("lorat_parameters.json")
    target.write_text(json.dumps({"tables": tables}, indent=1) + "\n", encoding="utf-8")
    print(target.name)


if __name__ == "__main__":
    main()
