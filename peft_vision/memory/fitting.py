"""Make a run fit into the memory that its recipe names, or say what would: exact measures first.

Only what the recipe leaves at its default is chosen: sizes that are `auto`, how frozen weights are
stored, which costs nothing, then recomputed blocks and the size of a pass, which cost time, and
where no exact measure is enough, what rounds gradients. What is trained is never changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft_vision.errors import BadSetting
from peft_vision.memory.advice import Advice, advise, fewest_blocks, largest_pass
from peft_vision.memory.figures import MemoryEstimate
from peft_vision.memory.gpu import bytes_of, said
from peft_vision.memory.rehearsal import Rehearsal
from peft_vision.recipe import Recipe
from peft_vision.training.settings import TrainSettings

MOST = 1024
"""The largest batch that `auto` chooses, over all processes."""

Changes = dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """What was chosen.

    Attributes:
        changes: settings of `train` -> their values; empty where the recipe fits as it is.
        estimate: with them.
    """

    changes: Changes
    estimate: MemoryEstimate

    def words(self, memory: str) -> str:
        """One line for the user."""
        chosen = ", ".join(f"train.{key}={_yaml(value)}" for key, value in self.changes.items())
        done = f"chosen: {chosen}" if chosen else "nothing has to be changed"
        return f"memory {memory}: {done}; predicted peak {said(self.estimate.peak)}."


def fit_to(recipe: Recipe, rehearsal: Rehearsal) -> Fit:
    """Choose the settings of `train` with which a recipe fits into its `memory`.

    `train.precision` has to say which precision it will be; auto is taken for bf16.

    Raises:
        BadSetting: the size cannot be read, nothing makes the recipe fit, or `batch_size: auto`
            stands beside a `micro_batch` in figures.
    """
    size = bytes_of(str(recipe.memory))
    settings = recipe.train
    if settings.batch_size == "auto" and isinstance(settings.micro_batch, int):
        raise BadSetting(
            f"train.batch_size=auto is the largest batch that fits in one pass, and "
            f"train.micro_batch={settings.micro_batch} asks for passes of its own. Give one of the "
            "two in figures and leave the other out."
        )
    free = _free(settings, rehearsal)
    found = _sized({}, settings, rehearsal, size) if free else None
    if found is not None:
        return found
    for rounding in _roundings(settings):
        for exact in _exact(settings):
            found = _sized({**free, **rounding, **exact}, settings, rehearsal, size)
            if found is not None:
                return _with_fewest_blocks(found, exact, settings, rehearsal, size)
        found = _in_smaller_passes({**free, **rounding, **exact}, settings, rehearsal, size)
        if found is not None:
            return found
    least = _with_numbers(recipe, rehearsal.processes)
    raise BadSetting(refusal(advise(least, rehearsal, size), str(recipe.memory)))


def refusal(advice: Advice, memory: str) -> str:
    """Why a run is not begun, with what each change would come to."""
    listed = "\n".join(
        f"  {change.words}: {said(change.estimate.peak)} ({change.kind})"
        for change in advice.changes
    )
    most = f"The largest pass that fits is of {advice.largest} images. " if advice.largest else ""
    return (
        f"The run needs {said(advice.estimate.peak)} and {memory} is {said(advice.size)}: "
        f"{advice.estimate.work}. {most}Each on its own, these changes come to:\n{listed}\n"
        "peft-vision memory shows what holds it."
    )


def _free(settings: TrainSettings, rehearsal: Rehearsal) -> Changes:
    """What changes no number and takes no time, where the recipe leaves it open."""
    is_open = settings.precision != "fp32" and "frozen" not in settings.model_fields_set
    return {"frozen": "bf16"} if rehearsal.has_frozen and is_open else {}


def _roundings(settings: TrainSettings) -> list[Changes]:
    """None, then what rounds gradients, where the recipe leaves it open."""
    is_open = settings.precision != "fp32" and "norms" not in settings.model_fields_set
    return [{}, {"norms": "low"}] if is_open else [{}]


def _exact(settings: TrainSettings) -> list[Changes]:
    """Measures that change no number but take time: recompute nothing, or every block."""
    if "gradient_checkpointing" in settings.model_fields_set:
        return [{}]
    return [{}, {"gradient_checkpointing": True}]


def _sized(
    changes: Changes, settings: TrainSettings, rehearsal: Rehearsal, size: int
) -> Fit | None:
    """With the sizes of batch and pass found, if they are `auto`; None where it does not fit."""
    tried = settings.model_copy(update=changes)
    if settings.batch_size == "auto":
        # Found with every block recomputed where that is open: the batch is what was asked for.
        if not changes.get("gradient_checkpointing") and len(_exact(settings)) > 1:
            return None
        return _largest_batch(changes, tried, rehearsal, size)
    if settings.micro_batch == "auto":
        whole = tried.model_copy(update={"micro_batch": None})
        found = largest_pass(whole, rehearsal, size)
        return found and Fit({**changes, "micro_batch": found[0]}, found[1])
    estimate = rehearsal.run(tried)
    return Fit(changes, estimate) if estimate.fits(size) else None


def _largest_batch(
    changes: Changes, settings: TrainSettings, rehearsal: Rehearsal, size: int
) -> Fit | None:
    best, count = None, rehearsal.processes
    while count <= MOST:
        sizes = {"batch_size": count, "micro_batch": None}
        estimate = rehearsal.run(settings.model_copy(update=sizes))
        if not estimate.fits(size):
            break
        best, count = Fit({**changes, **sizes}, estimate), 2 * count
    return best


def _in_smaller_passes(
    changes: Changes, settings: TrainSettings, rehearsal: Rehearsal, size: int
) -> Fit | None:
    if settings.batch_size == "auto" or settings.micro_batch is not None:
        return None
    found = largest_pass(settings.model_copy(update=changes), rehearsal, size)
    return found and Fit({**changes, "micro_batch": found[0]}, found[1])


def _with_fewest_blocks(
    fit: Fit, exact: Changes, settings: TrainSettings, rehearsal: Rehearsal, size: int
) -> Fit:
    """Recompute no more blocks than needed."""
    if not exact:
        return fit
    changed = settings.model_copy(update=fit.changes)
    found = fewest_blocks(changed, rehearsal, size)
    if found is None:
        return fit
    return Fit({**fit.changes, "gradient_checkpointing": found[0]}, found[1])


def _with_numbers(recipe: Recipe, processes: int) -> Recipe:
    """The recipe with one image per pass where it says auto."""
    settings, update = recipe.train, dict[str, Any]()
    if settings.batch_size == "auto":
        update["batch_size"] = processes
    if settings.micro_batch == "auto":
        update["micro_batch"] = 1
    return recipe.model_copy(update={"train": settings.model_copy(update=update)})


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else value
