"""Count the trained parameters of the preset `lorat` beside the published ones; writes JSON.

Structures without weights, so the figures are the same on every machine.

    python -m benchmarks.lorat_parameters
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import timm
import torch

import peft_vision as pv

PUBLISHED = {
    "vit_base_patch14_dinov2": ("10.6", "13.0"),
    "vit_large_patch14_dinov2": ("28.3", "32.5"),
    "vit_giant_patch14_dinov2": ("70.8", "80.2"),
}
"""Millions: the low-rank updates, and all that is trained."""
COLUMNS = ["backbone", "updates", "head", "type rows", "all trained", "published (updates, all)"]
NOTE = (
    "Trained parameters of the preset `lorat` (r = 64, template 112 px, search image 224 px, box "
    "head), counted"
)


def counted(name: str) -> Counter[str]:
    """Trained parameters by part."""
    with torch.device("meta"):
        model = timm.create_model(name, img_size=518, num_classes=0)
        settings = {"streams": (112, 224), "kinds": (2, 1), "readout": "boxes"}
        adapted = pv.wrap(model, "lorat", **settings)
    found: Counter[str] = Counter()
    for path, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            rest = "type rows" if "type_embed" in path else "head"
            found["updates" if "lora_" in path else rest] += parameter.numel()
    return found


def main() -> None:
    """Write the figures beside this file."""
    rows = []
    for name, published in PUBLISHED.items():
        found = counted(name)
        parts = [f"{found[part]:,}" for part in ("updates", "head", "type rows")]
        rows.append([f"`{name}`", *parts, f"{found.total():,}", " M, ".join(published) + " M"])
    table = {"method": "lora", "columns": COLUMNS, "rows": rows, "note": NOTE}
    target = Path(__file__).with_name("lorat_parameters.json")
    target.write_text(json.dumps({"tables": [table]}, indent=1) + "\n", encoding="utf-8")
    print(target.name)


if __name__ == "__main__":
    main()
