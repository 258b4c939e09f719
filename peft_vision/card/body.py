"""The text of a card, section by section."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from peft_vision.card.front_matter import front_matter
from peft_vision.card.record import (
    METRICS,
    STRUCTURAL,
    Content,
    data_name,
    figures_of,
    hub_name_of_base,
    is_adapter,
    is_plain_peft,
    license_of,
    mapping,
    source_of,
    standard_error,
    steps_of,
    title_of,
)

"""Their attention reads the weight of a linear instead of calling it."""

_MOST_LABELS = 100


def render_card(content: Content) -> str:
    """README.md for the Hub: YAML front matter and Markdown.

    Args:
        content: what `peft_vision.json` holds; any key may be absent or null.
    """
    sections = (
        _summary(content),
        _methods(content),
        _cost(content),
        _metrics(content),
        _usage(content),
        _preprocessing(content),
        _labels(content),
        _limits(content),
        _versions(content),
    )
    return f"---\n{front_matter(content)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _summary(content: Content) -> str:
    steps = steps_of(content)
    what = "An adapter for" if is_adapter(content) else "A compressed version of"
    if not steps:
        what = "A saved copy of"
    methods = ", then ".join(f"`{step.get('method')}`" for step in steps)
    lines = [
        f"# {title_of(content)}",
        f"{what} {_base_in_words(content)}"
        + (f", made with {methods}" if methods else "")
        + " in `peft_vision`.",
        f"License of the base model: {license_of(content) or 'not stated by the base model'}.",
    ]
    return "\n\n".join(lines)


def _base_in_words(content: Content) -> str:
    source, hub = source_of(content), hub_name_of_base(content)
    if hub:
        return f"[{hub}](https://huggingface.co/{hub})"
    kind, name = source.get("source"), str(source.get("name") or "")
    if kind and name and not name.startswith(("/", ".", "~")):
        own = " with a shape of its own" if STRUCTURAL & set(mapping(source.get("kwargs"))) else ""
        return f"`{kind}/{name}`{own}"
    if kind and source.get("class"):
        return f"a `{source['class']}` of {kind}"
    return (
        f"a `{content['model_class']}`" if content.get("model_class") else "a model of the author"
    )


def _methods(content: Content) -> str:
    parts = ["## Method"]
    for step in steps_of(content):
        strength, sites = step.get("strength"), len(mapping(step.get("decisions")))
        facts = [f"applied at strength {_number(strength)} of 1"] if strength is not None else []
        facts += [f"acts on {sites} {'place' if sites == 1 else 'places'}"] if sites else []
        parts.append(f"### {step.get('method')}" + (f"\n\n{', '.join(facts)}" if facts else ""))
        settings = mapping(step.get("settings"))
        if settings:
            rows = [(f"`{name}`", _value(value)) for name, value in settings.items()]
            parts.append(_table(("setting", "value"), rows))
    if any(step.get("strength") is not None for step in steps_of(content)):
        parts.append("The strength applied takes the place of a strength among the settings.")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _cost(content: Content) -> str:
    cost = mapping(content.get("cost"))
    before, after = mapping(cost.get("before")), mapping(cost.get("after"))
    rows = []
    for label, key, unit in (
        ("multiply-accumulates (GMACs)", "flops", 2e9),
        ("floating-point operations (GFLOPs)", "flops", 1e9),
        ("parameters (M)", "params", 1e6),
        ("trainable parameters (M)", "trainable", 1e6),
        ("weights in memory (MiB)", "bytes", 2**20),
    ):
        pair = before.get(key), after.get(key)
        if pair != (None, None):
            shown = ["" if value is None else _short(value / unit) for value in pair]
            ratio = f"{pair[1] / pair[0]:.3f}" if pair[0] and pair[1] is not None else ""
            rows.append((label, *shown, ratio))
    if not rows:
        return ""
    size = after.get("image_size") or before.get("image_size")
    notes = [
        "Counted for one image"
        + (f" of {' x '.join(str(side) for side in size)} pixels" if size else "")
        + ", two operations per multiply-accumulate. Many papers print GMACs under the name GFLOPs."
    ]
    if is_adapter(content):
        notes.append(
            "`after` is with the adapter beside the base"
            + ("." if content.get("quantized") else "; merged, it costs what `before` says.")
        )
    files = [of.get("bytes", 0) for of in mapping(content.get("files")).values()]
    if files:
        notes.append(f"The files take {_short(sum(files) / 2**20)} MiB on disk.")
    head = ("", "before", "after", "after / before")
    return f"## Cost\n\n{_table(head, rows)}\n\n{' '.join(notes)}"


def _metrics(content: Content) -> str:
    rows = []
    for name, record in figures_of(content).items():
        value, error = record["value"], standard_error(name, record)
        percent = name in {"top1", "top5"}
        shown = f"{value:.2%}" if percent else _number(value)
        spread = "" if error is None else f"{error:.2%}" if percent else _number(error)
        title = METRICS.get(name, (name, name))[1]
        rows.append((title, shown, spread, record.get("n", ""), data_name(record) or ""))
    if not rows:
        return "## Results\n\nNo evaluation is recorded with these files."
    return "## Results\n\n" + _table(("", "value", "standard error", "n", "data"), rows)


def _usage(content: Content) -> str:
    base = "" if source_of(content) else "base=base"
    call = ", ".join(filter(None, ('"."', base)))
    lines = ["import peft_vision", ""]
    if base:
        lines.append("# base: the model that this was made from, built by your own code")
    lines.append(f"model = peft_vision.load({call})  # this folder, or its repository's name")
    if is_adapter(content):
        same = "in full precision" if content.get("quantized") else "the same outputs"
        lines.append(f"plain = peft_vision.merge(model)  # {same}, no adapter left")
    text = f"## Use\n\n{_code(lines)}"
    if reason := content.get("foreign"):
        text += (
            f"\n\nPlain PEFT refuses this folder: {reason}. Open it as above, or hand out the "
            "merged model."
        )
    return f"{text}\n\n{_plain_peft(content)}" if is_plain_peft(content) else text


def _plain_peft(content: Content) -> str:
    imports, base = _base_code(content)
    lines = [*imports, "from peft import PeftModel", "", base]
    lines.append('model = PeftModel.from_pretrained(base, ".").eval()')
    return f"With plain PEFT, without peft_vision:\n\n{_code(lines)}"


def _base_code(content: Content) -> tuple[list[str], str]:
    """Imports and the line that makes the base."""
    source, hub = source_of(content), hub_name_of_base(content)
    kind, name = str(source.get("source") or ""), str(source.get("name") or "")
    kwargs = mapping(source.get("kwargs"))
    shown = "".join(f", {key}={_python(value)}" for key, value in kwargs.items())
    if kind == "timm" and hub:
        name = hub.partition("/")[2]
        return ["import timm"], f'base = timm.create_model("{name}", pretrained=True{shown})'
    if kind == "transformers" and hub and source.get("class"):
        load = f'{source["class"]}.from_pretrained("{hub}"{_label_count(content)})'
        return [f"from transformers import {source['class']}"], f"base = {load}"
    if kind and name and not {"timm", "transformers"} & {kind}:
        call = f'peft_vision.create_model("{kind}/{name}"{shown})'
        return ["import peft_vision"], f"base = {call}"
    return [], "# base: the model that this was made from, with its weights"


def _label_count(content: Content) -> str:
    config = mapping(source_of(content).get("config"))
    labels = content.get("labels") or config.get("id2label")
    return f", num_labels={len(labels)}" if labels else ""


def _preprocessing(content: Content) -> str:
    given = mapping(content.get("preprocessing"))
    rows = [(name, f"`{_json(value)}`") for name, value in given.items() if value is not None]
    return f"## Preprocessing\n\n{_table(('', 'value'), rows)}" if rows else ""


def _labels(content: Content) -> str:
    labels = [str(label) for label in content.get("labels") or ()]
    if not labels:
        return ""
    shown = _json(labels[:_MOST_LABELS]).replace("`", "\\u0060")
    rest = len(labels) - _MOST_LABELS
    more = f"\n\nThe other {rest} are in `peft_vision.json`." if rest > 0 else ""
    return (
        f"## Labels\n\n{len(labels)} classes, in the order of the outputs:\n\n"
        f"```json\n{shown}\n```{more}"
    )


def _limits(content: Content) -> str:
    limits = ["What the base model is not fit for, this model is not fit for either."]
    if not figures_of(content):
        limits.append("No accuracy is recorded, so none is claimed.")
    elif all("standard_error" not in record for record in figures_of(content).values()):
        limits.append("Standard errors come from the number of images alone, from a single run.")
    if content.get("cost"):
        limits.append("Operations are counted, not timed: fewer of them can still take as long.")
    if content.get("kind") == "compressed":
        limits.append(
            "The structure differs from the published architecture, so these weights fit "
            "neither `timm.create_model` nor `from_pretrained` of transformers; "
            "`peft_vision.load` rebuilds it."
        )
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _versions(content: Content) -> str:
    versions = mapping(content.get("versions"))
    if not versions:
        return ""
    return "## Versions\n\n" + ", ".join(f"{name} {number}" for name, number in versions.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _code(lines: Sequence[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _value(value: Any) -> str:
    return "not set" if value is None else f"`{_json(value)}`"


def _python(value: Any) -> str:
    return repr(tuple(value) if isinstance(value, list) else value)
