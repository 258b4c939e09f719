"""What makes two runs the same: their settings and the images they see."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_vision.data.source import Split

_INCIDENTAL = {
    "train": ("progress", "loggers", "workers", "keep_checkpoints", "micro_batch", "device"),
    "data": ("check",),
}


def of_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as nested JSON, without what only says where, how fast or how loud it runs."""
    kept = {key: value for key, value in content.items() if key != "output"}
    for section, keys in _INCIDENTAL.items():
        kept[section] = {k: v for k, v in kept[section].items() if k not in keys}
    kept["methods"] = {str(number): entry for number, entry in enumerate(kept["methods"])}
    return kept


def of_data(data: Split) -> dict[str, Any]:
    """Counts, and digests of names and labels; pixels are not read."""
    found: dict[str, Any] = {"classes": ", ".join(data.names)}
    for name, part in (("train", data.train), ("validation", data.validation)):
        words = "".join(
            f"{part.pictures.name(place)}={target};"
            for place, target in zip(part.order, part.targets, strict=True)
        )
        digest = hashlib.sha256(words.encode()).hexdigest()[:12]
        found[name] = f"{len(part)} images ({digest})"
    return {"images": found}
