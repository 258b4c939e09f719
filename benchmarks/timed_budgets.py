"""Latency budgets on a GPU: asked, got, and timed again on the reloaded model; writes a JSON file.

Both models of a comparison are timed in turns in one process; the spread is that of the ratio.

    python -m benchmarks.timed_budgets
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import timm
import torch

import peft_vision as pv
from peft_vision.cost import example_input, time_on
from peft_vision.errors import PeftVisionError

CASES: tuple[tuple[str, dict[str, Any], torch.dtype, int], ...] = (
    ("vit_small_patch16_224", {}, torch.float32, 64),
    ("vit_base_patch16_224", {}, torch.bfloat16, 256),
    ("vit_large_patch14_dinov2", {"img_size": 224, "num_classes": 1000}, torch.bfloat16, 128),
)
SHARES = (0.8, 0.6, 0.4)


def row(model: torch.nn.Module, batch: int, share: float, folder: Path) -> dict[str, Any]:
    """One budget on one model."""
    images = example_input(model, batch=batch)
    dense = time_on({"dense": model}, images, rounds=9, calls=10)["dense"].median
    start = time.perf_counter()
    try:
        result = pv.compress(model, target_latency_ms=share * dense, batch_size=batch)
    except PeftVisionError as error:
        return {"asked_share": share, "dense_ms": dense, "error": str(error)}
    seconds = time.perf_counter() - start
    result.save_pretrained(folder, overwrite=True)
    again = pv.load(folder).to(images.device)
    both = time_on({"dense": model, "again": again}, images, rounds=15, calls=10)
    pairs = zip(both["again"].milliseconds, both["dense"].milliseconds, strict=True)
    low, middle, high = quantiles([a / d for a, d in pairs], n=4)
    return {
        "asked_share": share,
        "dense_ms": dense,
        "share_of_limit": result.got / result.limit,
        "reloaded_share_of_limit": both["again"].median / result.limit,
        "ratio_median": middle,
        "ratio_quartiles": [low, high],
        "flops_ratio": result.ratio,
        "seconds": seconds,
        "candidates": result.tried,
    }


def main() -> None:
    """Write the figures beside this file."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, kwargs, dtype, batch in CASES:
            torch.manual_seed(0)
            model = timm.create_model(name, **kwargs).to("cuda", dtype).eval()
            for share in SHARES:
                found = row(model, batch, share, Path(scratch) / "out")
                rows.append({"model": name, "dtype": str(dtype), "batch": batch, **found})
                print(rows[-1], file=sys.stderr)
    content = {
        "device": torch.cuda.get_device_name(),
        "seed": 0,
        "versions": {p: version(p) for p in ("torch", "timm")},
        "rows": rows,
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(target.name)


if __name__ == "__main__":
    main()
