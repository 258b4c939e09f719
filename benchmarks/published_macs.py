"""Published costs of models whose tokens leave on the way, counted again, as JSON.

Each figure of EViT, ToMe and DiffRate for a model at hand is counted twice: by `peft_vision.cost`
on `meta`, as any model is, and by the closed form of a transformer from token counts alone, which
shares nothing with it. No weights are needed.

    python -m benchmarks.published_macs
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_vision.backbones import view
from peft_vision.cost import count_flops
from peft_vision.method import Evidence, make
from peft_vision.plan import Decisions

PATCHES = 196
MODELS = {
    "DeiT-S": ("deit_small_patch16_224", 384, 12),
    "DeiT-B": ("deit_base_patch16_224", 768, 12),
    "ViT-L/16": ("vit_large_patch16_224", 1024, 24),
}
"""Name -> (timm's name, width, depth); 224 px, patches of 16, 1000 classes."""

EVIT = {
    "DeiT-S": {
        1.0: 4.60, 0.9: 4.02, 0.8: 3.48, 0.7: 3.03, 0.6: 2.64,
        0.5: 2.31, 0.4: 2.04, 0.3: 1.82, 0.25: 1.73, 0.2: 1.64,
    },
    "DeiT-B": {
        1.0: 17.57, 0.9: 15.40, 0.8: 13.33, 0.7: 11.61, 0.6: 10.09,
        0.5: 8.82, 0.4: 7.78, 0.3: 6.89, 0.25: 6.53, 0.2: 6.21,
    },
}  # fmt: skip
"""Keep rate at blocks 3, 6 and 9, fused -> GMACs."""

TOME = {
    **{
        name: {8: 0.745, 10: 0.68, 13: 0.59, 14: 0.56, 16: 0.50, 18: 0.448, 20: 0.406, 22: 0.37}
        for name in ("DeiT-S", "DeiT-B")
    },
    "ViT-L/16": {6: 0.625, 8: 0.503, 10: 0.405},
}
"""Patches merged in each block -> share of the multiply-accumulates."""

DIFFRATE = {
    "DeiT-S": (2.33, (1, 0.91, 0.79, 0.64, 0.55, 0.50, 0.41, 0.34, 0.26, 0.19, 0.16, 0.015)),
    "DeiT-B": (8.73, (1, 0.90, 0.82, 0.72, 0.58, 0.49, 0.40, 0.30, 0.24, 0.11, 0.07, 0.015)),
}
"""GMACs, and the share of the tokens left behind each block."""


@dataclass(frozen=True)
class Case:
    """One published figure: how it is reached, and what patches are left behind each block.

    Attributes:
        published: GMACs, or the share of the untouched model's where below 1.
    """

    method: str
    model: str
    setting: str
    published: float
    decisions: Decisions
    left: tuple[int, ...]


def cases() -> list[Case]:
    """Every figure."""
    return [*evit(), *tome(), *diffrate()]


def evit() -> list[Case]:
    """Three drops, what leaves fused into one."""
    found = []
    for name, figures in EVIT.items():
        for rate, published in figures.items():
            left, now = [], PATCHES
            for block in range(12):
                if block in (3, 6, 9) and rate < 1:
                    now = math.ceil(rate * now - 1e-9) + 1
                left.append(now)
            settings = {"keep_rate": rate}
            decisions = decided("token_reorganization", settings, name)
            found.append(
                Case("token_reorganization", name, f"keep_rate={rate:g}", published, decisions,
                     tuple(left))
            )  # fmt: skip
    return found


def tome() -> list[Case]:
    """The same number merged in each block, at most half."""
    found = []
    for name, figures in TOME.items():
        for going, published in figures.items():
            left, now = [], PATCHES
            for _ in range(MODELS[name][2]):
                now -= min(going, now // 2)
                left.append(now)
            settings = {"ratio": going / PATCHES, "metric": "keys"}
            decisions = decided("token_merging", settings, name)
            found.append(
                Case("token_merging", name, f"ratio={going}/196", published, decisions, tuple(left))
            )
    return found


def diffrate() -> list[Case]:
    """Learned numbers of tokens; those that go are dropped here, which costs the same."""
    found = []
    for name, (published, shares) in DIFFRATE.items():
        left = tuple(math.ceil(share * (PATCHES + 1)) - 1 for share in shares)
        before = (PATCHES, *left[:-1])
        decisions: Decisions = {
            f"blocks.{block}.tokens": {"keep_rate": now / arriving, "fuse": False}
            for block, (now, arriving) in enumerate(zip(left, before, strict=True))
            if now < arriving
        }
        found.append(
            Case("token_reorganization", name, "DiffRate's numbers", published, decisions, left)
        )
    return found


def decided(method: str, settings: dict[str, Any], name: str) -> Decisions:
    """What the method decides on the model."""
    technique = make(method, settings)
    return technique.decide(view(built(name)), technique.strength, Evidence())


def built(name: str) -> nn.Module:
    """The model without weights."""
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model(MODELS[name][0])
    return model


def counted(case: Case) -> float:
    """GMACs by our counter, with what ranking, matching and merging cost."""
    model = built(case.model)
    make(case.method).apply(view(model), case.decisions)
    return count_flops(model, (3, 224, 224)) / 2e9


def closed_form(name: str, left: Sequence[int]) -> float:
    """GMACs from the patches left behind each block: tokens leave between attention and MLP."""
    _, d, _ = MODELS[name]
    total, n = PATCHES * d * 3 * 16**2 + d * 1000, PATCHES + 1
    for patches in left:
        total += 4 * n * d * d + 2 * n * n * d
        n = patches + 1
        total += 2 * n * d * 4 * d
    return total / 1e9


def extras(case: Case) -> float:
    """GMACs of choosing and joining tokens, also in closed form."""
    _, d, _ = MODELS[case.model]
    total, before = 0, PATCHES
    for now in case.left:
        gone = before - now
        if gone and case.method == "token_merging":
            total += math.ceil(before / 2) * (before // 2) * 64 + (now + 1) * gone * d
        elif gone:
            fused = case.setting.startswith("keep_rate")
            total += (before + 1) * d + fused * before * d
        before = now
    return total / 1e9


def row(case: Case) -> dict[str, Any]:
    """Published, counted, and derived, in GMACs; `rounding` is half of the last digit printed."""
    whole = closed_form(case.model, [PATCHES] * MODELS[case.model][2])
    published = case.published if case.published >= 1 else case.published * whole
    return {
        "method": case.method,
        "model": case.model,
        "setting": case.setting,
        "published": published,
        "rounding": published * last_digit(case.published) / case.published / 2,
        "counted": counted(case),
        "closed_form": closed_form(case.model, case.left),
        "extras": extras(case),
        "whole": whole,
    }


def last_digit(figure: float) -> float:
    """What one step of a printed figure is worth: 0.001 of 0.745, 0.01 of 4.6."""
    printed = f"{figure:g}"
    return 10.0 ** -max(2, len(printed.partition(".")[2]))


def tables(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One table per method, for its card."""
    columns = ["model", "setting", "published GMACs", "counted", "closed form", "of the model"]
    note = (
        "Published figures counted again, 224 px; the count includes choosing and joining tokens, "
        "the closed form does not"
    )
    found = []
    for method in dict.fromkeys(entry["method"] for entry in rows):
        lines = [
            [
                entry["model"],
                f"`{entry['setting']}`" if "=" in entry["setting"] else entry["setting"],
                *(f"{entry[key]:.2f}" for key in ("published", "counted", "closed_form")),
                f"{entry['counted'] / entry['whole']:.3f}",
            ]
            for entry in rows
            if entry["method"] == method
        ]
        found.append({"method": method, "columns": columns, "rows": lines, "note": note})
    return found


def main() -> None:
    """Write the figures beside this file."""
    rows = [row(case) for case in cases()]
    content = {
        "tables": tables(rows),
        "rows": rows,
        "worst": max(abs(entry["counted"] / entry["published"] - 1) for entry in rows),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "timm")},
    }
    target = Path(__file__).with_name("published_macs.json")
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{target.name}: {len(rows)} figures, the worst off by {content['worst']:.2%}")


if __name__ == "__main__":
    main()
