"""What the installed PEFT offers besides the methods that are files here."""

from __future__ import annotations

from peft_vision.errors import UnknownName
from peft_vision.method import Method


def names() -> list[str]:
    """The names of what PEFT offers; PEFT is not imported."""
    return []


def find(name: str) -> type[Method]:
    """The method of that name."""
    raise UnknownName(name)
