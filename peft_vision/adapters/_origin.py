"""Where a method of the catalogue comes from in PEFT: its configuration, and what is its own in it.

What sites decide (which layers, which classifier) and what belongs to a machine (paths, progress
bars) is no setting; everything else in PEFT's configuration is.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peft_vision.adapters._variants import CONFIG, FOLDER, INIT, switches

MANAGED = {
    *(f.name for f in dataclasses.fields(peft.PeftConfig)),
    *("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules", "bias"),
    *("layers_to_transform", "layers_pattern", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "ensure_weight_tying", "fan_in_fan_out", "progressbar", "tfinal"),
    *("target_modules_bd_a", "target_modules_bd_b", "match_strict"),
    *("use_label_mask", "label_mask_value"),  # of text
}
"""Fields of PEFT's configurations that sites, or the package, fill in."""
KEPT = {"use_rslora"}
"""Switches that go with every variant."""
MANAGED_BEFORE = ("save_", "megatron_", "runtime_")
MANAGED_AFTER = ("_pattern", "_prng_key")


@dataclass(frozen=True)
class Origin:
    """One method of PEFT.

    Attributes:
        name: what we call it: PEFT's own name.
        config: the class of its configuration.
        tuner: the class that PEFT carries it out with.
        switch: the field that asks for a variant; empty for a method of its own.
        fixed: values of fields that make the variant what it is.
        nested: field that holds a configuration of the variant's own, and its class.
        summary: what PEFT says about it.
    """

    name: str
    config: type[peft.PeftConfig]
    tuner: type[Any]
    switch: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    nested: tuple[str, type[Any]] | None = None
    summary: str = ""

    @property
    def fields(self) -> frozenset[str]:
        """Names of the fields of the configuration, those of other variants left out."""
        variants = switches().keys() - {self.name}
        others = {*switches().values(), INIT, *(f"{name}_config" for name in variants)} - KEPT
        own = {f.name for f in dataclasses.fields(self.config)} - others
        own = {name for name in own if not name.startswith(tuple(f"{v}_" for v in variants))}
        return frozenset(own | self.fixed.keys() | ({self.nested[0]} if self.nested else set()))


def origin_of(name: str) -> Origin:
    """Where the method of this name comes from."""
    if name in switches():
        return _variant(name)
    kind = peft.PeftType(name.upper())
    return Origin(
        name=name,
        config=PEFT_TYPE_TO_CONFIG_MAPPING[kind],
        tuner=PEFT_TYPE_TO_TUNER_MAPPING[kind],
        summary=_first_sentence(PEFT_TYPE_TO_TUNER_MAPPING[kind].__doc__ or ""),
    )


def settings_of(origin: Origin) -> dict[str, tuple[Any, Any]]:
    """Setting -> type and default. A whole number's default is None: PEFT's, or what fits."""
    found = _settings(origin.config, origin.fields - origin.fixed.keys())
    if origin.nested is not None:
        found |= _settings(origin.nested[1], None)
        found.pop(origin.nested[0], None)
    return found


def defaults_of(origin: Origin) -> dict[str, Any]:
    """PEFT's defaults of the settings."""
    classes = (origin.config, *([origin.nested[1]] if origin.nested else []))
    return {f.name: _default(f) for cls in classes for f in dataclasses.fields(cls)}


def _settings(cls: type[Any], among: frozenset[str] | None) -> dict[str, tuple[Any, Any]]:
    hints = typing.get_type_hints(cls)
    return {
        f.name: (hints[f.name], None if _is_whole(_default(f)) else _default(f))
        for f in dataclasses.fields(cls)
        if f.init and not _managed(f.name) and (among is None or f.name in among)
    }


def _managed(name: str) -> bool:
    return name in MANAGED or name.startswith(MANAGED_BEFORE) or name.endswith(MANAGED_AFTER)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _default(found: dataclasses.Field[Any]) -> Any:
    if found.default is not dataclasses.MISSING:
        return found.default
    return None  # a list or a mapping that PEFT makes anew for each configuration


def _variant(name: str) -> Origin:
    config: type[peft.PeftConfig] = getattr(peft, CONFIG)
    fields = {f.name: f for f in dataclasses.fields(config)}
    switch, own = switches()[name], f"{name}_config"
    place = own if own in fields else switch
    nested = _config_class(config, place)
    about = str(fields[place].metadata.get("help"))
    fixed: dict[str, Any] = {}
    if switch == INIT or f"{INIT}='{name}'" in about:
        fixed[INIT] = name
    elif switch == f"use_{name}" and nested is None:
        fixed[switch] = True
    return Origin(
        name=name,
        config=config,
        tuner=PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(FOLDER.upper())],
        switch=switch,
        fixed=fixed,
        nested=(place, nested) if nested else None,
        summary=_first_sentence(about) if place != INIT else "",
    )


def _config_class(config: type[Any], place: str) -> type[Any] | None:
    """The class of a configuration inside a configuration, where a field holds one."""
    hint = typing.get_type_hints(config)[place]
    members = (hint, *typing.get_args(hint))
    return next((m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m)), None)


def _first_sentence(text: str) -> str:
    plain = re.sub(r"<[^>]*>|\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(plain.split()).partition(". ")[0].rstrip(".")
