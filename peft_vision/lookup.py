"""Finding things by name: the file tree is the registry, and a wrong name gets the nearest ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from peft_vision.errors import UnknownName

PACKAGE = Path(__file__).parent


def stems(*folders: str, suffix: str = ".py") -> dict[str, str]:
    """File stem -> folder, for the files of the package's `folders`, sorted by name."""
    found = {
        path.stem: folder
        for folder in folders
        for path in (PACKAGE / folder).glob(f"*{suffix}")
        if not path.stem.startswith("_")
    }
    return dict(sorted(found.items()))


def nearest(name: str, among: Iterable[str], count: int = 4) -> list[str]:
    """The names most like `name`, best first; empty when none is near.

    >>> nearest("magnitud", ["magnitude", "tucker"])
    ['magnitude']
    """
    known = list(among)
    lowered = {key.lower(): key for key in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)
    inside = [key for key in known if name and name.lower() in key.lower()]
    return list(dict.fromkeys([lowered[key] for key in near] + inside))[:count]


def unknown(kind: str, name: str, among: Iterable[str]) -> UnknownName:
    """The error for a name that does not exist, with the nearest or all that do."""
    known = list(among)
    near = nearest(name, known)
    hint = f"Nearest: {', '.join(near)}." if near else f"Known: {', '.join(known[:20])}."
    return UnknownName(f"There is no {kind} named {name!r}. {hint}")
