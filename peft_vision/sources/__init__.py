"""Where models come from by name, and how an architecture is built again from JSON.

A source file declares `MODULES` (where its classes are defined), `spec_of(model)`, `build(spec,
weights=...)` and `names()`. A spec is plain JSON:
``{"source": "timm", "name": ..., "kwargs": {...}}``.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import nn

from peft_vision.errors import ArtifactError, BadSetting, UnknownName
from peft_vision.lookup import nearest, stems, unknown

Spec = dict[str, Any]


def create_model(name: str, *, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """A model by name.

    Args:
        name: ``timm/<architecture>`` or a bare timm architecture, ``demo/<name>``, or
            ``transformers/`` and a repository or folder.
        pretrained: with the source's weights; False gives random ones.
        kwargs: passed to the source's constructor (``num_classes=10``, ``img_size=112``).

    Raises:
        UnknownName: there is no such model; the message offers the nearest.
        ArtifactError: the weights cannot be had (no connection, no such repository).
    """
    source, _, rest = name.partition("/")
    if rest and source in source_names():
        return _source(source).build({"name": rest, "kwargs": kwargs}, weights=pretrained)  # type: ignore[no-any-return]
    if not rest and name in _source("timm").names():
        return create_model(f"timm/{name}", pretrained=pretrained, **kwargs)
    known = _source("timm").names()
    near = nearest(rest or name, known)
    raise UnknownName(
        f"There is no model named {name!r}. "
        + (f"Nearest: {', '.join(near)}. " if near else "")
        + "Possible: a timm architecture, transformers/<repository or folder>, "
        + "demo/<name>, or a folder saved by peft-vision."
    )


def spec_of(model: nn.Module) -> Spec | None:
    """How to build the architecture of `model` again, or None when no source can.

    A spec is given only when the architecture built from it is the same, module by module.
    """
    spec = _guess(model)
    if spec is None:
        return None
    try:
        again = build(spec, device="meta")
    except BadSetting:  # what was read off the model is not what its constructor takes
        return None
    return None if difference(again, model) else spec


def difference(one: nn.Module, other: nn.Module) -> str | None:
    """The first place where two models differ in structure or in a plain setting, in words."""
    ours, theirs = dict(one.named_modules()), dict(other.named_modules())
    if ours.keys() != theirs.keys():
        return f"module {min(ours.keys() ^ theirs.keys())!r} is in one only"
    for name, module in ours.items():
        if type(module) is not type(theirs[name]):
            return f"{name}: {type(module).__name__} against {type(theirs[name]).__name__}"
        mine, yours = _settings(module), _settings(theirs[name])
        for key in mine.keys() | yours.keys():
            if mine.get(key) != yours.get(key):
                return f"{name}.{key}: {mine.get(key)!r} against {yours.get(key)!r}"
    return None


RUNTIME = {"training", "grad_checkpointing", "gradient_checkpointing", "name_or_path"}


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in RUNTIME and _is_plain(value)
    }
    shapes = {
        key: tuple(p.shape)
        for key, p in (*module._parameters.items(), *module._buffers.items())  # noqa: SLF001
        if p is not None
    }
    return {**plain, **shapes}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _guess(model: nn.Module) -> Spec | None:
    origins = {cls.__module__ for cls in type(model).__mro__}
    for stem in source_names():
        source = _source(stem)
        if any(origin.startswith(tuple(source.MODULES)) for origin in origins):
            spec: Spec | None = source.spec_of(model)
            if spec is not None:
                return spec
    return None


def build(spec: Spec, *, weights: bool = False, device: str = "cpu") -> nn.Module:
    """The architecture of a spec, on `device` ("meta" for a twin without numbers).

    Raises:
        ArtifactError: the spec names a source or a model that does not exist here.
    """
    name = str(spec.get("source"))
    if name not in source_names():
        raise ArtifactError(
            f"The artifact's base comes from {name!r}, which is not a known source."
        )
    with torch.device(device):
        model: nn.Module = _source(name).build(spec, weights=weights)
    return model


def source_names() -> list[str]:
    """What a model's name may begin with, before the slash."""
    return list(stems("sources"))


def _source(stem: str) -> ModuleType:
    if stem not in source_names():
        raise unknown("source", stem, source_names())
    return importlib.import_module(f"{__name__}.{stem}")
