"""What the installed PEFT offers besides the methods that are files here, found in PEFT itself.

Every folder of PEFT's `tuners` with a configuration is a method; so is every variant and every
initialization that the configuration of its low-rank updates names. A method that cannot work on a
plain vision model has a name, too: asked for, it says why.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from peft_vision.adapters._variants import TUNERS, variant_names
from peft_vision.lookup import unknown
from peft_vision.method import CATALOG, Method


@cache
def names() -> tuple[str, ...]:
    """The names of what PEFT offers, sorted; PEFT's files are read, and not imported."""
    if TUNERS is None:
        return ()
    folders = {path.parent.name for path in TUNERS.glob("*/config.py")}
    return tuple(sorted(folders | set(variant_names())))


@cache
def find(name: str) -> type[Method]:
    """The method of that name: a frozen dataclass whose fields are PEFT's settings.

    Raises:
        UnknownName: the installed PEFT offers no such method.
    """
    from peft_vision.adapters._offered import (
        FITTED,
        Offered,
        defaults_of,
        needs_of,
        origin_of,
        settings_of,
    )

    if name not in names():
        raise unknown("method", name, names())
    origin = origin_of(name)
    own = defaults_of(origin)
    fields: list[tuple[str, Any, Any]] = [
        (key, hint, dataclasses.field(default=default, metadata={FITTED: own[key]}))
        for key, (hint, default) in settings_of(origin).items()
    ]
    namespace = {
        "__module__": CATALOG,
        "__doc__": origin.summary,
        "origin": origin,
        "needs": needs_of(origin),
    }
    return dataclasses.make_dataclass(
        name, fields, bases=(Offered,), namespace=namespace, frozen=True
    )
