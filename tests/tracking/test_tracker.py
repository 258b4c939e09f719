"""The tracker: crops and boxes close, one is a batch of one, bad input gets one message."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.errors import BadSetting
from peft_vision.layers.readout import Boxes
from peft_vision.tracking import Geometry, Tracker, TrackingModel
from peft_vision.tracking.boxes import clipped, corners, sizes
from peft_vision.tracking.crops import Crop, cut, mean_color
from tests.tracking.moving_square import HEIGHT, WIDTH, noise, painted, path, seeing, tiny_tracker

START = [50.0, 40.0, 20.0, 16.0]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_tracker()


@pytest.fixture(scope="module")
def wide(model: nn.Module) -> nn.Module:
    """In float64, with boxes that depend on what is seen."""
    torch.manual_seed(1)
    found = copy.deepcopy(model).double()
    for name, weight in found.named_parameters():
        if "readout" in name or "score" in name or "box." in name:
            nn.init.normal_(weight, std=0.3)
    return found


@pytest.fixture
def tracker(model: nn.Module) -> Tracker:
    return Tracker(model, device="cpu")


def test_from_crop_to_box_to_frame_and_on(tracker: Tracker) -> None:
    """A model that sees the target keeps it for good, through changes of place and size."""
    seeing(tracker)
    boxes = path(60)
    tracker.start(painted(boxes[0]), boxes[0])
    for box in boxes[1:]:
        found, score = tracker.step(painted(box))
        assert np.abs(found - box).max() < 1.0
        assert score == pytest.approx(torch.tensor(6.0).sigmoid().item())


def test_a_target_that_leaves_in_part_and_comes_back(tracker: Tracker) -> None:
    seeing(tracker)
    x = np.concatenate([np.linspace(30, -12, 22), np.linspace(-12, 30, 22)])
    tracker.start(painted(np.array([x[0], 50, 20, 20])), [x[0], 50, 20, 20])
    for left in x[1:]:
        box = np.array([left, 50.0, 20.0, 20.0])
        found, _ = tracker.step(painted(box))
        seen = sizes(clipped(corners(box), WIDTH, HEIGHT))
        assert np.abs(found - seen).max() < 1.5
        assert found[0] >= 0


def test_small_boxes_are_looked_at_as_larger_ones(tracker: Tracker) -> None:
    seeing(tracker)
    sides: list[float] = []
    inner = tracker._run
    tracker._run = lambda *images: sides.append(1) or inner(*images)
    tracker.start(painted(np.array([60, 50, 3, 3])), [60, 50, 3, 3])
    found, _ = tracker.step(painted(np.array([68, 44, 3, 3])))  # far out of 4 x 3 px around
    assert np.abs(found - [68, 44, 3, 3]).max() < 1.0
    assert len(sides) == 1


def answering(tracker: Tracker, scores: torch.Tensor, boxes: torch.Tensor) -> None:
    tracker._run = lambda *_: Boxes(scores, boxes)


@pytest.mark.parametrize("window", [0.0, 0.45, 0.9])
def test_the_choice_is_the_window_s_and_the_confidence_is_not(
    model: nn.Module, window: float
) -> None:
    tracker = Tracker(model, geometry=Geometry(window=window), device="cpu")
    n = tracker.model.grids[1][0]
    logits = torch.randn(1, n, n) * 2
    shares = torch.rand(1, n, n, 4) * 0.2 + torch.tensor([0.2, 0.2, 0.6, 0.6])
    answering(tracker, logits, shares)
    tracker.start(noise(0), START)
    box, score = tracker.step(noise(1))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / (n - 1))
    raw = 1 / (1 + np.exp(-logits[0].double().numpy()))
    row, column = divmod(int(((1 - window) * raw + window * np.outer(hann, hann)).argmax()), n)
    assert score == pytest.approx(raw[row, column], abs=1e-6)
    w, h = START[2:]
    around = 64 / np.sqrt((w + 1.5 * (w + h)) * (h + 1.5 * (w + h)))
    middle = np.array([START[0] + w / 2, START[1] + h / 2])
    place = shares[0, row, column].double().numpy().reshape(2, 2)
    expected = (place * 64 - 32) / around + middle
    np.testing.assert_allclose(corners(box), expected.reshape(4), atol=1e-4)


@pytest.mark.parametrize("shares", [[0.9, 0.2, 0.1, 0.8], [-9, -9, -8, -8], [float("nan")] * 4])
def test_a_box_without_area_is_not_believed(tracker: Tracker, shares: list[float]) -> None:
    n = tracker.model.grids[1][0]
    answering(tracker, torch.zeros(1, n, n), torch.tensor(shares).expand(1, n, n, 4))
    tracker.start(noise(0), START)
    for _ in range(2):
        box, _ = tracker.step(noise(1))
        assert box.tolist() == START


def test_the_template_is_that_of_the_first_frame(tracker: Tracker) -> None:
    seen: list[Any] = []
    inner = tracker._run
    tracker._run = lambda *images: seen.append(images) or inner(*images)
    first = noise(0)
    tracker.start(first, START)
    for seed in (1, 2):
        tracker.step(noise(seed))
    crop = Crop.around(START, 2.0, 32, 10.0)
    pixels = cut(first, crop, mean_color(first))
    mean, std = (torch.tensor(part)[:, None, None] for part in tracker.model.normalization)
    for template, _, foreground in seen:
        torch.testing.assert_close(template[0], (pixels / 255 - mean) / std)
        assert foreground.dtype == torch.int64
        assert foreground.tolist() == [[[1, 1], [1, 1]]]
    assert not torch.equal(seen[0][1], seen[1][1])


def test_outside_of_a_frame_is_the_mean_of_the_first_one(tracker: Tracker) -> None:
    seen: list[torch.Tensor] = []
    inner = tracker._run
    tracker._run = lambda t, s, f: seen.append(s) or inner(t, s, f)
    tracker.start(np.full((50, 50, 3), 100, np.uint8), [0, 0, 20, 20])
    tracker.step(np.full((50, 50, 3), 200, np.uint8))
    corner = (seen[0] * tracker._std + tracker._mean)[0, :, 0, 0]
    torch.testing.assert_close(corner, torch.full((3,), 100.0))


def test_one_sequence_is_a_batch_of_one(wide: nn.Module) -> None:
    shapes = [(160, 120), (97, 140), (200, 80)]
    starts = [START, [5.0, 9.0, 30.0, 44.0], [120.0, 10.0, 40.0, 30.0]]
    films = [[noise(10 * i + t, *shapes[i]) for t in range(5)] for i in range(3)]
    films[1] = films[1][:3]
    together, alone = Tracker(wide, device="cpu"), Tracker(wide, device="cpu")
    together.start_all([film[0] for film in films], starts)
    rows = [
        together.step_all([film[t] if t < len(film) else None for film in films])
        for t in range(1, 5)
    ]
    moved = 0.0
    for number, (film, start) in enumerate(zip(films, starts, strict=True)):
        alone.start(film[0], start)
        for (boxes, scores), frame in zip(rows, film[1:], strict=False):
            box, score = alone.step(frame)
            np.testing.assert_allclose(boxes[number], box, rtol=0, atol=1e-9)
            assert scores[number] == pytest.approx(score, abs=1e-12)
            moved = max(moved, float(np.abs(box - start).max()))
    assert moved > 1
    assert np.isnan(rows[-1][1]).tolist() == [False, True, False]
    np.testing.assert_array_equal(rows[-1][0][1], rows[1][0][1])


def ran(tracker: Tracker, steps: int = 3) -> np.ndarray:
    tracker.start(noise(0), START)
    rows = [np.append(*tracker.step(noise(seed))) for seed in range(1, steps + 1)]
    return np.array(rows)


def test_merged_or_not_saved_or_not(wide: nn.Module, tmp_path: Path) -> None:
    wide.train()
    beside = sum("lora_" in name for name, _ in wide.named_parameters())
    folded = Tracker(wide, device="cpu")
    assert wide.training
    assert sum("lora_" in name for name, _ in wide.named_parameters()) == beside > 0
    assert not any("lora_" in name for name, _ in folded.model.named_parameters())
    expected = ran(folded)
    kept = Tracker(wide, merged=False, device="cpu")
    assert any("lora_" in name for name, _ in kept.model.named_parameters())
    np.testing.assert_allclose(ran(kept), expected, rtol=0, atol=1e-8)
    plain = pv.merge(wide)
    plain.save_pretrained(tmp_path / "out")
    for found in (plain, TrackingModel(plain), tmp_path / "out", str(tmp_path / "out")):
        np.testing.assert_allclose(ran(Tracker(found, device="cpu")), expected, atol=1e-8)


def test_the_geometry_is_that_of_the_model_or_one_s_own(model: nn.Module) -> None:
    own = Geometry(search_area=5.0, window=0.3)
    trained = copy.deepcopy(model)
    trained.history.task = own.to_json()
    assert Tracker(trained, device="cpu").geometry == own
    assert Tracker(trained, geometry=Geometry(), device="cpu").geometry == Geometry()
    assert Tracker(model, device="cpu").geometry == Geometry()


def test_a_base_in_fewer_bits_keeps_its_adapters() -> None:
    torch.manual_seed(0)
    tracker = Tracker(tiny_tracker(quantize="int8"), device="cpu")
    assert any("lora_" in name for name, _ in tracker.model.named_parameters())
    assert np.isfinite(ran(tracker)).all()


def test_a_compressed_tracker_tracks(model: nn.Module) -> None:
    small = pv.compress(pv.merge(model), target_params=0.8, methods=["magnitude"]).model
    assert np.isfinite(ran(Tracker(small, device="cpu"))).all()


def test_low_precision_and_compilation(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ran(Tracker(model, device="cpu"), steps=1)
    low = ran(Tracker(model, device="cpu", precision="bf16"), steps=1)
    assert not np.array_equal(low, expected)
    np.testing.assert_allclose(low, expected, atol=1.0)
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda m: compiled.append(m) or m)
    found = Tracker(model, device="cpu", compile=True)
    np.testing.assert_array_equal(ran(found, steps=1), expected)
    assert compiled == [found.model]


def test_frames_of_other_libraries(tracker: Tracker) -> None:
    """Arrays that may not be written to, and of another order in memory."""
    frame = noise(0)
    frozen, turned = frame.copy(), np.asfortranarray(frame)
    frozen.flags.writeable = False
    found = []
    for image in (frame, frozen, turned):
        tracker.start(image, [0, 0, WIDTH, HEIGHT])
        found.append(tracker.step(image)[0])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ([200, 10, 20, 20], "outside of the frame, which is 160 x 120"),
        ([-30, 10, 20, 20], "outside of the frame"),
        ([10, 10, 0, 20], "no area"),
        ([10, 10, 20, -3], "no area"),
        ([10, 10, float("nan"), 20], "finite"),
        ([float("inf"), 10, 10, 20], "finite"),
        ([10, 10, 20], "four numbers"),
        ([[10, 10, 20, 20]], "four numbers"),
        ("here", "x, y, width, height"),
        (None, "four numbers"),
    ],
)
def test_boxes_that_cannot_be_tracked(tracker: Tracker, box: Any, says: str) -> None:
    with pytest.raises(BadSetting, match=says):
        tracker.start(noise(0), box)


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (np.zeros((20, 20), np.uint8), r"uint8 of \(20, 20\)"),
        (np.zeros((20, 20, 4), np.uint8), "H W 3"),
        (np.zeros((3, 20, 20), np.uint8), "H W 3"),
        (np.zeros((20, 20, 3), np.float32), "float32"),
        (np.zeros((0, 20, 3), np.uint8), "no pixels"),
        ("frame.jpg", "is str"),
    ],
)
def test_frames_that_are_none(tracker: Tracker, frame: Any, says: str) -> None:
    with pytest.raises(BadSetting, match=says):
        tracker.start(frame, [1, 1, 9, 9])
    tracker.start(noise(0), START)
    with pytest.raises(BadSetting, match=says):
        tracker.step(frame)


def test_wrong_order_and_wrong_numbers(tracker: Tracker) -> None:
    with pytest.raises(BadSetting, match=r"tracker\.start\(frame, box\)"):
        tracker.step(noise(0))
    with pytest.raises(BadSetting, match="2 frames and 1 boxes"):
        tracker.start_all([noise(0)] * 2, [START])
    tracker.start_all([noise(0)] * 2, [START] * 2)
    with pytest.raises(BadSetting, match="step_all"):
        tracker.step(noise(0))
    with pytest.raises(BadSetting, match="1 frames for 2 targets"):
        tracker.step_all([noise(0)])


def test_what_is_not_a_tracker(model: nn.Module, tmp_path: Path) -> None:
    plain = partial(pv.create_model, "timm/test_vit", pretrained=False, img_size=64)
    with pytest.raises(BadSetting, match=r"is not a tracker.*streams=\(112, 224\)"):
        Tracker(plain())
    pruned = pv.compress(plain(), target_params=0.8, methods=["magnitude"])
    pruned.save_pretrained(tmp_path / "pruned")
    with pytest.raises(BadSetting, match=r"pruned is not a tracker"):
        Tracker(tmp_path / "pruned")
    with pytest.raises(BadSetting, match="fp32, bf16"):
        Tracker(model, precision="fp16")  # type: ignore[arg-type]
    for name in ("cuda:77", "gpu"):
        with pytest.raises(BadSetting, match=r"Possible: cpu"):
            Tracker(model, device=name)
