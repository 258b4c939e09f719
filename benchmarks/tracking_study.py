"""Does it learn to track? On sequences made from photographs that it was not trained on.

LoRAT as a recipe trains it, against the same without low-rank updates, the same with positions that
are not decoupled, and two trackers that learn nothing. Every run goes through the public commands'
functions; a run that is in the file already is not done again.

    python -m benchmarks.tracking_study OUT --seeds 0 1 2 [--cup FOLDER]

`--cup` is a folder of frames with groundtruth.txt, as `python -m benchmarks.cup_video` writes it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import peft_vision as pv
from benchmarks.tracking_baselines import Correlation, Still
from peft_vision.finetuning.pairs import PairsJob
from peft_vision.recipe import Recipe, load_recipe
from peft_vision.training.fit import fit

TARGET = Path(__file__).with_suffix(".json")
RECIPE = "demo/tracking"
SEQUENCES = 20
LORAT = "LoRAT"
LEARNED = {
    LORAT: "",
    "head only (no LoRA)": "head",
    "positions not decoupled": "apart",
}
STILL = {"normalised cross-correlation": Correlation, "a box that never moves": Still}
COLUMNS = ["tracker", "SUC", "P_norm", "P (20 px)", "OP50", "pairs' IoU", "trained"]


def variant(recipe: Recipe, how: str) -> Recipe:
    """The recipe with one thing left out."""
    if not how:
        return recipe
    settings = dict(recipe.methods[0].settings)
    shared = {key: settings[key] for key in ("streams", "kinds", "std")}
    if how == "apart":  # a table of its own for each image, and nothing that tells them apart
        shared |= {"kinds": [1, 1], "fit": "resize", "std": 0.0}
    methods: list[Any] = [
        {"name": "decoupled_position", **shared},
        {"name": "mlp_head", "readout": settings["readout"], "std": settings["std"]},
    ]
    if how == "apart":
        low_rank = {key: settings[key] for key in ("r", "alpha", "init")}
        methods.append({"name": "lora", "split_qkv": True, "train_head": False, **low_rank})
    return Recipe.model_validate({**recipe.model_dump(), "methods": methods})


def train(recipe: Recipe, how: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one variant and save it."""
    job = PairsJob(variant(recipe, how).model_copy(update={"seed": seed}))
    model = job.build()
    if how == "apart":
        for name, parameter in model.named_parameters():
            if name.endswith("type_embed"):
                parameter.requires_grad_(False)
    learning = job.learning(model)
    start = time.perf_counter()
    figures = fit(
        learning.model, learning.task, learning.train, learning.validation, recipe.train, seed=seed
    )
    model.save_pretrained(folder, overwrite=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "iou": figures["iou"],
        "trained": trained,
        "seconds": time.perf_counter() - start,
        "steps": figures["steps"],
    }


def evaluated(tracker: Any, data: Any) -> dict[str, float]:
    """Figures by LaSOT's conventions."""
    batch = 8 if isinstance(tracker, str) else 1
    found = pv.tracking.evaluate(tracker, data, dialect="otb", batch=batch)
    if found.skipped:
        raise RuntimeError(f"skipped: {found.skipped}")
    return {**found.figures, "sequences": float(found.sequences)}


def run(name: str, seed: int, folder: Path, cup: str | None) -> dict[str, Any]:
    """One row of one seed."""
    torch.manual_seed(seed)
    found: dict[str, Any] = {"name": name, "seed": seed}
    if name in STILL:
        tracker: Any = STILL[name]()
    else:
        place = folder / f"{list(LEARNED).index(name)}-{seed}"
        found |= train(load_recipe(RECIPE).recipe, LEARNED[name], seed, place)
        tracker = str(place)
    held_out = pv.tracking.read_sequences("demo/tracking", split="test")
    found["test"] = evaluated(tracker, held_out.only(range(SEQUENCES)))
    if cup is not None:
        found["cup"] = evaluated(tracker, cup)
    return found


def shown(values: list[float], factor: float = 100.0) -> str:
    """Mean and, of several seeds, the standard deviation."""
    if not values:
        return "-"
    middle = factor * statistics.fmean(values)
    if len(values) < 2:
        return f"{middle:.1f}"
    return f"{middle:.1f} ({factor * statistics.stdev(values):.1f})"


def table(cells: list[dict[str, Any]], data: str) -> list[list[str]]:
    """One line per tracker."""
    lines = []
    for name in (*LEARNED, *STILL):
        found = [cell for cell in cells if cell["name"] == name and data in cell]
        if not found:
            continue
        names = ("SUC", "P_norm", "P", "OP50")
        figures = [shown([cell[data][key] for cell in found]) for key in names]
        pairs = shown([cell["iou"] for cell in found if "iou" in cell])
        trained = f"{found[0]['trained'] / 1e6:.2f} M" if "trained" in found[0] else "-"
        lines.append([name, *figures, pairs, trained])
    return lines


def write(cells: list[dict[str, Any]], target: Path) -> None:
    """The file, whole."""
    learned = [cell for cell in cells if "steps" in cell]
    seeds = sorted({cell["seed"] for cell in learned})
    steps = int(learned[0]["steps"]) if learned else 0
    count = int(cells[0]["test"]["sequences"])
    note = (
        f"{count} held-out sequences made from photographs; recipe {RECIPE}, {steps} steps, CPU; "
        f"mean (standard deviation) of seeds {', '.join(map(str, seeds))}; one-pass evaluation by "
        "LaSOT's conventions, in percent"
    )
    cup = (
        "cup.mp4 of the documentation of OpenCV, boxes by color thresholds: one easy sequence, "
        "no benchmark"
    )
    tables = [
        {"method": "tracking", "columns": COLUMNS, "rows": table(cells, "test"), "note": note}
    ]
    if any("cup" in cell for cell in cells):
        tables.append(
            {"method": "tracking", "columns": COLUMNS, "rows": table(cells, "cup"), "note": cup}
        )
    content = {
        "tables": tables,
        "cells": cells,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "timm", "peft", "transformers")},
    }
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=[*STILL, *LEARNED])
    parser.add_argument("--cup")
    parser.add_argument("--output", type=Path, default=TARGET)
    asked = parser.parse_args()
    cells = json.loads(asked.output.read_text())["cells"] if asked.output.is_file() else []
    known = {(cell["name"], cell["seed"]) for cell in cells}
    for seed in asked.seeds:
        for name in asked.only:
            if (name, seed) in known or (name in STILL and seed != asked.seeds[0]):
                continue
            cells.append(run(name, seed, asked.folder, asked.cup))
            print(json.dumps(cells[-1]), flush=True)
            write(cells, asked.output)


if __name__ == "__main__":
    main()
