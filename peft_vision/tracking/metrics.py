"""How good predicted boxes are, in the words of the three toolkits, which do not agree.

``otb`` (pytracking, OSTrack and LoRAT; LaSOT, TNL2K, OTB and one's own data), ``got10k`` (the
GOT-10k toolkit on GOT-10k), ``trackingnet`` (the devkit of TrackingNet), and ``toolkit`` (what the
GOT-10k toolkit computes on OTB and LaSOT). Boxes are x, y, w, h in pixels, float64, N 4. Counted
from 0 or from 1 makes no difference as long as predictions and ground truth do it alike.

Where a function takes predictions and ground truth it raises `DataError` when their lengths differ,
or predictions are not finite or have a side below 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peft_vision.errors import DataError
from peft_vision.tracking._measures import Curve, above, area, distances, overlaps, within
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.sequences import Flags

DIALECTS = ("otb", "got10k", "trackingnet", "toolkit")

_OVERLAPS = np.linspace(0, 1, 21)
_PIXELS = np.arange(51, dtype=np.float64)
_SHARES = np.arange(51) / 100.0
_AT_20 = 20
"""Where both 20 pixels and 0.20 of the target's size are among the thresholds."""


@dataclass(frozen=True)
class Scored:
    """Figures of a sequence or of a data set.

    Attributes:
        figures: by name; fractions in [0, 1], for ``trackingnet`` in [0, 100].
        curves: "success", and but for ``got10k`` "precision" and "normalized_precision".
    """

    figures: dict[str, float]
    curves: dict[str, Curve]


def otb(
    predicted: Array,
    truth: Array,
    visible: Flags | None = None,
    *,
    hidden: str = "hit",
    invalid_center: float = math.inf,
) -> Scored:
    """SUC, P, P_norm, OP50 and OP75 of one sequence, as pytracking, OSTrack and LoRAT have them.

    The first prediction is replaced by the ground truth, and all frames are in the denominator. A
    frame is valid where the target has an area (NaN: it has none) and is visible. One that is not
    costs success and precision, and counts as a hit in P_norm unless `hidden` says otherwise.

    Values that equal a threshold are decided by the formula. The originals let rounding decide
    where boxes are not whole numbers (an overlap of 1 + 2e-16), or for P_norm, where they are.

    Args:
        predicted: N 4. `truth`: N 4; unknown is NaN.
        visible: N; given for the LaSOT family alone, None elsewhere.
        hidden: "miss" makes frames that are not visible cost P_norm as well (LaSOT).
        invalid_center: the center distance of invalid frames, in pixels (UAV: -1, a hit).

    Raises:
        DataError: see the module.
    """
    predicted, truth = _checked(predicted, truth)
    predicted[0] = truth[0]
    seen = np.ones(len(truth), dtype=bool) if visible is None else np.asarray(visible, dtype=bool)
    if seen.shape != (len(truth),):
        raise DataError(f"There are {len(truth)} boxes and {seen.shape} flags of visibility.")
    valid = (truth[:, 2:] > 0).all(1) & seen
    overlap = np.where(valid, overlaps(predicted, truth), -1.0)
    center = np.where(valid, distances(predicted, truth), invalid_center)
    share = np.where(valid, distances(predicted, truth, truth[:, 2:]), -1.0)
    if hidden == "miss":
        center, share = np.where(seen, center, np.inf), np.where(seen, share, np.inf)
    success = above(overlap, _OVERLAPS)
    precision, normalized = within(center, _PIXELS), within(share, _SHARES)
    figures = {
        "SUC": float(success.values.mean()),
        "P": float(precision.values[_AT_20]),
        "P_norm": float(normalized.values[_AT_20]),
        "OP50": float(success.values[10]),
        "OP75": float(success.values[15]),
    }
    return Scored(figures, _three(success, precision, normalized))


def toolkit(predicted: Array, truth: Array) -> Scored:
    """SUC, P, P_norm and OP50 of one sequence, as the GOT-10k toolkit has them for OTB and LaSOT.

    The first prediction is replaced by the ground truth. Rows with NaN are left out, all else
    counts. P_norm is the mean of its curve from 0 to 0.5; sides below a pixel count as one there.

    Raises:
        DataError: see the module; or every row has NaN.
    """
    predicted, truth = _checked(predicted, truth)
    predicted[0] = truth[0]
    known = np.isfinite(truth).all(1)
    if not known.any():
        raise DataError("No row of the ground truth is known.")
    predicted, truth = predicted[known], truth[known]
    success = above(overlaps(predicted, truth), _OVERLAPS)
    precision = within(distances(predicted, truth), _PIXELS)
    share = distances(predicted, truth, np.maximum(truth[:, 2:], 1.0))
    normalized = within(share, np.linspace(0, 0.5, 51))
    figures = {
        "SUC": float(success.values.mean()),
        "P": float(precision.values[_AT_20]),
        "P_norm": float(normalized.values.mean()),
        "OP50": float(success.values[10]),
    }
    return Scored(figures, _three(success, precision, normalized))


def trackingnet(predicted: Array, truth: Array) -> Scored:
    """SUC, P and P_norm of one sequence in [0, 100], as the devkit of TrackingNet has them.

    All coordinates are rounded to whole pixels, half to even. The first prediction is replaced by
    the ground truth and counts. All three are areas below curves of 21 points, times 100.

    Raises:
        DataError: see the module.
    """
    predicted, truth = (np.round(boxes) for boxes in _checked(predicted, truth))
    predicted[0] = truth[0]
    overlap = overlaps(predicted, truth, empty=np.nan)
    success = Curve(_OVERLAPS, (overlap[:, None] >= _OVERLAPS).mean(0))
    precision = within(distances(predicted, truth), np.linspace(0, 50, 21))
    normalized = within(distances(predicted, truth, truth[:, 2:]), np.linspace(0, 0.5, 21))
    figures = {
        "SUC": area(success.values),
        "P": area(precision.values),
        "P_norm": area(normalized.values),
    }
    return Scored(figures, _three(success, precision, normalized))


def got10k_overlaps(
    predicted: Array, truth: Array, size: tuple[float, float], cover: Array | None = None
) -> Array:
    """The overlaps of one sequence that count on GOT-10k: M, in [0, 1].

    The first frame does not count, nor do frames where the target is covered completely. Corners
    are moved into the image before sides are cut, so that a box that begins outside keeps its
    width: the toolkit does it so.

    Args:
        predicted: N 4. `truth`: N 4.
        size: width and height of the frames.
        cover: N, 0 (nothing is to be seen) to 8; None: the target is seen everywhere.

    Raises:
        DataError: see the module; or `cover` has another length.
    """
    predicted, truth = _checked(predicted, truth)
    counted = np.ones(len(truth), dtype=bool) if cover is None else np.asarray(cover) > 0
    if counted.shape != (len(truth),):
        raise DataError(f"There are {len(truth)} boxes and {counted.shape} figures of cover.")
    found = overlaps(_bounded(predicted, size), _bounded(truth, size))
    return np.asarray(found[1:][counted[1:]])


def got10k(found: Sequence[Array]) -> Scored:
    """AO, SR50 and SR75 of `got10k_overlaps`, all sequences in one pool; 101 points of success.

    Raises:
        DataError: no frame counts.
    """
    pool = np.concatenate([np.zeros(0), *found])
    if not len(pool):
        raise DataError("No frame after the first shows the target, so there is nothing to score.")
    figures = {
        "AO": float(pool.mean()),
        "SR50": float((pool > 0.5).mean()),
        "SR75": float((pool > 0.75).mean()),
    }
    return Scored(figures, {"success": above(pool, np.linspace(0, 1, 101))})


def mean(scored: Sequence[Scored]) -> Scored:
    """The score of a data set: the mean over its sequences, of figures and of curves.

    Raises:
        DataError: there are none.
    """
    if not scored:
        raise DataError("There is no sequence to take the mean of.")
    figures = {
        name: float(np.mean([one.figures[name] for one in scored])) for name in scored[0].figures
    }
    curves = {
        name: Curve(curve.thresholds, np.mean([one.curves[name].values for one in scored], axis=0))
        for name, curve in scored[0].curves.items()
    }
    return Scored(figures, curves)


def mean_of_rates(seconds: Array) -> float | None:
    """Frames per second as the GOT-10k toolkit has it: the mean of 1 / t over frames with t > 0."""
    timed = np.asarray(seconds, dtype=np.float64)
    timed = timed[timed > 0]
    return float((1 / timed).mean()) if len(timed) else None


def rate_of_mean(seconds: Array) -> float | None:
    """Frames per second as one waits for them: 1 / mean(t), never above `mean_of_rates`."""
    timed = np.asarray(seconds, dtype=np.float64)
    return float(1 / timed.mean()) if len(timed) and timed.sum() > 0 else None


def _checked(predicted: Array, truth: Array) -> tuple[Array, Array]:
    """Copies in float64."""
    predicted, truth = np.array(predicted, np.float64), np.array(truth, np.float64)
    if predicted.shape != truth.shape or predicted.ndim != 2 or predicted.shape[1:] != (4,):
        raise DataError(
            f"Predictions have the shape {predicted.shape} and ground truth {truth.shape}; both "
            "need one row x, y, w, h for each frame."
        )
    if not len(truth):
        raise DataError("There is no frame to score.")
    wrong = ~np.isfinite(predicted).all(1) | (predicted[:, 2:] < 0).any(1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"Prediction {row} is {predicted[row].tolist()}; x, y, w, h are finite numbers, "
            "w and h at least 0."
        )
    return predicted, truth


def _bounded(boxes: Array, size: tuple[float, float]) -> Array:
    edge = np.asarray(size, dtype=np.float64)
    corner = np.clip(boxes[:, :2], 0.0, edge)
    return np.concatenate([corner, np.clip(boxes[:, 2:], 0.0, edge - corner)], axis=1)


def _three(success: Curve, precision: Curve, normalized: Curve) -> dict[str, Curve]:
    return {"success": success, "precision": precision, "normalized_precision": normalized}
