"""What a card says, read from `peft_vision.json`; any key of it may be absent or null."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

Content = Mapping[str, Any]

METRICS = {
    "top1": ("accuracy", "Top-1 accuracy"),
    "top5": ("accuracy", "Top-5 accuracy"),
    "loss": ("loss", "Cross entropy (nats)"),
}
"""Name in the record -> the Hub's name of the metric, and the one people read."""

STRUCTURAL = {"embed_dim", "depth", "depths", "num_heads", "mlp_ratio"}
"""Arguments with which a published checkpoint no longer fits."""


def title_of(content: Content) -> str:
    """Architecture and methods: `vit_small_patch16_224-method`."""
    name = str(source_of(content).get("name") or content.get("model_class") or "model")
    short = PurePath(name.rpartition(".")[2] if "." in name and "/" not in name else name).name
    methods = [str(step.get("method")) for step in steps_of(content)]
    return "-".join((short or "model", *dict.fromkeys(methods)))


def source_of(content: Content) -> Mapping[str, Any]:
    """The spec of the base; empty when no source can build it."""
    return mapping(content.get("source"))


def steps_of(content: Content) -> list[Mapping[str, Any]]:
    """The steps of the plan, in order."""
    steps = mapping(content.get("plan")).get("steps") or ()
    return [step for step in steps if isinstance(step, Mapping)]


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` when it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def is_adapter(content: Content) -> bool:
    """Whether only an adapter is saved, beside an unchanged base."""
    return content.get("kind") == "adapter"


def is_plain_peft(content: Content) -> bool:
    """Whether plain PEFT can carry the adapter to a plain base, with the same outputs."""
    return is_adapter(content) and not content.get("foreign")


def pipeline_of(content: Content) -> str:
    """The Hub's name of the task."""
    return "image-classification" if content.get("labels") else "image-feature-extraction"


def hub_name_of_base(content: Content) -> str | None:
    """Repository of the base model on the Hub, where the record says which checkpoint it is."""
    source = source_of(content)
    name, tag = str(source.get("name") or ""), source.get("tag")
    if source.get("source") == "timm":
        published = tag and not STRUCTURAL & set(mapping(source.get("kwargs")))
        return f"timm/{name.partition('.')[0]}.{tag}" if published else None
    return name if source.get("source") == "transformers" and is_hub_id(name) else None


def is_hub_id(name: str) -> bool:
    """Whether `name` is `user/repository`, and neither a demo nor a folder of this machine."""
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    return looks and not name.startswith("demo/") and not Path(name).exists()


def license_of(content: Content) -> str | None:
    """The license of the base, where its source states one."""
    given = source_of(content).get("license") or content.get("license")
    return str(given) if given else None


def figures_of(content: Content) -> dict[str, dict[str, Any]]:
    """Metrics that are finite numbers, each as a record with `value`."""
    found = {}
    for name, given in mapping(content.get("metrics")).items():
        record = dict(given) if isinstance(given, Mapping) else {"value": given}
        value = record.get("value")
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[str(name)] = record
    return found


def standard_error(name: str, record: Mapping[str, Any]) -> float | None:
    """As recorded; for an accuracy also from the count: sqrt(p (1 - p) / n)."""
    if record.get("standard_error") is not None:
        return float(record["standard_error"])
    n, value = record.get("n"), float(record["value"])
    if name in {"top1", "top5"} and n and 0 <= value <= 1:
        return math.sqrt(value * (1 - value) / float(n))
    return None


def data_name(record: Mapping[str, Any]) -> str | None:
    """What the data are called; of a path only the last part, the rest is nobody's business."""
    name = str(record.get("data") or record.get("dataset") or "")
    if is_hub_id(name) or not re.search(r"[\\/]", name) or name.startswith("demo/"):
        return name or None
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] or None
