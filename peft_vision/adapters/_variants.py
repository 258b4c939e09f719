"""The variants and initializations of PEFT's low-rank updates, read from its source.

PEFT has no list of them: they are the switches of one configuration class. Its file is parsed and
not imported, which would take ten seconds.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def _tuners() -> Path | None:
    spec = importlib.util.find_spec("peft")
    return Path(spec.origin).parent / "tuners" if spec and spec.origin else None


TUNERS = _tuners()
"""The folder of PEFT that holds a folder per method; None where PEFT is not installed."""
FOLDER, CONFIG, INIT = "lora", "LoraConfig", "init_lora_weights"
VARIANT = "is_lora_variant"
"""What PEFT writes into the metadata of a field that switches a variant on."""


@cache
def switches() -> dict[str, str]:
    """Name of a variant or an initialization -> the field of the configuration that asks for it."""
    found: dict[str, str] = {}
    for field, node in _fields():
        if field == INIT:
            found |= dict.fromkeys(_literals(node.annotation), INIT)
    for field, node in _fields():
        for name in _named_by(field, node):
            found.setdefault(name, field)
    return found


def variant_names() -> list[str]:
    """The names of the variants and initializations."""
    return list(switches())


def _named_by(field: str, node: ast.AnnAssign) -> Iterator[str]:
    marked = any(isinstance(n, ast.Constant) and n.value == VARIANT for n in ast.walk(node))
    structured = field.endswith("_config") and "Config" in ast.unparse(node.annotation)
    if field.startswith("use_"):
        yield field.removeprefix("use_")
    elif structured and _default(node) == "None":
        yield field.removesuffix("_config")
    elif marked and field != INIT and not structured:
        yield field.partition("_")[0]


def _literals(annotation: ast.expr) -> list[str]:
    """Strings of a Literal; those with a place to fill in are spellings of another."""
    strings = [n.value for n in ast.walk(annotation) if isinstance(n, ast.Constant)]
    return [text for text in strings if isinstance(text, str) and "[" not in text]


def _default(node: ast.AnnAssign) -> str:
    given = {word.arg: word.value for word in getattr(node.value, "keywords", [])}
    return ast.unparse(given["default"]) if "default" in given else ""


@cache
def _fields() -> tuple[tuple[str, ast.AnnAssign], ...]:
    if TUNERS is None:
        return ()
    source = (TUNERS / FOLDER / "config.py").read_text(encoding="utf-8")
    body = [
        item
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == CONFIG
        for item in node.body
    ]
    return tuple(
        (item.target.id, item)
        for item in body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )
