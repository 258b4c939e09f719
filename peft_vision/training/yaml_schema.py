"""From YAML and `key=value` words to a strict pydantic model; mistakes by line and name."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from peft_vision.errors import RecipeError
from peft_vision.lookup import nearest
from peft_vision.training.yaml_marks import Marked, Path, dotted, value

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """Plain values and where each came from: `line 7 of a.yaml`, `train.epochs=2`, `--output`."""

    content: dict[str, Any]
    origins: dict[Path, str]
    name: str


def document(marked: Marked, name: str) -> Document:
    """A file as a document."""
    origins = {path: f"{name}, line {line}" for path, line in marked.lines.items()}
    return Document(marked.content, origins, name)


def split_words(words: Sequence[str]) -> list[tuple[str, Any, str]]:
    """`key=value` words as (key, value, the word).

    Raises:
        RecipeError: a word has no `=`, or its value is not YAML.
    """
    found = []
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key.strip():
            raise RecipeError(
                f"{word!r} is not of the form key=value, as in train.epochs=2. "
                "Options such as --output start with two dashes."
            )
        found.append((key.strip(), value(text), word))
    return found


def put(doc: Document, key: str, new: Any, origin: str) -> Document:
    """The document with the value at a dotted key replaced.

    Raises:
        RecipeError: the key leads through something that is not a section or a list entry.
    """
    path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    content = _put(doc.content, path, new, key)
    kept = {old: said for old, said in doc.origins.items() if old[: len(path)] != path}
    return Document(content, {**kept, path: origin}, doc.name)


def _put(into: Any, path: Path, new: Any, key: str) -> Any:
    if not path:
        return new
    head, rest = path[0], path[1:]
    if into is None:
        into = {}
    if isinstance(into, dict):
        return {**into, head: _put(into.get(head), rest, new, key)}
    if isinstance(into, list) and isinstance(head, int) and head < len(into):
        return [*into[:head], _put(into[head], rest, new, key), *into[head + 1 :]]
    raise RecipeError(
        f"{key}: {head!r} cannot be set inside {into!r}, which is not a section. "
        "--print-config shows all keys."
    )


def validate(schema: type[M], doc: Document) -> M:
    """The document as a model.

    Raises:
        RecipeError: with one line for each mistake.
    """
    try:
        return schema.model_validate(doc.content)
    except ValidationError as error:
        said = [_mistake(schema, doc, problem) for problem in error.errors()]
        raise RecipeError("\n".join(said)) from error


def origin_of(doc: Document, path: Path) -> str:
    """Where a value, or the nearest section around it that was written, came from."""
    for length in range(len(path), 0, -1):
        if path[:length] in doc.origins:
            return doc.origins[path[:length]]
    return "default"


def given(doc: Document, path: Path) -> bool:
    """Whether a value was written, and is not a default inside a section that was."""
    found: Any = doc.content
    for part in path:
        inside = isinstance(found, dict) and part in found
        listed = isinstance(found, list) and isinstance(part, int) and part < len(found)
        if not inside and not listed:
            return False
        found = found[part]
    return True


def leaves(content: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, value) of everything that is not a section."""
    if isinstance(content, Mapping) and content:
        for key, inner in content.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(content, list) and any(isinstance(item, Mapping) for item in content):
        for number, inner in enumerate(content):
            yield from leaves(inner, (*path, number))
    else:
        yield path, content


def _mistake(schema: type[BaseModel], doc: Document, problem: Mapping[str, Any]) -> str:
    tagged: Path = tuple(problem["loc"])
    path = tuple(part for part in tagged if not _is_tag(part))
    key, kind = dotted(path), problem["type"]
    where = origin_of(doc, path)
    where = doc.name if where == "default" else where
    if kind == "extra_forbidden":
        known = _keys_at(schema, tagged[:-1])
        near = nearest(str(path[-1]), known, count=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(known)}."
        return f"{where}: there is no setting {key}. {hint}"
    if kind == "missing":
        return (
            f"{where}: {key} is missing. Add it to the file, or give {key}=... on the command line."
        )
    allowed = str(problem["msg"]).replace("Input should be", "it should be")
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        known = _keys_at(schema, tagged)
        allowed = f"it should be a section with {', '.join(known) or 'key: value lines'}"
    return f"{where}: {key} is {_shown(problem['input'])}; {_decapitalized(allowed)}."


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 60 else text[:57] + "..."


def _decapitalized(text: str) -> str:
    return text[:1].lower() + text[1:]


def _keys_at(schema: type[BaseModel], path: Path) -> list[str]:
    """The field names of the section at `path`; empty where that is not a section."""
    found: Any = schema
    for part in path:
        if isinstance(part, int):
            continue
        if _is_tag(part):
            found = _tagged(found, str(part))
            continue
        inside = _model_in(found)
        field = inside.model_fields.get(part) if _is_model(inside) else None
        if field is None:
            return []
        found = field.annotation
    inside = _model_in(found)
    return list(inside.model_fields) if _is_model(inside) else []


def _is_tag(part: object) -> bool:
    """Whether a part of a place says which of several schemas was meant; no key looks like it."""
    return isinstance(part, str) and part.startswith("<")


def _tagged(annotation: Any, tag: str) -> Any:
    """The member of a union that carries a tag."""
    members = typing.get_args(annotation)
    named = (m for m in members if any(getattr(a, "tag", None) == tag for a in m.__metadata__))
    return typing.get_args(next(named))[0]


def _model_in(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, typing.Annotated):
        inner = [_model_in(part) for part in typing.get_args(annotation)]
        return next((part for part in inner if _is_model(part)), None)
    return annotation


def _is_model(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, BaseModel)
