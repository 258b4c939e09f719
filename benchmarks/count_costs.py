"""Count what each method costs on a ViT-S/16 at 224 px, and write benchmarks/counted.json.

Nothing is timed and no weight values matter: FLOPs are counted on `meta`, so the figures are the
same on every machine. `make docs` puts them into the cards.

    python -m benchmarks.count_costs
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import peft_vision as pv

NAME = "timm/vit_small_patch16_224"
NOTE = f"Counted on `{NAME}`, 224 px, batch size 1, without weights"
RUNS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "bitfit": ("which", ("all", "attention", "norms")),
    "bottleneck_adapter": ("width", (16, 64)),
    "decoupled_position": ("std", (0.0,)),
    "linear_head": ("outputs", (1000, 10)),
    "lora": ("r", (4, 16, 64)),
    "mlp_head": ("layers", (2, 3)),
    "vpt": ("tokens", (5, 10, 50)),
    "magnitude": ("ratio", (0.1, 0.3, 0.5, 0.7)),
    "mixture_of_heads": ("skip", (0.25, 0.5, 0.75)),
    "path_pruning": ("share", (0.1, 0.25, 0.5)),
    "pooled_last_block": ("", (None,)),
    "query_key": ("ratio", (0.25, 0.5, 0.75)),
    "sparse_attention": ("keep", (0.75, 0.5, 0.25)),
    "svd": ("ratio", (0.1, 0.3, 0.5, 0.7)),
    "tensor_train": ("ratio", (0.1, 0.3, 0.5, 0.7)),
    "token_merging": ("ratio", (0.02, 0.05, 0.08, 0.11)),
    "token_reorganization": ("keep_rate", (0.9, 0.7, 0.5, 0.3)),
    "union_of_experts": ("skip", (0.25, 0.5, 0.75)),
    "vib": ("train", ("masks", "full")),
}
COLUMNS = ["", "GMACs", "of the model's FLOPs", "parameters", "of these trained"]


def table(method: str) -> dict[str, Any]:
    """One row per value of the method's main setting, after one for the model as it was."""
    setting, values = RUNS[method]
    before = pv.measure(pv.create_model(NAME, pretrained=False))
    rows = [row("untouched", before, before.flops)]
    for value in values:
        given = {setting: value} if setting else {}
        model = pv.wrap(pv.create_model(NAME, pretrained=False), method=method, **given)
        rows.append(
            row(f"`{setting}={value}`" if setting else "with it", pv.measure(model), before.flops)
        )
    return {"method": method, "columns": COLUMNS, "rows": rows, "note": NOTE}


def row(name: str, cost: Any, whole: int) -> list[str]:
    """One line of the table."""
    return [
        name,
        f"{cost.gmacs:.3f}",
        f"{cost.flops / whole:.3f}",
        f"{cost.params / 1e6:.2f} M",
        f"{cost.trainable / 1e6:.2f} M ({cost.trainable / cost.params:.1%})",
    ]


def main() -> None:
    """Write the figures beside this file."""
    torch.manual_seed(0)
    content = json.dumps({"tables": [table(method) for method in RUNS]}, indent=1)
    target = Path(__file__).with_name("counted.json")
    target.write_text(content + "\n", encoding="utf-8")
    print(target.name)


if __name__ == "__main__":
    main()
