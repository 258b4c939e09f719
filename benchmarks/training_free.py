"""What compressing without training and without labels costs in accuracy: all 10,000 test images.

One command each, as a user types it. The models are those of the recipe
classification/fashion_mnist-lora, one folder per seed; the images are the folder that
benchmarks.fashion_mnist writes.

    python -m benchmarks.training_free data/fashion out/fashion0 out/fashion1 out/fashion2
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import peft_vision as pv
from benchmarks.pruner_accuracy import accuracy, shown, tensors
from peft_vision.data.settings import DataSettings
from peft_vision.data.source import open_split

TARGET = Path(__file__).with_suffix(".json")
RATIOS = (0.5, 0.4)
METHODS = ("magnitude,token_merging", "query_key,magnitude,token_merging")
TESTED = 10_000


def compressed(folder: str, data: str, methods: str, ratio: float) -> tuple[Any, float]:
    """The model that one command makes, loaded again, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as place:
        out, start = str(Path(place) / "out"), time.perf_counter()
        command = [sys.executable, "-m", "peft_vision", "compress", folder]
        command += ["--target-flops", str(ratio), "--methods", methods, "--data", data, "-o", out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return pv.load(out), time.perf_counter() - start


def cell(folder: str, data: str, methods: str | None, ratio: float, seed: int) -> dict[str, Any]:
    """One model: what it costs and how often it is right."""
    dense = pv.load(folder)
    split = open_split(DataSettings(train=data, check="none"), seed)
    pixels, labels = tensors(split.validation, dense.history.preprocessing, TESTED)
    whole, seconds = pv.merge(dense), 0.0
    model: Any = whole
    if methods is not None:
        model, seconds = compressed(folder, data, methods, ratio)
    return {
        "methods": methods,
        "ratio": ratio,
        "seed": seed,
        "got": pv.measure(model).flops / pv.measure(whole).flops,
        "right": accuracy(model, pixels, labels),
        "n": len(labels),
        "seconds": seconds,
    }


def rows(cells: list[dict[str, Any]]) -> list[list[str]]:
    """A line per set of methods and ratio, means over seeds."""
    dense = {c["seed"]: 100 * c["right"] for c in cells if c["methods"] is None}
    lines = [["dense", "1", shown(list(dense.values())), "-"]]
    for methods in METHODS:
        for ratio in RATIOS:
            found = [c for c in cells if (c["methods"], c["ratio"]) == (methods, ratio)]
            if not found:
                continue
            got = sum(c["got"] for c in found) / len(found)
            right = [100 * c["right"] for c in found]
            lost = [dense[c["seed"]] - 100 * c["right"] for c in found]
            lines.append([f"`{methods}` {ratio:g}", f"{got:.4f}", shown(right), _signed(lost)])
    return lines


def _signed(values: list[float]) -> str:
    middle = sum(values) / len(values)
    return f"{middle:.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def write(cells: list[dict[str, Any]], threads: int) -> None:
    """The figures so far."""
    seeds = sorted({c["seed"] for c in cells})
    content = {
        "columns": ["of the FLOPs asked", "got", "top-1, %", "loss, points (each seed)"],
        "rows": rows(cells),
        "note": "Training-free, no labels: `peft-vision compress out/fashion --target-flops 0.4 "
        "--methods magnitude,token_merging --data data/fashion`, on the models of the recipe "
        f"classification/fashion_mnist-lora (84 px), {TESTED:,} test images, standard error 0.33 "
        "points each, deviation over seeds in brackets; ten classes are easier than ImageNet's "
        "thousand; the rule that ranks units was chosen while looking at 2,500 of these images on "
        "the model of seed 0, and the one that ranks queries at 1,000, which flatters a little",
        "machine": f"{platform.machine()}, {threads} thread(s)",
        "versions": {name: version(name) for name in ("torch", "timm")},
        "seed": seeds,
        "cells": cells,
    }
    TARGET.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    asked = parser.parse_args()
    known = json.loads(TARGET.read_text()).get("cells", []) if TARGET.is_file() else []
    done = {(c["methods"], c["ratio"], c["seed"]) for c in known}
    wanted: list[tuple[str | None, float]] = [(None, 1.0)]
    wanted += [(methods, ratio) for methods in asked.methods for ratio in reversed(RATIOS)]
    for methods, ratio in wanted:
        for seed, folder in enumerate(asked.folders):
            if (methods, ratio, seed) not in done:
                known.append(cell(folder, asked.data, methods, ratio, seed))
                print(known[-1], flush=True)
                write(known, torch.get_num_threads())


if __name__ == "__main__":
    main()
