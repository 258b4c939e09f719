"""`load`: build the base again without weights, apply the same plan, load safetensors. One path."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_vision.artifact import ADAPTER, WEIGHTS, read_record, read_weights
from peft_vision.backbones import view
from peft_vision.compressed import CompressedModel
from peft_vision.cost import unwrap
from peft_vision.errors import ArtifactError, DamagedArtifact, PeftVisionError, WrongBase
from peft_vision.history import History, fingerprint
from peft_vision.hub import download, is_repo_id
from peft_vision.method import Adapter, Method, make
from peft_vision.plan import Plan
from peft_vision.sources import Spec, build, create_model, source_names
from peft_vision.wrapping import adapt


def load(
    name: str | Path,
    base: nn.Module | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> Any:
    """Load a saved folder, or a repository of the Hub.

    A compressed model comes back from the folder alone. An adapter needs its base: the one
    given, or the one that the record names, whose weights have to be the same.

    Args:
        name: a folder, or ``user/repo``.
        base: the base model (it is copied), for adapters, and for bases that no source can build.
        revision: of the repository.
        device: where to put the model.

    Returns:
        An AdaptedModel (a `peft.PeftModel`) or a CompressedModel, in evaluation mode.

    Raises:
        DamagedArtifact: files are missing, truncated or altered. NewerSchema: upgrade first.
        WrongBase: the base given is not the one the artifact was made from.
        ArtifactError: there is no such folder or repository, or the base cannot be had.
    """
    folder = _folder(name, revision)
    content = read_record(folder)
    history = History.of_record(content)
    if content.get("kind") == "adapter":
        model = _load_adapter(folder, history, base, str(content.get("prefix") or ""))
    else:
        model = _load_compressed(folder, history, base)
    return model.to(device).eval()


def open_model(name: str, *, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """What a user calls a model: a saved folder, a repository ``user/repo``, or a source's name."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        loaded: nn.Module = load(path)
        return loaded
    if path.is_dir():
        return create_model(f"transformers/{path}", pretrained=pretrained, **kwargs)
    if is_repo_id(name) and name.partition("/")[0] not in source_names():
        fetched: nn.Module = load(name)
        return fetched
    return create_model(name, pretrained=pretrained, **kwargs)


def _folder(name: str | Path, revision: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if is_repo_id(str(name)):
        return _downloaded(str(name), revision)
    raise ArtifactError(
        f"There is no folder {name}. Possible: a folder written by save_pretrained or by a "
        "peft-vision command, or a repository user/repo."
    )


def _downloaded(name: str, revision: str | None) -> Path:
    try:
        return download(name, revision=revision)
    except PeftVisionError as error:
        raise type(error)(f"There is no folder {name} here. As a repository: {error}") from error


def _load_compressed(folder: Path, history: History, base: nn.Module | None) -> nn.Module:
    if not (folder / WEIGHTS).is_file():
        raise DamagedArtifact(f"{folder} has no {WEIGHTS}. Other formats are never read.")
    model: nn.Module = replay(_structure(history.source, base), history, empty=True)
    plain = unwrap(model)
    shared = _shared(plain)
    try:
        plain.load_state_dict(read_weights(folder / WEIGHTS), strict=True, assign=True)
    except RuntimeError as error:
        raise WrongBase(
            f"The weights of {folder} do not fit the model that its record describes: "
            f"{str(error).splitlines()[1].strip() if len(str(error).splitlines()) > 1 else error}"
        ) from error
    for (owner, attribute), *others in shared:
        for other, name in others:
            setattr(other, name, getattr(owner, attribute))
    empty = [n for n, t in (*plain.named_parameters(), *plain.named_buffers()) if t.is_meta]
    if empty:
        raise DamagedArtifact(f"{folder} has no numbers for {', '.join(empty[:3])}.")
    return model


def _shared(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places of each parameter that has several; loading gives every place one of its own."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def replay(model: nn.Module, history: History, *, empty: bool) -> Any:
    """Apply a plan to a base, in place; the model comes back wrapped.

    Args:
        empty: the base has no weights yet; adapters are left without numbers, too.
    """
    so_far = replace(history, plan=Plan())
    wrapped: Any = None
    for number, step in enumerate(history.plan.steps):
        method = _method(step.method, dict(step.settings))
        backbone = view(model)
        so_far = so_far.then(step)
        try:
            method.apply(backbone, step.decisions)
        except KeyError as error:
            raise DamagedArtifact(f"The plan names a site {error} that the base lacks.") from error
        if isinstance(method, Adapter) and number >= history.merged:
            wrapped = adapt(wrapped or model, method, so_far, empty=empty, again=True)
    if wrapped is None:
        return CompressedModel(model, history)
    wrapped.history = history
    return wrapped


def _method(name: str, settings: dict[str, Any]) -> Method:
    try:
        return make(name, settings)
    except PeftVisionError as error:
        raise ArtifactError(
            f"The plan uses a method that this installation lacks. {error} It may come from a "
            "newer version or from another package."
        ) from error


def _structure(source: Spec | None, base: nn.Module | None) -> nn.Module:
    if base is not None:
        return copy.deepcopy(base)
    if source is None:
        raise WrongBase(
            "The artifact's base is a module that no source can build again; pass it: "
            "load(folder, base=your_dense_model)."
        )
    empty = build(source, device="meta")
    # What a model computes in its constructor and does not save has to be computed here, too.
    unsaved = any(module._non_persistent_buffers_set for module in empty.modules())  # noqa: SLF001
    return build(source) if unsaved else empty


def _load_adapter(folder: Path, history: History, base: nn.Module | None, prefix: str) -> nn.Module:
    from peft_vision.adapted import load_adapter_weights

    if not (folder / ADAPTER).is_file():
        raise DamagedArtifact(f"{folder} has no {ADAPTER}. Other formats are never read.")
    _require_adapters(history)
    plain = base_of(history, base, "load(folder, base=model)")
    model = replay(plain, history, empty=False)
    load_adapter_weights(model, folder, prefix)
    adapted: nn.Module = model
    return adapted


def base_of(history: History, base: nn.Module | None, how: str) -> nn.Module:
    """The base that a history began with: a copy of the one given, or loaded from its source.

    Args:
        how: what to type in order to pass one.

    Raises:
        WrongBase: it cannot be had, or its weights are others.
    """
    plain = copy.deepcopy(unwrap(base)) if base is not None else _pretrained(history, how)
    seen = view(plain)
    found = fingerprint(seen.core, [site.layer for site in seen.classifier])
    if history.fingerprint and found != history.fingerprint:
        raise WrongBase(
            "The base's weights are not those that the adapter was trained on"
            + (f" ({history.source['source']}/{history.source['name']})" if history.source else "")
            + f". Pass the right one: {how}."
        )
    return plain


def _require_adapters(history: History) -> None:
    for step in history.plan.steps:
        if not _method(step.method, dict(step.settings)).derived:
            raise DamagedArtifact(f"An adapter folder holds a step of {step.method}.")


def _pretrained(history: History, how: str) -> nn.Module:
    if history.source is None:
        raise WrongBase(f"The adapter's base is a module that no source can build; pass it: {how}.")
    return build(history.source, weights=True)
