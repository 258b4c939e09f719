"""The table of what works on which backbone, held against a sample of its rows made anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.support_matrix import STEPS, TARGET, row
from benchmarks.support_models import timm_families, transformers_families
from tests.contract.tree import ROOT

CELLS: list[dict[str, Any]] = json.loads(TARGET.read_text(encoding="utf-8"))["cells"]
SAMPLED = 6


def sample() -> list[dict[str, Any]]:
    """Of the quickest rows, one of every kind of view: known by name, traced, of both libraries."""
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in sorted(CELLS, key=lambda c: float(c.get("seconds", 1e9))):
        if "refused" not in cell:
            kinds.setdefault((cell["provider"], cell["view"]), cell)
    return list(kinds.values())[:SAMPLED]


@pytest.mark.parametrize("cell", sample(), ids=lambda c: f"{c['provider']}-{c['family']}")
def test_a_row_comes_out_as_the_table_says(cell: dict[str, Any]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = row(cell["provider"], cell["family"], cell["model"])
    finally:
        torch.set_num_threads(threads)
    assert {step: found[step] for step in STEPS} == {step: cell[step] for step in STEPS}
    assert found["view"] == cell["view"]
    assert found["sites"] == cell["sites"]


def test_every_family_has_a_row() -> None:
    listed = {("timm", name) for name in timm_families()}
    listed |= {("transformers", name) for name in transformers_families()}
    assert {(cell["provider"], cell["family"]) for cell in CELLS} == listed


def test_no_cell_fails_without_a_reason() -> None:
    for cell in CELLS:
        if "refused" in cell:
            assert cell["refused"], cell["family"]
            continue
        for step in STEPS:
            assert cell[step] == "yes" or len(cell[step]) > 10 or cell[step] == "-", cell
        broken = [step for step in STEPS if cell[step].startswith("broken")]
        if cell["provider"] != "timm":  # transformers' say what is broken; see the page
            continue
        assert not broken, (cell["family"], broken, cell[broken[0]] if broken else "")


def test_the_page_shows_every_row() -> None:
    page = (Path(ROOT) / "docs" / "reference" / "backbones.md").read_text(encoding="utf-8")
    assert all(f"`{cell['family']}`" in page for cell in CELLS)
