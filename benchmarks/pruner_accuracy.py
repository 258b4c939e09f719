"""Accuracy of pruners at equal cost, on real images: training-free, and after the same recovery.

The dense models are those of the recipe classification/fashion_mnist-lora, one folder per seed; the
images are the folder that benchmarks.fashion_mnist writes.

    python -m benchmarks.pruner_accuracy data/fashion out/fashion0 out/fashion1 out/fashion2
"""

from __future__ import annotations

import argparse
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.data import preprocessing
from peft_vision.data.image_set import ImageSet
from peft_vision.data.images import limited
from peft_vision.data.settings import Augmentation, DataSettings
from peft_vision.data.source import Split, open_split
from peft_vision.errors import BudgetUnreachable
from peft_vision.method import make
from peft_vision.recovery import recover
from peft_vision.training.settings import TrainSettings

TARGET = Path(__file__).with_suffix(".json")
RATIOS = (0.9, 0.8, 0.65, 0.5)
"""The first is there for what cannot go further alone."""
TRAINED, TESTED, CALIBRATED, EPOCHS, TRIALS = 768, 1000, 256, 1, 4
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "`magnitude`, weights alone": ("magnitude", {"images": 0}),
    "`magnitude`": ("magnitude", {}),
    "`token_reorganization`": ("token_reorganization", {}),
    "`token_merging`": ("token_merging", {}),
    "`magnitude,token_merging`": (["magnitude", "token_merging"], {}),
    "`path_pruning`": ("path_pruning", {"images": 128}),
    "`vib`, 120 steps": ("vib", {"steps": 120, "batch": 16}),
    "`union_of_experts`": ("union_of_experts", {}),
    "`mixture_of_heads`": ("mixture_of_heads", {}),
    "`mixture_of_heads,union_of_experts`": (["mixture_of_heads", "union_of_experts"], {}),
    "`sparse_attention`": ("sparse_attention", {}),
    "`query_key`": ("query_key", {}),
    "`query_key,magnitude,token_merging`": (["query_key", "magnitude", "token_merging"], {}),
}


def tensors(data: Any, described: Any, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` images, prepared, and their labels."""
    drawn = ImageSet(limited(data, count, seed), preprocessing.evaluation_transform(described))
    samples = [drawn[i] for i in range(len(drawn))]
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return pixels, torch.tensor([sample["labels"] for sample in samples])


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    model.eval()
    answers = torch.cat([model(x).argmax(1) for x in pixels.split(100)])
    return float((answers == labels).float().mean())


def run(folder: str, data: str, name: str, ratio: float | None, seed: int) -> dict[str, Any]:
    """One cell: compress, count, evaluate, recover, evaluate."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    dense = pv.load(folder)
    described = dense.history.preprocessing
    split = open_split(DataSettings(train=data, check="none"), seed)
    pixels, labels = tensors(split.validation, described, TESTED)
    found = {"name": name, "ratio": ratio, "seed": seed, "n": len(labels)}
    if name == "dense":  # what recovery does to a model that has nothing to recover
        whole = pv.wrap(pv.merge(dense), "magnitude", ratio=0.0)
        found["free"] = accuracy(whole, pixels, labels)
        return {**found, "recovered": taught(whole, dense, split, seed, pixels, labels)}
    methods, how = RUNS[name]
    count = how.get("images", CALIBRATED)
    given = tensors(split.train, described, count, seed)[0] if count else None
    batches = None if given is None else given.split(how.get("batch", 64))
    if "steps" in how:
        methods = make(methods, {"steps": how["steps"]})
    try:
        result = pv.compress(
            dense, target_flops=ratio, methods=methods, data=batches, trials=TRIALS
        )
    except BudgetUnreachable as error:
        return {**found, "refused": str(error)}
    found |= {
        "got": result.ratio,
        "seconds": result.seconds,
        "free": accuracy(result.model, pixels, labels),
        "notes": result.notes,
    }
    return {**found, "recovered": taught(result.model, dense, split, seed, pixels, labels)}


def taught(
    model: Any, dense: nn.Module, split: Split, seed: int, pixels: Tensor, labels: Tensor
) -> float:
    """Accuracy after the same short recovery."""
    part = Split(limited(split.train, TRAINED, seed), limited(split.validation, 100, 0))
    settings = TrainSettings(
        epochs=EPOCHS,
        batch_size=32,
        learning_rate=3e-5,
        warmup=0.1,
        weight_decay=0.0,
        loggers=[],
        progress=False,
        precision="fp32",
        evaluate_every=100_000,
    )
    mirrored = Augmentation(flip=0.5, crop=1.0)
    recover(
        model,
        pv.merge(dense),
        part,
        settings=settings,
        seed=seed,
        augmentation=mirrored,
        keep_better=False,  # what the same training does to all of them
    )
    return accuracy(model, pixels, labels)


def rows(cells: list[dict[str, Any]]) -> list[list[str]]:
    """One line per method: training-free / recovered accuracy at each ratio, means over seeds."""
    lines = []
    for name in ("dense", *RUNS):
        line = [name]
        for ratio in RATIOS:
            found = [c for c in cells if c["name"] == name and c["ratio"] in (ratio, None)]
            if any("refused" in c for c in found):
                line.append("out of reach")
                continue
            free = [100 * c["free"] for c in found if "free" in c]
            after = [100 * c["recovered"] for c in found if "recovered" in c]
            line.append(" / ".join(shown(values) for values in (free, after) if values) or "-")
        lines.append(line)
    return lines


def shown(values: list[float]) -> str:
    """Mean and, of several seeds, the standard deviation."""
    middle = sum(values) / len(values)
    if len(values) < 2:
        return f"{middle:.1f}"
    spread = (sum((v - middle) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{middle:.1f} ({spread:.1f})"


def main() -> None:
    """Run every cell that the file lacks and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    parser.add_argument("--ratios", type=float, nargs="*", default=list(RATIOS))
    parser.add_argument("--output", type=Path, default=TARGET)
    asked = parser.parse_args()
    wanted: list[tuple[str, float | None]] = [("dense", None)]
    wanted += [(name, ratio) for ratio in reversed(asked.ratios) for name in asked.only]
    cells = done(asked.output)
    known = {key(c) for c in cells if {"recovered", "refused"} & c.keys()}
    with ProcessPoolExecutor(asked.workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(run, folder, asked.data, name, ratio, seed)
            for name, ratio in wanted
            for seed, folder in enumerate(asked.folders)
            if (name, ratio, seed) not in known
        ]
        for job in jobs:
            new = job.result()
            cells = [*(c for c in cells if key(c) != key(new)), new]
            print(cells[-1], flush=True)
            write(cells, asked.output, len(asked.folders))


def key(cell: dict[str, Any]) -> tuple[str, float | None, int]:
    """Method, share of the cost, seed."""
    return cell["name"], cell["ratio"], cell["seed"]


def done(target: Path) -> list[dict[str, Any]]:
    """The cells of an earlier call that was cut short, or had fewer seeds."""
    if not target.is_file():
        return []
    found: list[dict[str, Any]] = json.loads(target.read_text())["cells"]
    return found


def write(cells: list[dict[str, Any]], target: Path, seeds: int) -> None:
    """The figures so far."""
    content = {
        "columns": ["", *[f"{ratio:g} of the MACs" for ratio in RATIOS]],
        "rows": rows(cells),
        "note": f"Fashion-MNIST, 84 px, {TESTED} test images, {seeds} seeds (deviation in "
        "brackets; without, one seed): top-1 in %, training-free (with "
        f"{CALIBRATED} unlabeled images, `path_pruning` 128) / after {EPOCHS} epoch "
        f"({TRAINED // 32} steps) on {TRAINED} images with distillation; "
        "out of reach: the method alone cannot go there on this model; a dash: not run. What the "
        "same recovery does to the dense model stands in its row: it is for models that are "
        "damaged, and by default `recover` keeps the weights of before where training lowers no "
        "loss",
        "machine": platform.machine(),
        "seed": list(range(seeds)),
        "versions": {name: version(name) for name in ("torch", "timm")},
        "cells": cells,
    }
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
