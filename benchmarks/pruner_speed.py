"""How fast pruned models are beside the dense one: DeiT-S in float32, in turns, in one process.

Weights are random: the time does not depend on them. What only masks is not here; it takes the time
of the dense model.

    python -m benchmarks.pruner_speed
    python -m benchmarks.pruner_speed --device cuda --dtype bfloat16 --compile --output gpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch

import peft_vision as pv
from peft_vision.cost import time_on, unwrap

NAME, BATCH, ROUNDS = "deit_small_patch16_224", 16, 15
TARGET = Path(__file__).with_suffix(".json")

WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "`pooled_last_block`": ("pooled_last_block", {}),
    "`token_reorganization` 0.7": ("token_reorganization", {"keep_rate": 0.7}),
    "`token_reorganization` 0.5": ("token_reorganization", {"keep_rate": 0.5}),
    "`query_key` 0.5": ("query_key", {"ratio": 0.5}),
    "`path_pruning`, half of the paths": ("path_pruning", {"share": 0.5}),
}
COMPRESSED: dict[str, tuple[float, list[str]]] = {
    "`token_merging` to 0.66": (0.66, ["token_merging"]),
    "`token_merging` to 0.5": (0.5, ["token_merging"]),
    "`magnitude` to 0.5": (0.5, ["magnitude"]),
    "`query_key,magnitude` to 0.5": (0.5, ["query_key", "magnitude"]),
    "`magnitude,token_merging` to 0.4": (0.4, ["magnitude", "token_merging"]),
}


def models() -> dict[str, torch.nn.Module]:
    """The dense model and everything that is made of it."""
    torch.manual_seed(0)
    dense = timm.create_model(NAME).eval()
    found: dict[str, torch.nn.Module] = {"dense": dense}
    for label, (method, settings) in WRAPPED.items():
        copy = timm.create_model(NAME).eval()
        found[label] = unwrap(pv.wrap(copy, method, **settings)).eval()
    for label, (ratio, methods) in COMPRESSED.items():
        found[label] = unwrap(pv.compress(dense, target_flops=ratio, methods=methods).model).eval()
    return found


def main() -> None:
    """Time everything in turns and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--output", type=Path, default=TARGET)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    dtype: torch.dtype = getattr(torch, asked.dtype)
    all_of_them = {label: model.to(asked.device, dtype) for label, model in models().items()}
    images = torch.randn(BATCH, 3, 224, 224, device=asked.device, dtype=dtype)
    costs = {label: pv.measure(model).flops for label, model in all_of_them.items()}
    if asked.compile:
        all_of_them = {label: torch.compile(model) for label, model in all_of_them.items()}
        with torch.no_grad():
            for model in all_of_them.values():
                model(images)
    times = time_on(all_of_them, images, rounds=asked.rounds)
    dense, macs = times["dense"].milliseconds, costs["dense"]
    rows = []
    for label, timing in times.items():
        ratios = [was / now for was, now in zip(dense, timing.milliseconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        share = costs[label] / macs
        rows.append([label, f"{share:.3f}", f"{middle:.2f}x", f"{low:.2f} to {high:.2f}"])
        print(rows[-1], flush=True)
    how = f"{asked.threads} threads" if asked.device == "cpu" else "GPU"
    how += ", compiled" if asked.compile else ""
    content = {
        "columns": ["", "of the MACs", "speed-up, median", "quartiles"],
        "rows": rows[1:],
        "note": f"{NAME}, {asked.dtype}, batch {BATCH}, {how}, {asked.rounds} rounds",
        "machine": platform.machine() if asked.device == "cpu" else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "timm")},
        "seed": 0,
    }
    asked.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
