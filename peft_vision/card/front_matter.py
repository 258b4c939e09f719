"""The YAML block at the top of a card, which the Hub reads."""

from __future__ import annotations

import re
from typing import Any

from peft_vision.card.record import (
    METRICS,
    Content,
    data_name,
    figures_of,
    hub_name_of_base,
    is_adapter,
    is_hub_id,
    license_of,
    pipeline_of,
    source_of,
    title_of,
)

_HUB_LICENSES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail", "unlicense", "gpl-3.0"),
}
"""What the Hub accepts as it is; any other license goes in by name, as "other"."""


def front_matter(content: Content) -> str:
    """The YAML block that the Hub reads, without its fences."""
    from huggingface_hub import ModelCardData

    base = hub_name_of_base(content)
    adapter = is_adapter(content)
    results = _eval_results(content)
    data = ModelCardData(
        library_name="peft" if adapter else "peft_vision",
        pipeline_tag=pipeline_of(content),
        base_model=base,
        base_model_relation="adapter" if adapter and base else None,
        tags=[*_provider_tag(content), "peft_vision"],
        datasets=sorted({name for name in _datasets(content) if is_hub_id(name)}) or None,
        model_name=title_of(content) if results else None,
        eval_results=results or None,
    )
    for name, value in _license_fields(content).items():
        data[name] = value
    return data.to_yaml()


def _license_fields(content: Content) -> dict[str, str]:
    name = license_of(content)
    if name is None:
        return {}
    if name.lower() in _HUB_LICENSES:
        return {"license": name.lower()}
    return {
        "license": "other",
        "license_name": re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-"),
    }


def _provider_tag(content: Content) -> list[str]:
    kind = str(
        source_of(content).get("source") or str(content.get("model_class")).partition(".")[0]
    )
    if kind in {"timm", "transformers"}:
        return [kind]
    return ["timm"] if str(content.get("model_class")).startswith("timm.") else []


def _datasets(content: Content) -> list[str]:
    return [name for record in figures_of(content).values() if (name := data_name(record))]


def _eval_results(content: Content) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=pipeline_of(content),
            dataset_type=data if is_hub_id(data) else re.sub(r"[^\w.-]+", "-", data).strip("-"),
            dataset_name=data,
            metric_type=METRICS.get(name, (name, name))[0],
            metric_name=METRICS.get(name, (name, name))[1],
            metric_value=round(float(record["value"]), 6),
        )
        for name, record in figures_of(content).items()
        if (data := data_name(record))
    ]
