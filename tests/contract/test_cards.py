"""A method is one source file, one test file and one card; the cards are true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.tree import ROOT, method_files

HEADINGS = [
    "What it does",
    "When to use it, when not",
    "Use",
    "Settings",
    "What it costs",
    "Reference and differences from the paper",
]
each_method = pytest.mark.parametrize("file", method_files(), ids=lambda file: file.stem)


def card_of(file: Path) -> Path:
    return ROOT / "docs" / "methods" / f"{file.stem}.md"


@each_method
def test_method_has_a_test_file(file: Path) -> None:
    assert (ROOT / "tests" / file.parent.name / f"test_{file.stem}.py").is_file()


@each_method
def test_card_has_the_six_headings(file: Path) -> None:
    card = card_of(file).read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", card, re.MULTILINE) == HEADINGS
    assert card.startswith(f"# {file.stem}\n"), "the title is the name that is typed"
    bodies = dict(re.findall(r"^## (.+)\n+((?:(?!## ).*\n?)*)", card, re.MULTILINE))
    assert all(bodies[heading].strip() for heading in HEADINGS)
    assert "```python\n" in bodies["Use"], "a card shows code that runs"


@each_method
def test_what_it_does_takes_two_sentences(file: Path) -> None:
    text = card_of(file).read_text(encoding="utf-8").split("## ")[1].split("\n", 1)[1]
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z`])", text.strip())
    assert len(sentences) == 2, sentences


def test_no_card_without_a_method() -> None:
    cards = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")} - {"index"}
    assert cards == {file.stem for file in method_files()}


def test_every_setting_is_explained() -> None:
    pages = [card_of(file).read_text(encoding="utf-8") for file in method_files()]
    unexplained = [line for page in pages for line in page.splitlines() if line.endswith("|  |")]
    assert not unexplained, "write a string under the field of the dataclass"


def test_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
