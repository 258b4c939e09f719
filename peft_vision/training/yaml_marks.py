"""YAML that remembers where each value was written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from peft_vision.errors import RecipeError

Path = tuple[str | int, ...]


class Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number, as YAML 1.2 does and PyYAML does not."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Marked:
    """A document: its plain values, and the line (from 1) of each key by path."""

    content: dict[str, Any]
    lines: dict[Path, int]


def read(text: str, name: str) -> Marked:
    """Read a mapping.

    Raises:
        RecipeError: the text is not YAML, not a mapping, or names a key twice.
    """
    try:
        node = yaml.compose(text, Loader)
        content = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise RecipeError(_syntax(error, name)) from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            f"{name} holds {'nothing' if node is None else 'no mapping'}. A recipe is a YAML file "
            "with the sections model, method and data, say. `peft-vision recipes` lists examples."
        )
    lines: dict[Path, int] = {}
    _walk(node, (), lines, name)
    return Marked(content, lines)


def value(text: str) -> Any:
    """The value of `key=value` on a command line, read as YAML.

    Raises:
        RecipeError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"The value {text!r} cannot be read as YAML. Quote it if it is text."
        ) from error


def _walk(node: yaml.Node, path: Path, lines: dict[Path, int], name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            here = (*path, str(key_node.value))
            if here in lines:
                raise RecipeError(
                    f"{name}, line {line}: {dotted(here)} was given already on line {lines[here]}. "
                    "Keep one of the two."
                )
            lines[here] = line
            _walk(value_node, here, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            place = (*path, number)
            lines[place] = item.start_mark.line + 1
            _walk(item, place, lines, name)


def dotted(path: Path) -> str:
    """A path as it is written on the command line: `methods.0.r`."""
    return ".".join(str(part) for part in path)


def _syntax(error: yaml.YAMLError, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "it cannot be read"
    where = f", line {mark.line + 1}" if mark is not None else ""
    return f"{name}{where}: this is not YAML: {problem}. Check indentation, colons and quotes."
