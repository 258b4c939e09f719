"""The quickstart's report, put together from its figures and models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_vision import __version__
from peft_vision.artifact import versions
from peft_vision.data import demo as demo_data
from peft_vision.data.preprocessing import evaluation_transform
from peft_vision.finetuning.images import sections
from peft_vision.importance import names as score_names
from peft_vision.presets import expand
from peft_vision.quickstart.outcome import BUDGET, TIMED, Outcome, weight_bytes
from peft_vision.report.anatomy import blocks_left, overlays_of, patches_of
from peft_vision.report.content import Ranking, ReportContent
from peft_vision.sources import demo as demo_model

if TYPE_CHECKING:
    from torch import nn

    from peft_vision.compressed import CompressedModel
    from peft_vision.data.source import Split
    from peft_vision.importance import Importance
    from peft_vision.recipe import Recipe

_PICTURES = 4


def content_of(
    outcome: Outcome,
    recipes: tuple[Recipe, Recipe],
    models: tuple[nn.Module, CompressedModel],
    data: Split,
) -> ReportContent:
    """Put the report together.

    Args:
        outcome: the figures.
        recipes: of the fine-tuning and of the recovery.
        models: the dense one and the one loaded from its folder.
        data: the images.
    """
    import torch

    dense, compressed = models
    described = compressed.history.preprocessing or {}
    shown = _one_per_class(data)
    prepare = evaluation_transform(described)
    images = torch.stack([prepare(data.validation.image(place)) for place in shown])
    titles = [f"Solar cell, {data.names[data.validation.targets[place]]}" for place in shown]
    name = sections(recipes[0])[0].train
    return ReportContent(
        title=f"{recipes[0].model.name} on {name}, compressed to {BUDGET:g} of its FLOPs",
        summary=_summary(outcome, demo_model.DESCRIPTION),
        readings=outcome.readings,
        baselines=outcome.measured.baselines,
        budget=BUDGET,
        patches=patches_of(dense),
        blocks=blocks_left(dense, compressed, images),
        ranking=_ranking(outcome.measured.importance),
        overlays=overlays_of(compressed, images, titles, described),
        settings=_settings(outcome, recipes, data),
        versions={"peft-vision": __version__, **versions()},
        seconds=outcome.measured.seconds,
        notes=_notes(outcome, demo_data.describe(name.removeprefix("demo/"))),
        commands=outcome.commands,
    )


def _ranking(found: Importance) -> Ranking:
    """The heads' mean ranks, and the scores by how far they agree with the truth."""
    content = found.to_json()
    taus = content["kendall"]
    order = sorted(taus, key=lambda name: -2.0 if taus[name] is None else taus[name], reverse=True)
    left = [name for name in score_names() if name not in found.scores]
    more = (
        f"Not computed here: {', '.join(left)}. `peft-vision show MODEL --importance heads --data "
        "DIR` computes all."
    )
    return Ranking(
        "dense",
        found.images,
        content["mean_rank"],
        {name: taus[name] for name in order},
        (*found.notes, more),
    )


def _one_per_class(data: Split) -> list[int]:
    """Places of some validation images, the classes in turns, spread over the set."""
    by_class = [
        [place for place, target in enumerate(data.validation.targets) if target == label]
        for label in range(len(data.names))
    ]
    present = [places for places in by_class if places]
    each = max(1, _PICTURES // len(present))
    picked = [places[:: max(1, len(places) // each)][:each] for places in present]
    return [place for group in zip(*picked, strict=False) for place in group]


def _summary(outcome: Outcome, model: str) -> str:
    dense, _, last = outcome.readings
    trial = (
        "A trial on a few images: the accuracies mean nothing. " if outcome.measured.fast else ""
    )
    return (
        f"{trial}{model}: adapted to labeled images, pruned, taught again by the dense model, "
        f"saved, loaded and exported. {100 * last.flops / dense.flops:.1f} % of the FLOPs are "
        f"left; the accuracy was {100 * dense.accuracy:.1f} % and is {100 * last.accuracy:.1f} %."
    )


def _settings(outcome: Outcome, recipes: tuple[Recipe, Recipe], data: Split) -> dict[str, Any]:
    import torch

    first, second = recipes
    how = sections(second)[1].distillation
    exported = outcome.measured.exported
    return {
        "fine-tuning": _methods(first),
        "epochs": f"{first.train.epochs}, then {second.train.epochs} to recover",
        "batch size": first.train.batch_size,
        "learning rate": f"{first.train.learning_rate:g}, then {second.train.learning_rate:g}",
        "compression": _methods(second),
        "teacher's share of the loss": how.weight if how else 0,
        "images": f"{len(data.train)} to train, {len(data.validation)} to validate",
        "seed": first.seed,
        "timed on": f"CPU, threads: {torch.get_num_threads()}, images a batch: {TIMED}",
        "adapter file": f"{weight_bytes(outcome.adapter) / 1e6:.1f} MB",
        "ONNX file": f"{exported.bytes / 1e6:.1f} MB",
        "ONNX against PyTorch": f"logits differ by {exported.max_difference:.1e} at most",
    }


def _methods(recipe: Recipe) -> str:
    return ", ".join(
        " ".join([name, *(f"{key}={value}" for key, value in {**preset, **entry.settings}.items())])
        for entry in recipe.methods
        for name, preset in expand(entry.name)
    )


def _notes(outcome: Outcome, data: str) -> tuple[str, ...]:
    return (
        "The last row is the model as loaded from its folder; its logits are those before saving.",
        "One seed; the standard errors count images alone, not other seeds or other modules.",
        data,
        "The weights were taken from a saliency model of unknown training: do not compare with "
        "published figures of DINOv2.",
    )
