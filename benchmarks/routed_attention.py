"""Time routed heads, routed experts and sparse keys against the dense layer, and write a JSON file.

One layer alone, in float32 on the CPU, in evaluation mode. Each variant takes turns with the dense
layer in one process; ratios are taken round by round, of the time on the clock and of the time that
the process had a core (the same on a quiet machine). Masked variants compute everything and are
there to be seen for what they cost.

    python -m benchmarks.routed_attention [threads]
"""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import unwrap

ROUNDS, WARM_UP = 15, 3
STEADY = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
"""Memory that a layer frees stays with the process: which layer gets the cold pages is luck."""
WIDTHS = {"ViT-S": (384, 6), "ViT-B": (768, 12)}
SIZES = {197: (224, 16), 577: (384, 8)}
HALF = {"shared": 1 / 3, "skip": 0.75, "start": 0.0}
"""A third of the heads always on, a quarter of the rest: half of the heads in all."""


def model_of(width: int, heads: int, size: int, depth: int = 1) -> nn.Module:
    """A ViT of random weights."""
    torch.manual_seed(0)
    return VisionTransformer(img_size=size, embed_dim=width, num_heads=heads, depth=depth).eval()


def wrapped(model: nn.Module, method: str, **settings: Any) -> nn.Module:
    """A copy of the model with a method."""
    return unwrap(pv.wrap(copy.deepcopy(model), method, **settings))


def masked(model: nn.Module) -> nn.Module:
    """The same model, computing everything."""
    for module in model.modules():
        if getattr(module, "gathered", None) is True:
            module.gathered = False
    return model


def attention_variants(dense: nn.Module) -> dict[str, nn.Module]:
    """Name -> the attention module of the only block."""
    halved = copy.deepcopy(dense)
    site = view(halved).heads[0]
    site.keep(range(site.count // 2))
    models = {
        "dense": dense,
        "half of the heads, heads choose": wrapped(dense, "mixture_of_heads", **HALF),
        "the same, masked": masked(wrapped(dense, "mixture_of_heads", **HALF)),
        "half of the heads, tokens choose (masked)": wrapped(
            dense, "mixture_of_heads", choice="token", **HALF
        ),
        "half of the heads, chosen by the norm of queries": wrapped(
            dense, "mixture_of_heads", router="norm", **HALF
        ),
        "half of the heads removed": halved,
        "half of the keys": wrapped(dense, "sparse_attention", keep=0.5, start=0.0),
        "a quarter of the keys": wrapped(dense, "sparse_attention", keep=0.25, start=0.0),
        "a quarter of the keys by mask": wrapped(
            dense, "sparse_attention", keep=0.25, start=0.0, mode="mask"
        ),
    }
    return {name: model.blocks[0].attn for name, model in models.items()}  # type: ignore[index, union-attr]


def mlp_variants(dense: nn.Module) -> dict[str, nn.Module]:
    """Name -> the MLP of the only block."""
    models = {"dense": dense}
    for skip in (0.5, 0.75):
        models[f"experts skip {skip:g}, by capacity"] = wrapped(
            dense, "union_of_experts", skip=skip, start=0.0
        )
        models[f"experts skip {skip:g}, by image"] = wrapped(
            dense, "union_of_experts", skip=skip, start=0.0, choice="sample"
        )
    models["experts skip 0.5, masked"] = masked(
        wrapped(dense, "union_of_experts", skip=0.5, start=0.0)
    )
    return {name: model.blocks[0].mlp for name, model in models.items()}  # type: ignore[index, union-attr]


def model_variants(dense: nn.Module) -> dict[str, nn.Module]:
    """Name -> a whole model of twelve blocks, all of them changed."""
    return {
        "dense": dense,
        "half of the heads, heads choose": wrapped(dense, "mixture_of_heads", **HALF),
        "experts skip 0.5, by capacity": wrapped(dense, "union_of_experts", skip=0.5, start=0.0),
        "half of the keys": wrapped(dense, "sparse_attention", keep=0.5, start=0.0),
    }


Spent = tuple[float, float]
"""Seconds on the clock, and seconds of a core."""


@torch.no_grad()
def turns(dense: nn.Module, other: nn.Module, x: Tensor) -> list[tuple[Spent, Spent]]:
    """What both took, round by round, taking turns."""
    times: list[list[Spent]] = [[], []]
    for _ in range(WARM_UP + ROUNDS):
        for taken, module in zip(times, (dense, other), strict=True):
            clock, core = time.perf_counter(), time.process_time()
            module.eval()(x)
            taken.append((time.perf_counter() - clock, time.process_time() - core))
    return list(zip(*times, strict=True))[WARM_UP:]


def ratios(variants: Mapping[str, nn.Module], x: Tensor) -> list[dict[str, Any]]:
    """One row per variant: its time over the dense one's, median and quartiles over the rounds."""
    rows = []
    for name, module in variants.items():
        times = turns(variants["dense"], module, x)
        row: dict[str, Any] = {"variant": name}
        for place, kind in enumerate(("clock", "core")):
            low, middle, high = quantiles([mine[place] / was[place] for was, mine in times], n=4)
            row[kind] = round(middle, 3)
            row[f"{kind}_quartiles"] = [round(low, 3), round(high, 3)]
        rows.append({**row, "core_ms": round(1e3 * median(mine[1] for _, mine in times), 2)})
    return rows


def case(layer: str, name: str, tokens: int) -> list[dict[str, Any]]:
    """The rows of one width and one number of tokens."""
    width, heads = WIDTHS[name]
    size, batch = SIZES[tokens]
    generator = torch.Generator().manual_seed(0)
    if layer == "model":
        dense = model_of(width, heads, size, depth=12)
        variants, x = model_variants(dense), torch.randn(4, 3, size, size, generator=generator)
    else:
        dense = model_of(width, heads, size)
        variants = attention_variants(dense) if layer == "attention" else mlp_variants(dense)
        x = torch.randn(batch, tokens, width, generator=generator)
    found = {"layer": layer, "model": name, "tokens": tokens, "batch": len(x)}
    return [{**found, **row} for row in ratios(variants, x)]


def main() -> None:
    """Write the figures beside this file."""
    if os.environ.keys().isdisjoint(STEADY):
        here = [sys.executable, "-m", "benchmarks.routed_attention", *sys.argv[1:]]
        os.execve(sys.executable, here, {**os.environ, **STEADY})
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.set_num_threads(threads)
    cases = [("attention", name, tokens) for tokens in SIZES for name in WIDTHS]
    cases += [("mlp", name, 197) for name in WIDTHS]
    rows = []
    for layer, name, tokens in [*cases, ("model", "ViT-S", 197)]:
        for row in case(layer, name, tokens):
            rows.append(row)
            print(row, file=sys.stderr)
    content = {
        "device": f"{platform.machine()} CPU, {threads} thread(s)",
        "dtype": "float32",
        "rounds": ROUNDS,
        "seed": 0,
        "versions": {p: version(p) for p in ("torch", "timm")},
        "note": "Times over the dense layer's in the same round, with quartiles. Freed memory "
        "stays with the process.",
        "rows": rows,
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(target.name)


if __name__ == "__main__":
    main()
