"""Every example runs, on a tiny random backbone and generated images, and fits on one page."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.tree import ROOT, where

EXAMPLES = sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))
TINY = ("--model", "timm/test_vit", "--random-weights")


def test_the_examples_are_found() -> None:
    assert [example.name[:2] for example in EXAMPLES[:3]] == ["01", "02", "03"]


@pytest.mark.parametrize("example", EXAMPLES, ids=where)
def test_example_fits_on_a_page(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=where)
def test_example_runs(example: Path, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    data = image_folder(images=4)
    command = [sys.executable, str(example), str(data), str(tmp_path / "out"), *TINY]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out").is_dir()
