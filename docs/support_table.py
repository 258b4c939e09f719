"""The table of what works on which backbone, from `benchmarks/support_matrix.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

STEPS = ("lora", "save", "compress", "reload", "onnx")
HEAD = ["family", "model tried", "M", "seen as", "LoRA", "saved", "compressed", "reloaded", "ONNX"]
SOURCES = {"timm": "timm", "transformers": "transformers"}

Table = Callable[[list[str], list[list[str]]], str]


def support_table(content: dict[str, Any], table: Table, taken: str) -> str:
    """A table per library, how many of each column work, and the reasons of what does not."""
    parts = []
    for provider, title in SOURCES.items():
        cells = [cell for cell in content["cells"] if cell["provider"] == provider]
        if cells:
            parts += [f"## {title}", counts(cells), table(HEAD, [row(cell) for cell in cells])]
            reasons = why(cells)
            if reasons:
                parts += ["### Where and why not", table(["family", "step", "why"], reasons)]
    parts.append(f"`benchmarks/support_matrix.json`, {taken}")
    return "\n\n".join(parts)


def row(cell: dict[str, Any]) -> list[str]:
    """One family."""
    name = f"`{cell['family']}`"
    if "refused" in cell:
        return [name, f"`{cell['model']}`" if cell["model"] else "", "", *["no"] * 6]
    size = f"{cell['parameters'] / 1e6:.1f}"
    marks = [mark(cell, step) for step in STEPS]
    return [name, f"`{cell['model']}`", size, sites(cell), *marks]


def mark(cell: dict[str, Any], step: str) -> str:
    """Yes, no, or nothing where the step before it failed."""
    said = cell.get(step, "-")
    if step == "compress" and said == "yes":
        return f"{cell['got']:.3f}"
    return "yes" if said == "yes" else "" if said == "-" else "no"


def sites(cell: dict[str, Any]) -> str:
    """The family's view, and what of a model it tells apart."""
    kinds = ("heads", "hidden", "tokens")
    parts = [kind for kind in kinds if cell["sites"].get(kind)]
    return f"{cell['view']}: {', '.join(parts)}" if parts else str(cell["view"])


def counts(cells: Sequence[dict[str, Any]]) -> str:
    """How many of the families each step works on."""
    good = {step: sum(cell.get(step) == "yes" for cell in cells) for step in STEPS}
    return (
        f"Of {len(cells)} families: LoRA trains on {good['lora']} and is saved and loaded on "
        f"{good['save']}; `compress` reaches its budget on {good['compress']}, {good['reload']} "
        f"come back bit for bit, and {good['onnx']} run in ONNX Runtime."
    )


def why(cells: Sequence[dict[str, Any]]) -> list[list[str]]:
    """(families, step, reason), families with the same reason together."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        steps = ["built"] if "refused" in cell else [*STEPS]
        for step in steps:
            said = cell["refused"] if step == "built" else cell.get(step, "-")
            if said not in ("yes", "-"):
                found.setdefault((step, said.replace("\n", " ")), []).append(f"`{cell['family']}`")
    return [[", ".join(families), step, said] for (step, said), families in found.items()]
