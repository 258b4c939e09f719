"""Presets: names for compositions of methods, kept as short data files.

A preset file is YAML: a line ``about:`` and a list ``methods:`` of names with settings.
"""

from __future__ import annotations

from typing import Any

import yaml

from peft_vision.errors import UnknownName
from peft_vision.lookup import PACKAGE, stems, unknown
from peft_vision.method import names as method_names

FOLDER = "presets"


def names() -> list[str]:
    """Every preset."""
    return list(stems(FOLDER, suffix=".yaml"))


def read(name: str) -> dict[str, Any]:
    """The content of a preset.

    Raises:
        UnknownName: there is no such preset.
    """
    if name not in names():
        raise unknown("preset", name, names())
    content: dict[str, Any] = yaml.safe_load((PACKAGE / FOLDER / f"{name}.yaml").read_text())
    return content


def expand(name: str) -> list[tuple[str, dict[str, Any]]]:
    """(method, settings) pairs of a method or preset by name.

    Raises:
        UnknownName: it is neither; the message offers the nearest.
    """
    if name in names():
        return [_entry(entry) for entry in read(name)["methods"]]
    if name in method_names():
        return [(name, {})]
    raise unknown("method", name, [*method_names(), *names()])


def _entry(entry: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(entry) == 1:
        name, settings = next(iter(entry.items()))
        return str(name), dict(settings or {})
    raise UnknownName(f"A preset lists names, or one name with its settings; found {entry!r}.")
