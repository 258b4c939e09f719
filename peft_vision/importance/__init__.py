"""How much each attention head matters: one score per file, found by its stem.

A file defines `score(backbone, batches, ...) -> Tensor` of L blocks x H heads, float64; higher
means keep, NaN stands where a block has no such head. Images need no labels. Scores are compared
and averaged by rank, heads among heads only.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone
from peft_vision.cost import input_size, unwrap
from peft_vision.data import preprocessing
from peft_vision.data.image_set import batches_of
from peft_vision.data.source import open_for_calibration
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.history import History
from peft_vision.importance._agreement import kendall, mean_rank
from peft_vision.importance._probing import images_for, spread
from peft_vision.layers.showing import images_of
from peft_vision.lookup import stems, unknown
from peft_vision.method import MEAN_RANK

__all__ = ["Importance", "as_evidence", "find", "kendall", "mean_rank", "names", "scores"]

FOLDER = "importance"
TRUTH = "leave_one_out"
"""The score that the others try to guess."""
IMAGES = 64
"""At most so many are looked at, unless told."""

Score = Callable[..., Tensor]


@dataclass(frozen=True)
class Importance:
    """Scores of a model's heads.

    Attributes:
        scores: name -> L H in float64, higher = keep, NaN where there is no head.
        notes: which scores were left out, and why.
        images: how many were looked at.
    """

    scores: dict[str, Tensor]
    images: int
    notes: list[str] = field(default_factory=list)

    @property
    def rank(self) -> Tensor:
        """Mean rank over the scores, L H in [0, 1]; 1 = keep first."""
        return mean_rank(self.scores)

    def agreement(self) -> dict[str, float]:
        """Kendall's tau of each score with the truth; empty where that was not computed."""
        if TRUTH not in self.scores:
            return {}
        return {name: kendall(s, self.scores[TRUTH]) for name, s in self.scores.items()}

    def lowest(self, count: int) -> list[tuple[int, int]]:
        """The `count` heads of lowest mean rank, as (block, head), the lowest first.

        The highest head of each block is not among them: a block keeps one.
        """
        rank = self.rank
        best = {block: int(row.nan_to_num(-1.0).argmax()) for block, row in enumerate(rank)}
        places = [
            (float(value), block, head)
            for block, row in enumerate(rank)
            for head, value in enumerate(row)
            if not bool(value.isnan()) and best[block] != head
        ]
        return [(block, head) for _, block, head in sorted(places)[:count]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; null where there is no head."""
        return {
            "images": self.images,
            "scores": {name: _listed(score) for name, score in self.scores.items()},
            "mean_rank": _listed(self.rank),
            "kendall": {n: _number(tau) for n, tau in self.agreement().items()},
            "notes": self.notes,
        }


def names() -> list[str]:
    """Every score there is, sorted."""
    return list(stems(FOLDER))


def find(name: str) -> Score:
    """A score by name; only its own file is imported.

    Raises:
        UnknownName: there is no such score; the message offers the nearest.
    """
    if name not in stems(FOLDER):
        raise unknown("score", name, names())
    score: Score = importlib.import_module(f"{__name__}.{name}").score
    return score


def scores(
    model: nn.Module,
    data: str | Path | Iterable[Any],
    which: Sequence[str] | None = None,
    *,
    images: int = IMAGES,
) -> Importance:
    """Score the heads of a model.

    Args:
        model: plain, adapted or compressed; it is left as it is.
        data: a folder of images, or batches of images B 3 H W or of (images, labels); labels are
            not read.
        which: names of scores; None: all that can be computed for this model.
        images: at most so many are drawn from a folder.

    Raises:
        UnknownName: there is no such score.
        UnsupportedSite: the model has no heads; or a score that was named cannot be computed.
        DataError, BadSetting: there are no images.
    """
    history, plain = History.of(model), unwrap(model)
    wanted = {name: find(name) for name in (names() if which is None else which)}
    if not wanted:
        raise BadSetting(f"No score was named. Possible: {', '.join(names())}.")
    backbone = view(plain)
    _require_scores(backbone)
    return _scored(backbone, _held(data, plain, history, images), wanted, every=which is None)


def as_evidence(name: str, backbone: Backbone, batches: Iterable[Any] | None) -> Tensor:
    """One score, or the mean rank of all that can be computed, as a pruner asks for it: L H.

    Args:
        name: one of `names`, or "mean_rank".
        batches: of images B 3 H W or of (images, labels), of which at most 64 are looked at; None:
            none were given.

    Raises:
        UnknownName: there is no such score.
        BadSetting: it is measured on images, and none were given.
        UnsupportedSite: the model has no heads, or the score cannot be computed for it.
    """
    every = name == MEAN_RANK
    wanted = {one: find(one) for one in (names() if every else [name])}
    _require_scores(backbone)
    if batches is None and (every or _reads_images(wanted[name])):
        without = [one for one in names() if not _reads_images(find(one))]
        raise BadSetting(
            f"The score {name!r} is measured on images, and none were given. Pass data, a folder "
            f"of images or batches; labels are not read. Without images: {', '.join(without)}."
        )
    held = [] if batches is None else spread(images_for(backbone, batches), IMAGES)
    found = _scored(backbone, held, wanted, every=every)
    return found.rank if every else found.scores[name]


def _require_scores(backbone: Backbone) -> None:
    backbone.require("heads")
    if "scores" in backbone.missing:
        why = backbone.missing["scores"]
        raise UnsupportedSite(f"{type(backbone.model).__name__} has no scores of heads: {why}.")


def _reads_images(score: Score) -> bool:
    """Whether a score has to be given batches."""
    return inspect.signature(score).parameters["batches"].default is inspect.Parameter.empty


def _scored(
    backbone: Backbone, held: list[Any], wanted: Mapping[str, Score], *, every: bool
) -> Importance:
    """By each score; of `every` there is, those that cannot be computed are left out by a note."""
    found, notes = {}, []
    for name, score in wanted.items():
        result = _tried(score, backbone, held)
        if isinstance(result, Tensor):
            found[name] = result
        elif not every:
            raise result
        else:
            notes.append(f"{name} was left out: {result}")
    return Importance(found, sum(len(images_of(batch)) for batch in held), notes)


def _tried(score: Score, backbone: Backbone, batches: list[Any]) -> Tensor | UnsupportedSite:
    try:
        return score(backbone, batches)
    except UnsupportedSite as error:
        return error


def _held(
    data: str | Path | Iterable[Any], plain: nn.Module, history: History, count: int
) -> list[Any]:
    if not isinstance(data, str | Path):
        return list(data)
    if count < 1:
        raise BadSetting(f"images is {count}; 1 or more works.")
    described = history.preprocessing or preprocessing.of_model(plain, "", input_size(plain)[1])
    transform = preprocessing.evaluation_transform(described)
    return list(batches_of(open_for_calibration(str(data), count), transform, count))


def _listed(score: Tensor) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in score.tolist()]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
