"""Metrics of tracking: worked out by hand, by counting pixels, and beside the GOT-10k toolkit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peft_vision.errors import DataError
from peft_vision.tracking import metrics

INIT = [10.0, 10.0, 20.0, 20.0]
ABSENT = [0.0, 0.0, 0.0, 0.0]
NAN = [math.nan] * 4


def boxes(*rows: list[float]) -> np.ndarray:
    return np.array([INIT, *rows], dtype=np.float64)


def random_boxes(count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.concatenate(
        [generator.uniform(0, 60, (count, 2)), generator.uniform(5, 40, (count, 2))], axis=1
    )


def moved(truth: np.ndarray, seed: int, by: float = 8) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, by, truth.shape)
    return np.concatenate([truth[:, :2] + noise[:, :2], np.abs(truth[:, 2:] + noise[:, 2:])], 1)


def test_overlap_is_the_count_of_pixels():
    generator = np.random.default_rng(0)
    first, second = (
        np.concatenate([generator.integers(0, 20, (40, 2)), generator.integers(1, 20, (40, 2))], 1)
        for _ in range(2)
    )
    rows, columns = np.mgrid[0:40, 0:40]

    def inside(box):
        x, y, w, h = box
        return (columns >= x) & (columns <= x + w - 1) & (rows >= y) & (rows <= y + h - 1)

    counted = [
        (inside(a) & inside(b)).sum() / (inside(a) | inside(b)).sum()
        for a, b in zip(first, second, strict=True)
    ]
    assert (metrics.overlaps(first.astype(float), second.astype(float)) == counted).all()


def test_no_overlap_is_more_than_whole():
    truth = random_boxes(2000, 3)
    assert metrics.overlaps(truth, truth).max() == 1.0
    assert metrics.otb(truth, truth).curves["success"].values[-1] == 0.0


def test_an_overlap_that_equals_the_threshold_is_a_success_for_trackingnet_alone():
    truth, half = boxes(INIT), boxes([10, 10, 20, 10])
    found = metrics.otb(half, truth)
    assert found.curves["success"].values[9:11].tolist() == [1.0, 0.5]  # at 0.45 and at 0.5
    assert found.figures["OP50"] == 0.5
    # frame 0: 20 of 21 thresholds; frame 1: 0, 0.05 ... 0.45 are 10 of 21
    assert found.figures["SUC"] == pytest.approx((20 + 10) / 42)
    assert metrics.trackingnet(half, truth).curves["success"].values[10] == 1.0
    (overlap,) = metrics.got10k_overlaps(half, truth, (100, 100))
    assert metrics.got10k([np.array([overlap])]).figures == {"AO": 0.5, "SR50": 0, "SR75": 0}


def test_a_distance_that_equals_the_threshold_is_a_hit():
    truth = boxes([10, 10, 100, 50])
    at_20 = metrics.otb(boxes([30, 10, 100, 50]), truth)  # 20 px, a fifth of the width
    assert (at_20.figures["P"], at_20.figures["P_norm"]) == (1.0, 1.0)
    assert at_20.curves["precision"].values[19] == 0.5
    beyond = metrics.otb(boxes([10, 20.01, 100, 50]), truth)  # 10.01 px, of a height of 50
    assert (beyond.figures["P"], beyond.figures["P_norm"]) == (1.0, 0.5)
    grown = metrics.otb(boxes([10, 10, 140, 50]), truth)  # its center is 20 px to the right
    assert grown.figures["P"] == 1.0
    assert metrics.otb(boxes([10, 10, 140.1, 50]), truth).figures["P"] == 0.5


def test_the_first_prediction_is_the_ground_truth_where_the_dialect_says_so():
    truth = boxes(INIT)
    lost = truth.copy()
    lost[0] = [500, 500, 1, 1]
    for score in (metrics.otb, metrics.toolkit, metrics.trackingnet):
        assert score(lost, truth).figures == score(truth, truth).figures
    assert lost[0, 0] == 500  # what is given stays as it is


@pytest.mark.parametrize("absent", [ABSENT, NAN, [5, 5, 0, 9]])
def test_a_frame_without_a_box_costs_success_and_precision_and_not_p_norm(absent):
    truth, predicted = boxes(absent, INIT), boxes(INIT, INIT)
    found = metrics.otb(predicted, truth).figures
    assert found["SUC"] == pytest.approx(2 / 3 * 20 / 21)
    assert found["P"] == pytest.approx(2 / 3)
    assert found["P_norm"] == 1.0
    of_uav = metrics.otb(predicted, truth, invalid_center=-1.0).figures
    assert of_uav["P"] == 1.0
    assert of_uav["SUC"] == found["SUC"]


def test_a_hidden_frame_of_lasot_costs_all_three():
    truth, shown = boxes(INIT, INIT), np.array([True, False, True])
    without = metrics.otb(truth, truth).figures
    assert (without["P"], without["P_norm"]) == (1.0, 1.0)
    extension = metrics.otb(truth, truth, shown).figures
    assert (extension["P"], extension["P_norm"]) == (pytest.approx(2 / 3), 1.0)
    lasot = metrics.otb(truth, truth, shown, hidden="miss").figures
    assert lasot["P"] == lasot["P_norm"] == pytest.approx(2 / 3)
    assert lasot["SUC"] == extension["SUC"] == pytest.approx(2 / 3 * 20 / 21)
    # what has no box though it is not flagged as hidden is still a hit
    assert metrics.otb(truth, boxes(ABSENT, INIT), shown | True, hidden="miss").figures[
        "P_norm"
    ] == pytest.approx(1.0)


def test_counting_from_one_changes_nothing_when_both_do_it_and_something_when_one_does():
    truth = random_boxes(50, 1)
    predicted, one = moved(truth, 2), np.array([1.0, 1.0, 0.0, 0.0])
    for score in (metrics.otb, metrics.toolkit):
        expected = score(predicted, truth)
        assert score(predicted + one, truth + one).figures == pytest.approx(expected.figures)
        assert score(predicted + one, truth).figures["SUC"] != expected.figures["SUC"]
    # three pixels to the right and four down are five pixels, wherever one begins to count
    apart = np.tile([3.0, 4.0, 0.0, 0.0], (50, 1))
    assert metrics.distances(truth + one + apart, truth + one) == pytest.approx(np.full(50, 5.0))


def test_trackingnet_rounds_and_takes_areas():
    truth = boxes([10.4, 10.4, 20.4, 20.4])
    perfect = metrics.trackingnet(boxes([9.6, 9.6, 19.6, 19.6]), truth).figures
    assert perfect == {"SUC": 100.0, "P": 100.0, "P_norm": 100.0}
    # half of the box: overlap 0.5, centers 5 px apart, 0.25 of the height
    half = metrics.trackingnet(boxes([10, 10, 20, 10]), boxes(INIT)).figures
    # success of that frame: 1 up to 0.5, 0 from 0.55 on: area 10 * 0.05 + 0.025
    assert half["SUC"] == pytest.approx(100 * (1 + 0.525) / 2)
    # precision: 0 at 0 and 2.5 px, 1 from 5 px on: 18 * 0.05 + 0.025
    assert half["P"] == pytest.approx(100 * (1 + 0.925) / 2)
    # normalized: 0 up to 0.225, 1 from 0.25 on: 10 * 0.05 + 0.025
    assert half["P_norm"] == pytest.approx(100 * (1 + 0.525) / 2)
    assert np.round(2.5) == 2.0  # as numpy and the devkit do, half to even
    empty = metrics.trackingnet(boxes(ABSENT), boxes(ABSENT)).curves["success"].values
    assert empty[0] == 0.5  # no area on either side is no number, and no success even at 0


def test_got10k_bounds_leaves_out_the_first_frame_and_pools():
    truth = boxes([90, 10, 20, 20], INIT, INIT)
    predicted = boxes([90, 10, 10, 20], [-10, 10, 20, 20], INIT)
    found = metrics.got10k_overlaps(predicted, truth, (100, 50))
    # both are 10 wide once they end where the frame ends; a box from outside keeps its width
    assert found == pytest.approx([1.0, 10 / 30, 1.0])
    cover = np.array([8, 8, 0, 8])
    assert metrics.got10k_overlaps(predicted, truth, (100, 50), cover).tolist() == [1.0, 1.0]
    pooled = metrics.got10k([np.array([1.0, 0.8, 0.7]), np.array([0.1])])
    assert pooled.figures["AO"] == pytest.approx(2.6 / 4)  # and not (2.5 / 3 + 0.1) / 2
    assert (pooled.figures["SR50"], pooled.figures["SR75"]) == (0.75, 0.5)
    curve = pooled.curves["success"]
    assert (len(curve.values), curve.values[0], curve.values[-1]) == (101, 1.0, 0.0)
    with pytest.raises(DataError, match="No frame after the first"):
        metrics.got10k([found[:0]])


def test_the_toolkit_means_the_curve_of_p_norm_and_leaves_out_nan():
    truth = boxes([10, 10, 20, 20], NAN)
    predicted = boxes([14, 10, 20, 20], INIT)  # a fifth of the width away
    found = metrics.toolkit(predicted, truth)
    assert found.figures["P_norm"] == pytest.approx((1 + 31 / 51) / 2)  # 0.20 ... 0.50: 31 of 51
    assert metrics.otb(predicted, truth).figures["P_norm"] == 1.0  # the value at 0.20, NaN a hit
    assert metrics.toolkit(boxes([10, 10, 1, 1]), boxes(ABSENT)).figures["SUC"] == 10 / 21


def test_a_data_set_is_the_mean_over_sequences():
    truth = boxes(INIT)
    first, second = metrics.otb(truth, truth), metrics.otb(boxes([90, 90, 5, 5]), truth)
    both = metrics.mean([first, second])
    for name, value in both.figures.items():
        assert value == pytest.approx((first.figures[name] + second.figures[name]) / 2)
    assert both.figures["SUC"] == pytest.approx(both.curves["success"].values.mean())
    with pytest.raises(DataError, match="no sequence"):
        metrics.mean([])


def test_two_speeds():
    seconds = np.array([0.1, 0.3])
    assert metrics.mean_of_rates(seconds) == pytest.approx((10 + 10 / 3) / 2)
    assert metrics.rate_of_mean(seconds) == pytest.approx(5)
    assert metrics.mean_of_rates(np.zeros(2)) is None
    assert metrics.rate_of_mean(np.zeros(0)) is None


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        (boxes(INIT, INIT), r"\(3, 4\) and ground truth \(2, 4\)"),
        (boxes(NAN), "Prediction 1 is"),
        (boxes([1, 1, -2, 5]), "at least 0"),
        (boxes()[:0], "shape"),
    ],
)
def test_what_cannot_be_scored_is_refused(predicted, message):
    truth = boxes(INIT)
    for score in (metrics.otb, metrics.toolkit, metrics.trackingnet):
        with pytest.raises(DataError, match=message):
            score(predicted, truth)
    with pytest.raises(DataError, match=message):
        metrics.got10k_overlaps(predicted, truth, (10, 10))
    with pytest.raises(DataError, match="flags of visibility"):
        metrics.otb(truth, truth, np.ones(5, dtype=bool))
    with pytest.raises(DataError, match="figures of cover"):
        metrics.got10k_overlaps(truth, truth, (10, 10), np.ones(5))


def test_beside_the_toolkit():
    theirs = pytest.importorskip("got10k.utils.metrics")
    truth = random_boxes(2000, 3)
    predicted = moved(truth, 4)
    predicted[0] = truth[0]
    ious = theirs.rect_iou(predicted.copy(), truth.copy())
    errors = theirs.center_error(predicted, truth)
    assert metrics.overlaps(predicted, truth) == pytest.approx(ious, abs=1e-12)
    assert metrics.distances(predicted, truth) == pytest.approx(errors, abs=1e-12)

    found = metrics.toolkit(predicted, truth)
    success = (ious[:, None] > np.linspace(0, 1, 21)).mean(0)
    assert found.curves["success"].values.tolist() == success.tolist()
    precision = (errors[:, None] <= np.arange(51)).mean(0)
    assert found.curves["precision"].values.tolist() == precision.tolist()

    bounded = theirs.rect_iou(predicted[1:].copy(), truth[1:].copy(), bound=(70, 70))
    ours = metrics.got10k_overlaps(predicted, truth, (70, 70))
    assert ours == pytest.approx(bounded, abs=1e-12)
    assert metrics.got10k([ours]).figures["AO"] == pytest.approx(bounded.mean(), abs=1e-12)
