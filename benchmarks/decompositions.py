"""What decompositions leave of a ResNet-50 and a ConvNeXt-T: parameters, MACs, time, and error.

Weights are random: cost and time do not depend on them. Errors do: the spectra of random weights
are flat, so that those of trained networks are smaller.

    python -m benchmarks.decompositions
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
from torch import nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import measure, time_on, unwrap
from peft_vision.errors import BudgetUnreachable, PeftVisionError
from peft_vision.layers.factorized import Factored, relative_error
from peft_vision.method import make

TARGET = Path(__file__).with_suffix(".json")
SIDE, BATCH, ASKED = 160, 4, 0.5
METHODS = ("one_way", "svd", "tucker", "tensor_train", "cp", "band")
TOGETHER = {"resnet50": ("svd", "tucker"), "convnext_tiny": ("svd", "one_way")}
CONVS: dict[str, dict[str, Any]] = {"tensor_train": {"layers": ("convs",)}}
"""Settings of methods that would factor linears otherwise, at which they save little."""
COLUMNS = ["", "of the MACs", "of the parameters", "time of dense", "quartiles", "weight error"]


def smaller(dense: nn.Module, methods: tuple[str, ...]) -> tuple[str, nn.Module | None]:
    """To half of the MACs; where a method cannot go so far, as far as it can."""
    label = " and ".join(f"`{name}`" for name in methods)
    chosen = [make(name, CONVS.get(name, {})) for name in methods]
    try:
        result = pv.compress(dense, target_flops=ASKED, methods=chosen, image_size=SIDE)
        return f"{label} to {ASKED}", unwrap(result.model)
    except BudgetUnreachable:
        again = timm.create_model(dense.default_cfg["architecture"])  # type: ignore[union-attr, index]
        again.load_state_dict(dense.state_dict())
        settings = {"ratio": 0.7, **CONVS.get(methods[0], {})}
        made = pv.wrap(again.eval(), methods[0], image_size=SIDE, **settings)
        return f"{label}, ratio 0.7", unwrap(made)
    except PeftVisionError as refused:
        print(f"{label}: {refused}", flush=True)
        return label, None


def error(dense: nn.Module, model: nn.Module) -> str:
    """Median over the layers that were factored."""
    weights = {
        name: m.weight
        for name, m in dense.named_modules()
        if isinstance(getattr(m, "weight", None), torch.Tensor)
    }
    found = [
        relative_error(weights[name], part)
        for name, part in model.named_modules()
        if isinstance(part, Factored)
    ]
    return f"{statistics.median(found):.2f}" if found else "-"


def table(name: str, rounds: int) -> list[list[str]]:
    """One row per method for one network."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    print(name, len(view(dense).convs), "convolutions", flush=True)
    models: dict[str, nn.Module] = {"dense": dense}
    wanted = [*((method,) for method in METHODS), TOGETHER[name]]
    for methods in wanted:
        label, model = smaller(dense, methods)
        if model is not None:
            models[label] = model.eval()
        print(label, flush=True)
    times = time_on(models, torch.randn(BATCH, 3, SIDE, SIDE), rounds=rounds)
    before, rows = measure(dense, SIDE), []
    for label, model in list(models.items())[1:]:
        pairs = zip(times["dense"].milliseconds, times[label].milliseconds, strict=True)
        low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        cost = measure(model, SIDE)
        shares = [f"{cost.flops / before.flops:.3f}", f"{cost.params / before.params:.3f}"]
        spread = f"{low:.2f} to {high:.2f}"
        rows.append([label, *shares, f"{middle:.2f}", spread, error(dense, model)])
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Factor, time in turns, and write the tables, for the overview and for each card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    for name in TOGETHER:
        rows += [[f"{name}: {row[0]}", *row[1:]] for row in table(name, rounds)]
    note = (
        f"timm's resnet50 and convnext_tiny with random weights, {SIDE} px, batch {BATCH}, "
        f"float32, one thread, {rounds} rounds in turns"
    )
    tables: list[dict[str, Any]] = []
    for method in METHODS:
        own = [row for row in rows if f"`{method}`" in row[0]]
        tables.append({"method": method, "columns": COLUMNS, "rows": own, "note": note})
    content = {
        "columns": COLUMNS,
        "rows": rows,
        "note": f"{note}; the weight error is the median over the factored layers, and random "
        "weights are the hardest to factor",
        "tables": [one for one in tables if one["rows"]],
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "timm")},
        "seed": 0,
    }
    TARGET.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
