"""What would make a run fit: changes of its recipe, each with the bytes that it would take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft_vision.backbones import view
from peft_vision.cost import unwrap
from peft_vision.errors import BadSetting, MissingExtra, UnsupportedSite
from peft_vision.lookup import stems
from peft_vision.memory.estimate import rehearsal_of
from peft_vision.memory.figures import MemoryEstimate
from peft_vision.memory.rehearsal import Rehearsal
from peft_vision.memory.sizes import divisors, fewest, largest
from peft_vision.method import find
from peft_vision.presets import expand
from peft_vision.recipe import MethodSettings, Recipe
from peft_vision.training.lean import holding
from peft_vision.training.settings import TrainSettings, share_of

EXACT, ROUNDING, OTHER_RUN = "exact", "rounding", "another run"
MOST = 4096
"""The largest batch that is looked for."""


@dataclass(frozen=True)
class Change:
    """A change of a recipe and what comes of it.

    Attributes:
        words: as on the command line, such as `train.frozen=bf16`.
        kind: "exact" (the same numbers), "rounding" (the same run, rounded elsewhere), or "another
            run" (something else is trained, or in another way).
    """

    words: str
    kind: str
    estimate: MemoryEstimate


@dataclass(frozen=True)
class Advice:
    """What a run takes and what would help.

    Attributes:
        estimate: as the recipe says.
        size: bytes that the GPU offers.
        changes: each on its own, exact ones first.
        largest: images in one pass that fit otherwise unchanged; 0 for none.
    """

    estimate: MemoryEstimate
    size: int
    changes: tuple[Change, ...]
    largest: int

    @property
    def fits(self) -> bool:
        """Whether nothing has to be changed."""
        return self.estimate.fits(self.size)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, sizes in bytes."""
        return {
            **self.estimate.to_json(),
            "size": self.size,
            "fits": self.fits,
            "largest": self.largest,
            "changes": [
                {
                    "change": change.words,
                    "kind": change.kind,
                    "peak": change.estimate.peak,
                    "fits": change.estimate.fits(self.size),
                }
                for change in self.changes
            ],
        }


def advise(recipe: Recipe, rehearsal: Rehearsal, size: int) -> Advice:
    """Rehearse a recipe, and where it does not fit, what would help.

    Args:
        rehearsal: of the recipe, as `rehearsal_of` makes it.
        size: bytes that the GPU offers.
    """
    settings = recipe.train
    estimate = rehearsal.run(settings)

    def passes_of(micro: int) -> MemoryEstimate:
        # As a batch of its own, so that no accumulation is mixed in.
        batch = {"batch_size": micro * rehearsal.processes, "micro_batch": None}
        return rehearsal.run(settings.model_copy(update=batch))

    best = largest(passes_of, estimate.micro_batch, size, MOST)
    changes = () if estimate.fits(size) else _changes(recipe, rehearsal, size)
    helpful = tuple(change for change in changes if change.estimate.peak < estimate.peak)
    return Advice(estimate, size, helpful, best)


def _changes(recipe: Recipe, rehearsal: Rehearsal, size: int) -> Iterator[Change]:
    settings = recipe.train
    for words, kind, update in _settings(settings, rehearsal):
        changed = _under(settings.model_copy(update=update), rehearsal)
        if changed is None:
            continue
        if words == CHECKPOINTING and changed.fits(size):
            yield from _few_blocks(settings, rehearsal, size)
        yield Change(words, kind, changed)
    yield from _smaller_passes(settings, rehearsal, size)
    for words, changed_recipe in (*_quantized(recipe), *_last_blocks(recipe, rehearsal)):
        estimate = _of_another(changed_recipe, rehearsal)
        if estimate is not None:
            yield Change(words, OTHER_RUN, estimate)


def _under(settings: TrainSettings, rehearsal: Rehearsal) -> MemoryEstimate | None:
    """What a run takes under settings; None where they do not go with the model."""
    try:
        return rehearsal.run(settings)
    except (BadSetting, UnsupportedSite):
        return None


CHECKPOINTING = "train.gradient_checkpointing=true"


def _settings(
    settings: TrainSettings, rehearsal: Rehearsal
) -> list[tuple[str, str, dict[str, Any]]]:
    """(words, kind, update) of the settings that are not there yet."""
    low = settings.precision != "fp32"
    found: list[tuple[str, str, dict[str, Any]]] = []
    if settings.recompute == "nothing":
        words = "train.recompute=activations"
        found.append((words, EXACT, {"recompute": "activations"}))
    if low and rehearsal.has_frozen and settings.frozen == "keep":
        found.append(("train.frozen=bf16", EXACT, {"frozen": "bf16"}))
    if settings.gradient_checkpointing is not True:
        found.append((CHECKPOINTING, EXACT, {"gradient_checkpointing": True}))
    if not low:
        found.append(("train.precision=bf16", ROUNDING, {"precision": "bf16"}))
    if low and settings.norms == "full":
        found.append(("train.norms=low", ROUNDING, {"norms": "low"}))
    if settings.optimizer == "adamw":
        words = "train.optimizer=adamw_8bit"
        found.append((words, ROUNDING, {"optimizer": "adamw_8bit"}))
    return found


def _few_blocks(settings: TrainSettings, rehearsal: Rehearsal, size: int) -> Iterator[Change]:
    """The fewest blocks whose recomputing is enough."""
    found = fewest_blocks(settings, rehearsal, size)
    if found is not None:
        count, estimate = found
        yield Change(f"train.gradient_checkpointing={count}", EXACT, estimate)


def fewest_blocks(
    settings: TrainSettings, rehearsal: Rehearsal, size: int
) -> tuple[int, MemoryEstimate] | None:
    """How many recomputed blocks are enough, where not all are needed."""
    blocks = len(holding(view(unwrap(rehearsal.model))))

    def with_blocks(count: int) -> MemoryEstimate:
        return rehearsal.run(settings.model_copy(update={"gradient_checkpointing": count}))

    return fewest(with_blocks, blocks, size) if blocks > 1 else None


def _smaller_passes(settings: TrainSettings, rehearsal: Rehearsal, size: int) -> Iterator[Change]:
    micro, _ = share_of(settings, rehearsal.processes)
    found = largest_pass(settings, rehearsal, size)
    if found is not None and found[0] < micro:
        yield Change(f"train.micro_batch={found[0]}", EXACT, found[1])


def largest_pass(
    settings: TrainSettings, rehearsal: Rehearsal, size: int
) -> tuple[int, MemoryEstimate] | None:
    """The largest pass that fits and divides the share of the batch; None: not even one image."""
    micro, passes = share_of(settings, rehearsal.processes)
    tried = dict[int, MemoryEstimate]()

    def in_passes(count: int) -> MemoryEstimate:
        if count not in tried:
            tried[count] = rehearsal.run(settings.model_copy(update={"micro_batch": count}))
        return tried[count]

    allowed = [count for count in divisors(micro * passes) if count <= micro]
    low, high = 0, len(allowed)
    while low < high:
        middle = (low + high) // 2
        if in_passes(allowed[middle]).fits(size):
            low = middle + 1
        else:
            high = middle
    return (allowed[low - 1], in_passes(allowed[low - 1])) if low else None


def _quantized(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """The recipe with its base in fewer bits, each way there is."""
    known = stems("quantizers")
    names = {part for entry in recipe.methods for part, _ in expand(entry.name)}
    if not recipe.methods or names & set(known):
        return
    for name in known:
        methods = [MethodSettings(name=name), *recipe.methods]
        listed = ",".join(entry.name for entry in methods)
        yield f"methods: [{listed}]", recipe.model_copy(update={"methods": methods})


def _last_blocks(recipe: Recipe, rehearsal: Rehearsal) -> Iterator[tuple[str, Recipe]]:
    """The recipe with its updates in the last half of the blocks only."""
    depth = len(view(unwrap(rehearsal.model)).blocks)
    for number, entry in enumerate(recipe.methods):
        if "last" not in _fields(entry.name) or "last" in entry.settings or depth < 2:
            continue
        changed = MethodSettings(name=entry.name, **{**entry.settings, "last": depth // 2})
        methods = [*recipe.methods[:number], changed, *recipe.methods[number + 1 :]]
        words = f"methods.{number}.last={depth // 2}"
        yield words, recipe.model_copy(update={"methods": methods})


def _of_another(recipe: Recipe, rehearsal: Rehearsal) -> MemoryEstimate | None:
    """What a changed recipe takes; None where the change does not go with the model."""
    size = rehearsal.image_size[1:]
    try:
        other = rehearsal_of(recipe, rehearsal.classes, size, rehearsal.processes, rehearsal.loss)
        return other.run(recipe.train)
    except (BadSetting, UnsupportedSite, MissingExtra):
        return None


def _fields(name: str) -> set[str]:
    return {field.name for part, _ in expand(name) for field in dataclasses.fields(find(part))}
