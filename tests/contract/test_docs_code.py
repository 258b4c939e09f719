"""What the README and the documentation show is run: Python blocks, verbs and options, examples."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from tests.contract.tree import ROOT, module_name, source_files

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```\s*$", re.MULTILINE | re.DOTALL)
SHELLS = {"bash", "sh", "shell", "console"}


class Block(NamedTuple):
    """A fenced block: the words after the backquotes, the text, the line it starts at."""

    info: str
    text: str
    line: int

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info else ""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        indent, info, body = match.groups()
        lines = [line.removeprefix(indent) for line in body.splitlines()]
        found.append(Block(info.strip(), "\n".join(lines), text.count("\n", 0, match.start()) + 2))
    return found


def python_blocks(page: Path) -> list[Block]:
    return [b for b in blocks(page) if b.language == "python" and "no-run" not in b.info]


def commands() -> list[tuple[Path, int, list[str]]]:
    """(page, line, words) of every `peft-vision ...` line in a shell block."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            if block.language not in SHELLS:
                continue
            text = block.text.replace("\\\n", "  ")
            for line in text.splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words[:1] == ["peft-vision"]:
                    found.append((page, block.line, words[1:]))
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_pages_hold_code() -> None:
    assert sum(len(python_blocks(page)) for page in PAGES) >= 10
    assert len(commands()) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("code_of_a_page")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in python_blocks(page):
        # Blank lines above make a traceback show the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        exec(code, vars(module))


def test_no_run_is_for_what_needs_a_network_or_a_gpu() -> None:
    allowed = re.compile(r"push_to_hub|pretrained=True|me/|cuda|nf4")
    unjustified = [
        f"{name_of(page)}:{block.line}"
        for page in PAGES
        for block in blocks(page)
        if block.language == "python" and "no-run" in block.info and not allowed.search(block.text)
    ]
    assert not unjustified


def test_every_fence_names_its_language() -> None:
    bare = [f"{name_of(p)}:{b.line}" for p in PAGES for b in blocks(p) if not b.language]
    assert not bare, "write ```text where it is neither code nor a command"


@pytest.fixture(scope="module")
def verbs() -> dict[str, Any]:
    import typer.main

    from peft_vision.cli import app

    root: Any = typer.main.get_command(app)
    return dict(root.commands)


@pytest.mark.parametrize(
    ("page", "line", "words"),
    commands(),
    ids=lambda value: name_of(value) if isinstance(value, Path) else None,
)
def test_commands_exist(page: Path, line: int, words: list[str], verbs: dict[str, Any]) -> None:
    if words[0].startswith("-"):
        return
    assert words[0] in verbs, (
        f"{name_of(page)}:{line}: no verb {words[0]}; there are {sorted(verbs)}"
    )
    known = {o for p in verbs[words[0]].params for o in [*p.opts, *p.secondary_opts]} | {"--help"}
    used = {word.split("=")[0] for word in words[1:] if word.startswith("-")}
    assert used <= known, f"{name_of(page)}:{line}: {words[0]} has no {sorted(used - known)}"


def with_doctests() -> list[Path]:
    return [file for file in source_files() if ">>> " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", with_doctests(), ids=module_name)
def test_doctests_of_the_package(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(module_name(file)), verbose=False)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "methods" / "index.html").is_file()
